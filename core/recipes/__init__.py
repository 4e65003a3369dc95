"""Recipes: a merge as data to share, carried out from files to a merged adapter with its metadata."""
