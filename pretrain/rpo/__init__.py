"""Preference optimisation (RPO: DPO + SFT), from a file of preferences to a model that is ready to serve."""
