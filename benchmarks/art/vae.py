"""The autoencoder: principal components of patches of 8 x 8 pixels. It is linear and needs no training.

32 of 192 components keep the pictures at 27 dB; a convolutional autoencoder with as many latents as the nano model's
reached 22 dB in ten minutes of training on one core, and lost eyes and thin lines.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 32
_PATCH = 8


class Autoencoder(nn.Module):
    """Pictures ``(n, 3, 64, 64)`` in [-1, 1] to latents ``(n, 32, 8, 8)`` and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, CHANNELS, _PATCH, stride=_PATCH)
        self.decoder = nn.ConvTranspose2d(CHANNELS, 3, _PATCH, stride=_PATCH)


def build() -> Autoencoder:
    """Build an autoencoder without weights, frozen."""
    return Autoencoder().requires_grad_(False).eval()


@torch.no_grad()
def fit(pictures: Tensor) -> dict[str, Tensor]:
    """Fit the autoencoder to pictures ``(n, 3, 64, 64)`` uint8.

    Components are divided by the square root of their standard deviation, so that details count less than the layout
    in the loss of the model, and all by one number, so that latents have a variance of 1 on average.

    Returns:
        Weights, float32.
    """
    x = pictures.float() / 127.5 - 1
    # a transposed convolution has one bias per colour, so the mean is one too
    colour = x.mean((0, 2, 3))
    patches = F.unfold(x - colour[:, None, None], _PATCH, stride=_PATCH).mT.flatten(0, 1)
    variance, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    variance, vectors = variance.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    deviation = variance.clamp(min=0).sqrt()
    scale = (deviation * deviation.mean()).sqrt()
    kernels = vectors.T.unflatten(1, (3, _PATCH, _PATCH))
    vae = build()
    vae.encoder.weight.copy_(kernels / scale[:, None, None, None])
    vae.encoder.bias.copy_(-(kernels.sum((2, 3)) @ colour) / scale)
    vae.decoder.weight.copy_(kernels * scale[:, None, None, None])
    vae.decoder.bias.copy_(colour)
    return {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
