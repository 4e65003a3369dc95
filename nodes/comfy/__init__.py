"""ComfyUI itself: everything in the pack that touches more of it than the node schemas."""
