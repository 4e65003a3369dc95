"""transformers: mixtures (MoLE) on language models."""
