"""MoLE: several LoRAs kept apart and mixed by gates while the model runs (arXiv:2404.13628)."""
