"""Recipes that only the tests know, found like the real ones."""
