"""`mixwright dashboard`: runs in a browser, from their journals and metrics alone, live and afterwards."""
