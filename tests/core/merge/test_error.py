"""The reported error is that of the factors that are stored."""

from __future__ import annotations

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.core.merge.engine import MergeResult, merge
from legomole.core.merge.methods import METHODS, MergeMethod
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from torch import Tensor

from ..rounded_products import RoundedProducts

WIDTH = 320  # wide enough for the randomised SVD of dense methods


def loras(rank: int = 4, width: int = WIDTH) -> list[Adapter]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [Adapter({"layer": LowRank(random(rank, width), random(width, rank))}) for _ in range(2)]


def method(name: str) -> MergeMethod:
    if name in ("concat", "linear"):
        return METHODS[name]()
    settings = {}
    if name in ("calibrated", "ssr"):
        X = torch.randn(WIDTH, 2 * WIDTH, generator=torch.Generator().manual_seed(1))
        settings = {"statistics": Statistics({"layer": ModuleStatistics({0: X @ X.mT, 1: torch.eye(WIDTH)})})}
    return METHODS[name](Rank(8), **settings)


def delta(result: MergeResult) -> Tensor:
    part = result.adapter.modules["layer"]
    return part.B.double() @ part.A.double()


def errors(inputs: list[Adapter], result: MergeResult) -> tuple[float, float]:
    """The reported error, and the true error by dense float64 matrices."""
    total = sum(a.modules["layer"].B.double() @ a.modules["layer"].A.double() for a in inputs)
    return result.report.modules[0].error, float((delta(result) - total).norm() / total.norm())


methods = pytest.mark.parametrize("name", METHODS)


@methods
def test_a_merge_is_exact_where_the_process_allows_less(name: str) -> None:
    inputs, chosen = loras(), method(name)
    expected = delta(merge(inputs, chosen))
    torch.set_float32_matmul_precision("medium")
    try:
        with RoundedProducts() as backend:
            result = merge(inputs, chosen)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not backend.rounded
    assert float((delta(result) - expected).norm()) < 1e-5 * float(expected.norm())
    reported, true = errors(inputs, result)
    assert reported == pytest.approx(true, rel=0.2, abs=1e-9)


@methods
def test_a_merge_is_exact_inside_autocast(name: str) -> None:
    inputs, chosen = loras(), method(name)
    expected = delta(merge(inputs, chosen))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = merge(inputs, chosen)
    assert float((delta(found) - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.parametrize("name", ["concat", "svd", "lego", "linear"])
def test_precision_that_is_lost_unnoticed_is_reported(name: str) -> None:
    inputs = loras(rank=16)
    with RoundedProducts(when=lambda: True) as backend:
        reported, true = errors(
            inputs, merge(inputs, METHODS[name]() if name in ("concat", "linear") else method(name))
        )
    assert backend.rounded
    assert true > 1e-3
    assert reported == pytest.approx(true, rel=0.2)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_to_the_output_is_reported(name: str, dtype: torch.dtype) -> None:
    inputs = loras()
    reported, true = errors(inputs, merge(inputs, method(name), dtype=dtype))
    assert reported == pytest.approx(true, rel=0.2, abs=1e-9)
    if name == "concat":
        assert true < {torch.float32: 1e-7, torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]


def test_values_too_small_for_the_output_are_reported() -> None:
    inputs = loras()
    result = merge(inputs, METHODS["concat"](), [1e-20, 1e-20], dtype=torch.float16)
    assert not result.adapter.modules["layer"].delta().any()
    assert result.report.energy_kept == 0
