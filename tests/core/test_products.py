"""Gram matrices that are used again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from legomole.core import gram
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.core.merge import merge
from legomole.core.methods import METHODS
from legomole.core.products import Products
from legomole.core.rank import Rank


def adapters() -> list[Adapter]:
    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [Adapter({f"layer{i}": LowRank(factor(4, 32), factor(24, 4)) for i in range(3)}) for _ in range(2)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many Gram products were computed since it was last asked."""
    calls: list[None] = []
    product = gram.product

    def counting(X: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return product(X)

    def since() -> int:
        n = len(calls)
        calls.clear()
        return n

    monkeypatch.setattr(gram, "product", counting)
    return since


def test_other_ranks_methods_and_weights_need_no_new_products(counted: Callable[[], int]) -> None:
    inputs, products = adapters(), Products()
    merge(inputs, METHODS["lego"](Rank(4)), products=products)
    assert counted() == 2  # one batch, A and B
    for method, weights in ((METHODS["lego"](Rank(2)), (1.0, 1.0)), (METHODS["svd"](Rank(3)), (0.5, -2.0))):
        again = merge(inputs, method, weights, products=products)
        assert counted() == 0
        fresh = merge(inputs, method, weights)
        assert counted() == 2
        assert again.report == fresh.report
        for name, part in fresh.adapter.modules.items():
            assert torch.equal(again.adapter.modules[name].A, part.A)
            assert torch.equal(again.adapter.modules[name].B, part.B)


def test_a_lora_left_out_is_another_batch(counted: Callable[[], int]) -> None:
    inputs, products = adapters(), Products()
    merge(inputs, METHODS["lego"](Rank(2)), products=products)
    counted()
    alone = merge(inputs, METHODS["lego"](Rank(2)), (1.0, 0.0), products=products).adapter.modules["layer0"]
    assert counted() == 2
    assert torch.equal(alone.A, merge(inputs[:1], METHODS["lego"](Rank(2))).adapter.modules["layer0"].A)


def test_no_more_is_kept_than_the_limit(counted: Callable[[], int]) -> None:
    inputs, products = adapters(), Products(limit=3 * 2 * 8 * 8 * 8 - 1)  # 3 layers, A and B, 8 x 8 numbers of 8 bytes
    for _ in range(2):
        merge(inputs, METHODS["lego"](Rank(4)), products=products)
        assert counted() == 2
