"""The ComfyUI nodes. Only this folder knows ComfyUI; only `comfy.py` and `program.py` know more than its node API."""
