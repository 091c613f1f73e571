"""`manifold-lora compare`: several methods, each at its own best learning rate."""
