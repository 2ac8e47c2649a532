"""Ensembles of separately trained members: the recipe, its members, and what their mean predicts."""
