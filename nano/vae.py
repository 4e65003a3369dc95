"""The autoencoder: TAESD's layout, which ComfyUI and diffusers load, without most of its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

CHANNELS = 16  # channels of the latents, whose height and width are 1/8 of the picture's

# positions of the omitted blocks in TAESD's lists of layers; with zero weights each is max(0, x)
_OMITTED = {"encoder": (1, 5, 9), "decoder": (4, 9, 14, 17)}


def build() -> Any:
    """Build an untrained `diffusers.AutoencoderTiny` whose omitted blocks are replaced by their ReLU."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    vae = AutoencoderTiny(latent_channels=CHANNELS, scaling_factor=1.0, shift_factor=0.0)
    for part, positions in _OMITTED.items():
        for i in positions:
            getattr(vae, part).layers[i] = nn.ReLU()
    return vae.requires_grad_(False).eval()


def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Complete a state dict to TAESD's layout, with zeros for the omitted blocks."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    full = AutoencoderTiny(latent_channels=CHANNELS).state_dict()
    dtype = next(iter(state.values())).dtype
    return {name: state[name] if name in state else tensor.to(dtype).zero_() for name, tensor in full.items()}
