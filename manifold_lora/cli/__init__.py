"""The `manifold-lora` command."""
