"""The autoencoder without some blocks, and the full one with zeros in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from legomole.nano import vae

diffusers: Any = pytest.importorskip("diffusers")


def test_the_full_autoencoder_gives_the_same_result(seeded):
    short = vae.build()
    full = diffusers.AutoencoderTiny(latent_channels=vae.CHANNELS).eval()
    full.load_state_dict(vae.whole(short.state_dict()))
    pictures, latents = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert short.encoder(pictures).shape == (2, 16, 8, 8)
        torch.testing.assert_close(short.encoder(pictures), full.encoder(pictures))
        torch.testing.assert_close(short.decoder(latents), full.decoder(latents))
    assert sum(p.numel() for p in short.parameters()) < 0.8 * sum(p.numel() for p in full.parameters())


def test_omitted_blocks_are_zeros_of_the_same_dtype(seeded):
    state = {name: w.half() for name, w in vae.build().state_dict().items()}
    found = vae.whole(state)
    omitted = found.keys() - state.keys()
    assert {name.rsplit(".conv", 1)[0] for name in omitted} == {
        *(f"encoder.layers.{i}" for i in (1, 5, 9)), *(f"decoder.layers.{i}" for i in (4, 9, 14, 17)),
    }  # fmt: skip
    assert not any(found[name].any() for name in omitted)
    assert {w.dtype for w in found.values()} == {torch.float16}
    assert all(torch.equal(found[name], w) for name, w in state.items())
