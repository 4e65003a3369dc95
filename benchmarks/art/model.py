"""The transformer, SD3's with four blocks, and the folder with the weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from legomole.nano import store as nano_store
from legomole.nano.model import SIDE
from legomole.nano.oracle import Oracle
from legomole.nano.store import loaded
from safetensors.torch import load_file

from . import text, vae, words
from .render import Drawings
from .vae import CHANNELS, Autoencoder

_BLOCKS = 4  # as many as attention heads, because ComfyUI derives one from the other


def build() -> Any:
    """Build an untrained `diffusers.SD3Transformer2DModel` of 9.2 million weights."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=SIDE, patch_size=1, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=_BLOCKS,
        attention_head_dim=64, num_attention_heads=_BLOCKS, joint_attention_dim=text.WIDTH,
        caption_projection_dim=64 * _BLOCKS, pooled_projection_dim=text.WIDTH, pos_embed_max_size=2 * SIDE,
    )  # fmt: skip


def build_judge() -> Oracle:
    """Build an untrained judge, whose classes include the subjects and styles that the base model never sees."""
    return Oracle(words.SUBJECTS, words.STYLES, (32, 64, 128, 192))


@dataclass(frozen=True)
class ArtStore(nano_store.Store):
    """The working folder: models as in `nano.store.Store`, the packages and the rasterised drawings.

    Args:
        folder: The working folder.
    """

    folder: Path = Path(__file__).parent / "work"

    @cached_property
    def transformer(self) -> Any:
        return loaded(build(), self._weights("base"))

    @cached_property
    def wide(self) -> Any:
        """The transformer for scenes of two halves."""
        return loaded(build(), self._weights("wide"))

    @cached_property
    def vae(self) -> Autoencoder:
        return loaded(vae.build(), load_file(self.folder / "vae.safetensors"))

    @cached_property
    def oracle(self) -> Oracle:
        return loaded(build_judge(), self._weights("oracle"))

    @property
    def packages(self) -> Path:
        return self.folder / "npm"

    @property
    def drawings_file(self) -> Path:
        return self.folder / "drawings.npz"

    @cached_property
    def drawings(self) -> Drawings:
        return Drawings.load(self.drawings_file)
