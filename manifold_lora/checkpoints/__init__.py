"""Files in and out: Hugging Face models, PEFT adapters and training checkpoints."""
