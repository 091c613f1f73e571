"""`manifold-lora inspect`: ranks, angles and spectra of an adapter's factors."""
