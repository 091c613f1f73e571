"""How good a model is, and what its factors look like."""
