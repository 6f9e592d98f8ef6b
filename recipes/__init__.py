"""Recipes, one YAML file per run, and the functions that they name."""
