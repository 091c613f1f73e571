"""`manifold-lora inspect`: ranks, angles and spectra of an adapter, with plots."""
