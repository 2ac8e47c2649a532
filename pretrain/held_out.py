"""Held-out rows as the training stages know them."""

from mixwright.data_mixing.held_out import HeldOut

__all__ = ["HeldOut"]
