"""Mixing policies, one file each; looked up by their `kind` (see `mixwright.data_mixing.policy`)."""
