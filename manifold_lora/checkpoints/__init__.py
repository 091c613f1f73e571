"""Reading and writing Hugging Face models, PEFT adapters and training checkpoints."""
