"""Products keep float32 precision whatever the process allows its backends."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch
from legomole.core.lowrank import LowRank, best_rank_k, fold_tucker, truncated_svd
from legomole.core.precision import exact_operand, float32_is_exact, matmul
from torch import Tensor

from .merge.pools import best, close
from .rounded_products import RoundedProducts

CPU = torch.device("cpu")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def medium() -> Generator[RoundedProducts]:
    """The process allows bfloat16, and the backend makes use of it."""
    torch.set_float32_matmul_precision("medium")
    try:
        with RoundedProducts() as backend:
            yield backend
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_backend_of_these_tests_does_round(medium: RoundedProducts) -> None:
    X = random(8, 64)
    assert not close(X @ X.mT, X.double() @ X.double().mT, 1e-4)
    assert medium.rounded == 2


def test_settings_are_read() -> None:
    assert float32_is_exact(CPU)
    for device in ("xpu", "meta"):  # whose settings are not read
        assert not float32_is_exact(torch.device(device))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not float32_is_exact(CPU)
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            assert not float32_is_exact(CPU)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert float32_is_exact(CPU)


@pytest.mark.parametrize(("mode", "exact"), [("BF16", False), ("any", False), ("strict", True), ("", True)])
@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, name: str, mode: str, exact: bool) -> None:
    monkeypatch.setenv(name, mode)
    assert float32_is_exact(CPU) is exact


def test_operands_are_widened_only_where_they_have_to_be(medium: RoundedProducts) -> None:
    X = random(2, 3)
    assert exact_operand(X).dtype == torch.float64
    assert exact_operand(X.double()).dtype == torch.float64
    assert exact_operand(X.half()).dtype == torch.float16
    torch.set_float32_matmul_precision("highest")
    assert exact_operand(X) is X


def test_matmul(medium: RoundedProducts) -> None:
    X, Y = random(2, 8, 64), random(2, 64, 5)
    out = torch.empty(2, 8, 5)
    for product in (matmul(X, Y), matmul(X, Y, out=out), out):
        assert product.dtype == torch.float32
        assert close(product, X.double() @ Y.double(), 1e-7)
    assert not medium.rounded


def test_a_low_rank_update(medium: RoundedProducts) -> None:
    A, B = random(4, 64), random(50, 4)
    assert close(LowRank(A, B).delta(), B.double() @ A.double(), 1e-7)
    mid, down = random(4, 4, 3, 3), random(4, 40, 1, 1)
    expected = torch.einsum("pqhw,qc->pchw", mid.double(), down[:, :, 0, 0].double())
    assert close(fold_tucker(down, mid), expected, 1e-7)
    assert not medium.rounded


@pytest.mark.parametrize("size", [60, 300])
def test_low_rank_approximations(medium: RoundedProducts, size: int) -> None:
    A, B = random(8, size), random(size, 8)
    D = B.double() @ A.double()
    for A_k, B_k in (truncated_svd(A, B, 3), best_rank_k(D.float(), 3)):
        assert A_k.dtype == B_k.dtype == torch.float32
        assert close(B_k.double() @ A_k.double(), best(D, 3), 1e-5)
    assert not medium.rounded
