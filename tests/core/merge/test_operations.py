"""How many torch operations a small merge takes: what makes merging slow shows here first, and nothing is timed.

The bounds are a fifth above what was counted. Of a mixed layer's operations see tests/benchmarks/test_mixing.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.core.merge.engine import merge
from legomole.core.merge.methods import MergeMethod
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.rank import Rank
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Counts operations that are no views, and keeps the most numbers a tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.seen[func.name().removeprefix("aten::").partition(".")[0]] += 1
            self.largest = max([self.largest, *(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))])
        return made


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """Operations of other threads are not seen."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapters(modules: int, rank: int = 8, width: int = 256) -> list[Adapter]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    return [
        Adapter({f"layer{i}": LowRank(random(rank, width), random(width, rank)) for i in range(modules)})
        for _ in range(3)
    ]


def count(method: MergeMethod, modules: int, **sizes: int) -> Operations:
    inputs = adapters(modules, **sizes)
    with Operations() as counted:
        merge(inputs, method)
    return counted


LEGO, EXACT = Lego(Rank(8)), SVD(Rank(8))


@pytest.mark.parametrize(("method", "batch", "module"), [(LEGO, 790, 13), (EXACT, 260, 13), (Concat(), 215, 13)])
def test_a_batch_takes_so_many_operations_and_a_module_of_it_a_few_more(method: MergeMethod, batch: int, module: int):
    """Counted: 741, 238 and 196 for a batch of any size, and 11 to read and write each of its modules.

    Of these, 34, 48 and 48 measure singular values and lengths for findings.
    """
    few, many = count(method, 4).seen, count(method, 12).seen
    more = (many.total() - few.total()) / 8
    assert more <= module, many - few
    assert few.total() - 4 * more <= batch, few


@pytest.mark.parametrize("method", [LEGO, EXACT, Concat()])
def test_no_tensor_is_as_large_as_a_weight(method: MergeMethod):
    """Four modules' factors have 4 * 24 * 256 numbers a side, a weight 256 * 256."""
    assert count(method, 4).largest <= 4 * 24 * 256 < 2 * 256 * 256
    assert count(method, 1, width=1024).largest <= 24 * 1024


def test_the_factors_are_cast_twice_and_read_by_four_products():
    """A pass for two Gram products, and one for two that make the result; the rest comes from small matrices."""
    width = 4096
    inputs = adapters(1, width=width)
    large: list[str] = []

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            read = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.numel() >= 24 * width]
            if read and not func.is_view:
                large.append(func.name().removeprefix("aten::").partition(".")[0])
            return func(*args, **(kwargs or {}))

    with Large():
        merge(inputs, LEGO)
    assert Counter(large) == {"copy_": 4, "bmm": 4}  # float16 to float32; no copy in float64
