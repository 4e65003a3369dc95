"""Gram matrices are reused for the same factors, and for no others."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.core.merge import gram
from legomole.core.merge.cache import GramCache
from legomole.core.merge.engine import MergeResult, merge
from legomole.core.merge.methods import METHODS
from legomole.core.merge.rank import Rank


def adapters(seed: int = 0) -> list[Adapter]:
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [Adapter({f"layer{i}": LowRank(factor(4, 32), factor(24, 4)) for i in range(3)}) for _ in range(2)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """Number of Gram products and decompositions computed since the last call."""
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
    inputs, cache = adapters(), GramCache()
    merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
    assert counted() == (1, 2)  # one batch: products, and every adapter's own decomposition
    lego, svd = METHODS["lego"](Rank(2)), METHODS["svd"](Rank(3))
    for method, weights, own, sums in ((lego, (1.0, 1.0), 2, 0), (lego, (0.3, -2.0), 2, 0), (svd, (0.5, -2.0), 0, 1)):
        again = merge(inputs, method, weights, cache=cache)
        assert counted() == (0, sums)
        fresh = merge(inputs, method, weights)
        assert counted() == (1, own + sums)
        assert again.report == fresh.report
        for name, part in fresh.adapter.modules.items():
            assert torch.equal(again.adapter.modules[name].A, part.A)
            assert torch.equal(again.adapter.modules[name].B, part.B)


def test_a_lora_left_out_is_another_batch(counted: Callable[[], tuple[int, int]]) -> None:
    inputs, cache = adapters(), GramCache()
    merge(inputs, METHODS["lego"](Rank(2)), cache=cache)
    counted()
    alone = merge(inputs, METHODS["lego"](Rank(2)), (1.0, 0.0), cache=cache).adapter.modules["layer0"]
    assert counted() == (1, 1)
    assert torch.equal(alone.A, merge(inputs[:1], METHODS["lego"](Rank(2))).adapter.modules["layer0"].A)


def test_no_more_is_kept_than_the_limit(counted: Callable[[], tuple[int, int]]) -> None:
    # values of 8 bytes, 3 layers: A and B 8 x 8; for two adapters S 4, R_A and R_B 4 x 4
    kept = 3 * 8 * (2 * 8 * 8 + 2 * (4 + 2 * 4 * 4))
    for limit, computed in ((kept, (0, 0)), (kept - 1, (1, 2))):
        inputs, cache = adapters(), GramCache(limit)
        merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
        counted()
        merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
        assert counted() == computed


def same(found: MergeResult, expected: MergeResult) -> bool:
    """Whether factors and reports are equal."""
    parts = zip(found.adapter.modules.values(), expected.adapter.modules.values(), strict=True)
    factors = all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) for a, b in parts)
    return factors and found.report == expected.report


def test_other_adapters_of_the_same_shapes_are_other_adapters(counted: Callable[[], tuple[int, int]]) -> None:
    """Also if they are stored at the address of adapters that were freed."""
    cache = GramCache()
    for seed in (0, 1, 0):
        inputs = adapters(seed)
        counted()
        found = merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
        assert counted() == (1, 2)
        assert same(found, merge(inputs, METHODS["lego"](Rank(4))))


def test_an_equal_adapter_that_was_loaded_again_is_another_one(counted: Callable[[], tuple[int, int]]) -> None:
    """Finding out that they are equal would take a hash of all factors at every merge."""
    cache = GramCache()
    merge(adapters(), METHODS["lego"](Rank(4)), cache=cache)
    counted()
    found = merge(adapters(), METHODS["lego"](Rank(4)), cache=cache)
    assert counted() == (1, 2)
    assert same(found, merge(adapters(), METHODS["lego"](Rank(4))))


def test_adapters_of_inference_mode_are_known_by_their_values(counted: Callable[[], tuple[int, int]]) -> None:
    with torch.inference_mode():
        cache, inputs = GramCache(), adapters()
        merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
        counted()
        merge(adapters(), METHODS["lego"](Rank(2)), cache=cache)
        assert counted() == (0, 0)
        inputs[0].modules["layer0"].A[0, 0] += 1
        merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
        assert counted() == (1, 2)


@pytest.mark.parametrize("change", ["factor", "alpha", "dtype", "order"])
def test_what_the_matrices_depend_on_is_noticed(counted: Callable[[], tuple[int, int]], change: str) -> None:
    cache, inputs = GramCache(), adapters()
    merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
    if change == "factor":
        inputs[1].modules["layer2"].B[3, 1] += 1
    elif change == "order":
        inputs.reverse()
    else:
        changed = {"alpha": {"alpha": 2.0}, "dtype": {}}[change]
        dtype = torch.float64 if change == "dtype" else torch.float32
        inputs[0] = Adapter({n: replace(p.to(dtype), **changed) for n, p in inputs[0].modules.items()})
    counted()
    found = merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
    assert counted() == (1, 2)
    assert same(found, merge(inputs, METHODS["lego"](Rank(4))))


def test_factors_are_not_kept_alive() -> None:
    cache, inputs = GramCache(), adapters()
    merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
    factors = [weakref.ref(part.A) for adapter in inputs for part in adapter.modules.values()]
    del inputs
    assert not [factor for factor in factors if factor() is not None]


def test_a_factor_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, inputs = GramCache(), adapters()
    merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
    monkeypatch.setattr(torch.Tensor, "view", lambda *_: pytest.fail("the factors are hashed again"))
    merge(inputs, METHODS["svd"](Rank(4)), cache=cache)


def test_factors_of_inference_mode_have_no_version_but_a_content(counted: Callable[[], tuple[int, int]]) -> None:
    cache = GramCache()
    with torch.inference_mode():
        inputs = adapters()
    merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
    counted()
    merge(inputs, METHODS["lego"](Rank(4)), cache=cache)
    assert counted() == (0, 0)
