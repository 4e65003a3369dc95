"""diffusers: layer names across dialects, and MoLE on its pipelines."""
