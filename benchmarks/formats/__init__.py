"""Merges and conversions between all dialects of all families, read back by ComfyUI and diffusers."""
