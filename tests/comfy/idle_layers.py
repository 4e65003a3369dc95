"""A custom node of the test server. ComfyUI's CLIP-L always has twelve layers; most of ours are identities: skip them.

The result is the same bit for bit, and encoding a prompt takes a fraction of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.clip_model import CLIPLayer

NODE_CLASS_MAPPINGS: dict[str, Any] = {}

_forward = CLIPLayer.forward


def _gives_zeros(linear: Any) -> bool:
    """Whether a linear layer returns zeros, as it is now: without patches, and with its own forward method."""
    patched = linear.weight_function or linear.bias_function or "forward" in vars(linear)
    if patched or not {linear.weight.dtype, linear.bias.dtype} <= {torch.float16, torch.float32}:
        return False
    words = (tensor.view(torch.int64) for tensor in (linear.bias, linear.weight))  # faster to look through than halves
    return not any(word.any() for word in words)


def _forward_unless_idle(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if _gives_zeros(self.self_attn.out_proj) and _gives_zeros(self.mlp.fc2):
        return x
    return _forward(self, x, *args, **kwargs)


CLIPLayer.forward = _forward_unless_idle
