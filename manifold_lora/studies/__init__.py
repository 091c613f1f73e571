"""Whole comparisons, as data: which runs there are, and what came of them."""
