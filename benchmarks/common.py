"""Shared parts of the comparisons: sets of adapters, methods to combine them, and files of results."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank, truncated_svd
from legomole.core.merge.engine import merge
from legomole.core.merge.rank import Rank
from torch import Tensor

Say = Callable[[str], None]  # called with progress messages
Row = TypeVar("Row")


@dataclass
class AdapterSet:
    """Adapters to combine, with a cache of what the methods compute from them.

    Args:
        adapters: The adapters.
        seed: Seed of their training.
    """

    adapters: tuple[Adapter, ...]
    seed: int
    _: KW_ONLY
    _results: dict[Any, Any] = field(default_factory=dict[Any, Any], repr=False)

    def cached(self, compute: Callable[[Any], Any]) -> Any:
        """Return ``compute(self)``, computed once per function."""
        if compute not in self._results:
            self._results[compute] = compute(self)
        return self._results[compute]


@dataclass(frozen=True)
class Method:
    """A way to combine adapters, one row of a table.

    Args:
        use: Returns a context manager that yields the model with a set of adapters combined at a strength.
        rank: Rank of the result for N adapters of rank r; ``"-"`` if the result is no adapter.
        fixed: Whether the method has no strength to choose.
    """

    use: Callable[..., Any]
    rank: str = "r"
    fixed: bool = False


def merging(
    method: Callable[..., Any], rank: str, statistics: Callable[[Any], Any] | None = None, **options: Any
) -> Callable[[AdapterSet], Adapter]:
    """Return a function that merges a set of adapters.

    Args:
        method: Makes the merge method from a rank and, if given, from statistics.
        rank: Rank of the result, as `Rank.parse` reads it.
        statistics: Measures the statistics of a set of adapters.
        options: Further arguments of `merge`.
    """

    def compute(adapters: AdapterSet) -> Adapter:
        measured = {} if statistics is None else {"statistics": adapters.cached(statistics)}
        return merge(adapters.adapters, method(Rank.parse(rank), **measured), dtype=torch.float32, **options).adapter

    return compute


@contextmanager
def merged_in(model: Any, adapter: Adapter, strength: float, prefix: str = "") -> Generator[Any]:
    """Add an adapter to a model's weights inside the block, and restore them afterwards, bit for bit.

    Args:
        prefix: Prefix of the adapter's layer names that the model's own names lack.
    """
    before: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for name, part in adapter.modules.items():
            weight = model.get_submodule(name.removeprefix(prefix)).weight
            before[weight] = weight.clone()
            on_device = replace(part, A=part.A.to(weight.device), B=part.B.to(weight.device))
            weight.copy_(weight.float() + strength * on_device.delta().view_as(weight))
    try:
        yield model
    finally:
        with torch.no_grad():
            for weight, original in before.items():
                weight.copy_(original)


def spiked(part: LowRank, times: float) -> LowRank:
    """Multiply the largest singular value of an update, float32."""
    A, B = truncated_svd(part.A.double(), part.scale * part.B.double(), part.rank)
    A[0] *= times**0.5
    B[:, 0] *= times**0.5
    return LowRank(A.float(), B.float())


@dataclass(frozen=True)
class ResultLog:
    """A file of results, one JSON object per line, from which an interrupted run resumes."""

    path: Path

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def rows(self, kind: type[Row], names: str) -> list[Row]:
        """Return the results as rows; `names` is the field that holds a tuple, which JSON stores as a list."""
        return [kind(**{**result, names: tuple(result[names])}) for result in self.read()]

    def append(self, result: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")


def say(text: str) -> None:
    """Print a message at once; unlike a function of ``__main__``, other processes can unpickle it."""
    print(text, flush=True)


def bfloat16() -> torch.autocast:
    """Compute in bfloat16, without the cache of weights, which would hold those of the first step."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def mean(values: Sequence[float]) -> float:
    """Return the mean, NaN without values."""
    return statistics.fmean(values) if values else math.nan


def write(path: Path, value: Any) -> None:
    """Write text, or any other value as JSON; the file is replaced as a whole, and its folder made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text((value if isinstance(value, str) else json.dumps(value, indent=1)) + "\n")
    part.replace(path)
