"""`manifold-lora plan`: the training step compiled without access to the devices."""
