"""Adapters of several tasks, with the world that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from legomole.core.formats import load
from legomole.hosts.transformers.mixing import experts

from ..common import AdapterSet


@dataclass
class TaskAdapters(AdapterSet):
    """Adapters of several tasks and one seed.

    Args:
        world: Model and tasks, its model as ``world.model``. tasks: Task of each adapter. folders: Folder of each
            adapter.
    """

    world: Any
    tasks: tuple[str, ...]
    folders: tuple[Path, ...]

    @classmethod
    def load(cls, world: Any, tasks: tuple[str, ...], folders: Sequence[Path], seed: int) -> TaskAdapters:
        adapters = tuple(experts(world.model, [load(folder) for folder in folders]))
        return cls(adapters, seed, world, tasks, tuple(folders))

    @property
    def model(self) -> Any:
        return self.world.model
