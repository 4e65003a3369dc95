"""The ComfyUI nodes. Only this folder knows ComfyUI; `comfy.py` alone touches more of it than its node API."""
