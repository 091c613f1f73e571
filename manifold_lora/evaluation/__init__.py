"""Held-out measures of a model."""
