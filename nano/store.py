"""The shipped weights, and the models that load them."""

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
    """A folder with the float16 safetensors files ``base``, ``vae``, ``oracle`` and ``loras/<concept>-<seed>``.

    Models are built on first use, in float32, frozen.
    """

    folder: Path = FOLDER

    def lora(self, concept: str, seed: int = 0) -> Path:
        return self.folder / "loras" / f"{concept}-{seed}.safetensors"

    def _weights(self, name: str) -> dict[str, Tensor]:
        return {key: w.float() for key, w in load_file(self.folder / f"{name}.safetensors").items()}

    @cached_property
    def transformer(self) -> Any:
        return loaded(model.build(), self._weights("base"))

    @cached_property
    def vae(self) -> Any:
        return loaded(vae.build(), self._weights("vae"))

    @cached_property
    def oracle(self) -> oracle.Oracle:
        return loaded(oracle.Oracle(), self._weights("oracle"))

    @torch.no_grad()
    def pictures(self, latents: Tensor, batch: int = 32) -> Tensor:
        """Decode latents ``(n, 16, 8, 8)`` to pictures ``(n, 3, 64, 64)`` in [-1, 1]."""
        return torch.cat([self.vae.decoder(part) for part in latents.split(batch)]).clamp(-1, 1)


def loaded(module: Any, state: dict[str, Tensor]) -> Any:
    """Load weights into a module and freeze it."""
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)
