"""The shipped weights, and the models made of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from . import model, oracle, vae

FOLDER = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Store:
    """A folder with ``base``, ``vae``, ``oracle`` and ``loras/<concept>-<seed>``, safetensors files in float16."""

    folder: Path = FOLDER

    def lora(self, concept: str, seed: int = 0) -> Path:
        return self.folder / "loras" / f"{concept}-{seed}.safetensors"

    def _weights(self, name: str) -> dict[str, Tensor]:
        return {key: w.float() for key, w in load_file(self.folder / f"{name}.safetensors").items()}

    @cached_property
    def transformer(self) -> Any:
        """float32, frozen."""
        return _filled(model.build(), self._weights("base"))

    @cached_property
    def vae(self) -> Any:
        return _filled(vae.build(), self._weights("vae"))

    @cached_property
    def oracle(self) -> oracle.Oracle:
        return _filled(oracle.Oracle(), self._weights("oracle"))

    @torch.no_grad()
    def pictures(self, latents: Tensor, batch: int = 32) -> Tensor:
        """``(n, 3, 64, 64)`` in [-1, 1]."""
        return torch.cat([self.vae.decoder(part) for part in latents.split(batch)]).clamp(-1, 1)


def _filled(module: Any, state: dict[str, Tensor]) -> Any:
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)
