"""The autoencoder: TAESD's layout (so that ComfyUI and diffusers load it), most of its blocks left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

CHANNELS = 16  # of the latents, which are 8 times smaller than the picture

# positions of blocks in TAESD's lists of layers that are left out: with zero weights each is max(0, x)
_LEFT_OUT = {"encoder": (1, 5, 9), "decoder": (4, 9, 14, 17)}


def build() -> Any:
    """A `diffusers.AutoencoderTiny` with fresh weights, the blocks left out replaced by their ReLU."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    vae = AutoencoderTiny(latent_channels=CHANNELS, scaling_factor=1.0, shift_factor=0.0)
    for part, positions in _LEFT_OUT.items():
        for i in positions:
            getattr(vae, part).layers[i] = nn.ReLU()
    return vae.requires_grad_(False).eval()


def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of TAESD's layout: those in `state`, zeros for the blocks left out."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    full = AutoencoderTiny(latent_channels=CHANNELS).state_dict()
    dtype = next(iter(state.values())).dtype
    return {name: state[name] if name in state else tensor.to(dtype).zero_() for name, tensor in full.items()}
