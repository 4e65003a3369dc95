"""The ComfyUI nodes. No other folder imports ComfyUI, and here only `comfy` uses more than its node API."""
