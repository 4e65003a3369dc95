"""One name per layer across dialects: key maps, alignment of adapters, and blocks told from layer names."""
