"""transformers: MoLE on language models."""
