"""Recipes: what a state that is a value makes possible, each a short script to copy."""
