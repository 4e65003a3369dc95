"""Gram matrices that are used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.core.merge import gram
from legomole.core.merge.cache import GramCache
from legomole.core.merge.engine import merge
from legomole.core.merge.methods import METHODS
from legomole.core.merge.rank import Rank


def adapters() -> list[Adapter]:
    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [Adapter({f"layer{i}": LowRank(factor(4, 32), factor(24, 4)) for i in range(3)}) for _ in range(2)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """How many Gram products and decompositions were computed since it was last asked."""
    calls: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        compute = getattr(gram, name)

        def counted(*args: Any) -> Any:
            calls.append(name)
            return compute(*args)

        return counted

    def since() -> tuple[int, int]:
        found = (calls.count("products"), calls.count("svd"))
        calls.clear()
        return found

    for name in ("products", "svd"):
        monkeypatch.setattr(gram, name, counting(name))
    return since


def test_other_ranks_methods_and_weights_need_no_new_products(counted: Callable[[], tuple[int, int]]) -> None:
    inputs, products = adapters(), GramCache()
    merge(inputs, METHODS["lego"](Rank(4)), cache=products)
    assert counted() == (1, 2)  # one batch: products, and every adapter's own decomposition
    lego, svd = METHODS["lego"](Rank(2)), METHODS["svd"](Rank(3))
    for method, weights, own, sums in ((lego, (1.0, 1.0), 2, 0), (lego, (0.3, -2.0), 2, 0), (svd, (0.5, -2.0), 0, 1)):
        again = merge(inputs, method, weights, cache=products)
        assert counted() == (0, sums)
        fresh = merge(inputs, method, weights)
        assert counted() == (1, own + sums)
        assert again.report == fresh.report
        for name, part in fresh.adapter.modules.items():
            assert torch.equal(again.adapter.modules[name].A, part.A)
            assert torch.equal(again.adapter.modules[name].B, part.B)


def test_a_lora_left_out_is_another_batch(counted: Callable[[], tuple[int, int]]) -> None:
    inputs, products = adapters(), GramCache()
    merge(inputs, METHODS["lego"](Rank(2)), cache=products)
    counted()
    alone = merge(inputs, METHODS["lego"](Rank(2)), (1.0, 0.0), cache=products).adapter.modules["layer0"]
    assert counted() == (1, 1)
    assert torch.equal(alone.A, merge(inputs[:1], METHODS["lego"](Rank(2))).adapter.modules["layer0"].A)


def test_no_more_is_kept_than_the_limit(counted: Callable[[], tuple[int, int]]) -> None:
    # numbers of 8 bytes, 3 layers: A and B 8 x 8; of two adapters S 4, R_A and R_B 4 x 4
    kept = 3 * 8 * (2 * 8 * 8 + 2 * (4 + 2 * 4 * 4))
    for limit, anew in ((kept, (0, 0)), (kept - 1, (1, 2))):
        inputs, products = adapters(), GramCache(limit)
        merge(inputs, METHODS["lego"](Rank(4)), cache=products)
        counted()
        merge(inputs, METHODS["lego"](Rank(4)), cache=products)
        assert counted() == anew
