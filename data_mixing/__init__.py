"""Domains and token store, batch plan, journal, controller, policies, feeders."""
