"""The modules that use more of ComfyUI than the node schemas."""
