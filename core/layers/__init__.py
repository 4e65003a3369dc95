"""One name per layer across dialects: key maps, alignment of adapters, and blocks by layer names."""
