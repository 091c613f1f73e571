"""Generation of text: sampling, beam search, stopping, and the command."""
