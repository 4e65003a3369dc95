"""Factors in pieces and loaded at once, and their Gram matrices."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.core.merge import factors, gram
from legomole.core.merge.engine import merge
from legomole.core.merge.factors import FileFactors, InMemoryFactors
from legomole.core.merge.methods import METHODS
from legomole.core.merge.rank import Rank

CPU = torch.device("cpu")


def parts(
    modules: int, ranks: Sequence[int], *dtypes: torch.dtype, d_in: int = 40, d_out: int = 30
) -> list[list[LowRank]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [
            LowRank(
                torch.randn(rank, d_in, generator=generator).to(dtype),
                torch.randn(d_out, rank, generator=generator).to(dtype),
            )
            for rank, dtype in zip(ranks, dtypes, strict=True)
        ]
        for _ in range(modules)
    ]


def expected(rows: Sequence[Sequence[LowRank]]) -> tuple[torch.Tensor, torch.Tensor]:
    A = torch.stack([torch.cat([part.A.float() for part in row]) for row in rows])
    return A, torch.stack([torch.cat([part.B.float() for part in row], 1) for row in rows])


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("modules_at_once", [1, 2, 5, 100])
def test_pieces_are_the_whole_cut_up(
    monkeypatch: pytest.MonkeyPatch, modules_at_once: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    monkeypatch.setattr(factors, "_PIECE", modules_at_once * 5 * 40)
    rows = parts(5, (2, 3), *dtypes)
    A, B = expected(rows)
    for some in (FileFactors(rows, CPU), InMemoryFactors(A, B)):
        assert some.shape == (5, 5, 40, 30)
        seen: list[int] = []
        for at, A_at, B_at in some.pieces():
            seen += range(5)[at]
            assert at.stop - at.start <= modules_at_once
            assert torch.equal(A_at, A[at])
            assert torch.equal(B_at, B[at])
        assert seen == [0, 1, 2, 3, 4]
        assert all(map(torch.equal, some.whole, (A, B)))
        assert all(map(torch.equal, some.only([3, 1]).whole, (A[[3, 1]], B[[3, 1]])))


def test_pieces_use_the_same_memory_again_and_read_nothing_twice_once_the_whole_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factors, "_PIECE", 1)
    some = FileFactors(parts(3, (2,), torch.float16), CPU)
    assert len({A.data_ptr() for _, A, _ in some.pieces()}) == 1
    A = some.whole[0]
    assert [piece.data_ptr() for _, piece, _ in some.pieces()] == [A[m].data_ptr() for m in range(3)]


def test_another_device_gets_everything_at_once_and_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_PIECE", 1)
    some = FileFactors(parts(3, (2,), torch.float16), torch.device("meta"))
    ((at, A, B),) = some.pieces()
    assert (at, A.device.type, A.shape, B.shape) == (slice(0, 3), "meta", (3, 2, 40), (3, 30, 2))
    ((_, again, _),) = some.pieces()
    assert again._base is A._base is some.whole[0]


@pytest.mark.parametrize(
    ("dtypes", "short"),
    [
        ((torch.float16, torch.bfloat16), True),
        ((torch.float16, torch.float8_e4m3fn), True),
        ((torch.float16, torch.float32), False),
    ],
)
def test_short_means_at_most_16_bits(dtypes: tuple[torch.dtype, ...], short: bool) -> None:
    assert FileFactors(parts(2, (2, 3), *dtypes), CPU).short is short


class TestProducts:
    """Products in float32 have its rounding errors, products in float64 do not: the error tells which were used."""

    def off(self, rows: Sequence[Sequence[LowRank]]) -> list[float]:
        """For each module the largest error, relative to the units' sizes."""
        found: list[float] = []
        A, B = (x.double() for x in expected(rows))
        G_A, G_B = gram.products(FileFactors(rows, CPU))
        for m in range(len(rows)):
            errors = []
            for G, X in ((G_A[m], A[m]), (G_B[m], B[m].mT)):
                size = X.norm(dim=1).clamp_min(1e-300)
                errors.append(float(((G - X @ X.mT).abs() / (size[:, None] * size)).max()))
            found.append(max(errors))
        return found

    def test_of_32_bits_are_float64(self) -> None:
        assert max(self.off(parts(3, (2, 3), torch.float16, torch.float32))) < 1e-15

    def test_of_16_bits_are_float32(self) -> None:
        errors = self.off(parts(3, (4, 4), torch.float16, torch.bfloat16, d_in=900, d_out=700))
        assert all(1e-9 < error < 2e-6 for error in errors)

    def test_are_float64_where_a_unit_is_nearly_in_the_span_of_others(self) -> None:
        rows = parts(3, (4, 4), torch.float16, torch.float16, d_in=900, d_out=700)
        rows[1][1].A[0] = rows[1][0].A[2] + 2 * rows[1][0].A[3]  # rounded in float16: a sine of 2^-12 or so
        first, middle, last = self.off(rows)
        assert middle < 1e-15 < 1e-9 < min(first, last)

    @pytest.mark.parametrize("size", [0.0, 1e-25, 1e30])
    def test_are_float64_where_float32_runs_out(self, size: float) -> None:
        rows = parts(2, (4,), torch.bfloat16)
        rows[0][0].B[:, 1] *= size
        assert self.off(rows)[0] < 1e-15

    def test_are_float64_where_matrix_products_are_allowed_to_be_inexact(self) -> None:
        rows = parts(1, (4,), torch.float16, d_in=900)
        torch.set_float32_matmul_precision("medium")
        try:
            assert self.off(rows)[0] < 1e-15
        finally:
            torch.set_float32_matmul_precision("highest")
        assert self.off(rows)[0] > 1e-9

    @pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch knows one setting for all")
    def test_are_float64_where_one_backend_is_allowed_to_be_inexact(self) -> None:
        code = """
import torch
from legomole.core.merge import gram
from legomole.core.merge.factors import FileFactors
from legomole.core.lowrank import LowRank

torch.backends.mkldnn.matmul.fp32_precision = "bf16"
A, B = torch.randn(4, 900).half(), torch.randn(900, 4).half()
G_A, G_B = gram.products(FileFactors([[LowRank(A, B)]], torch.device("cpu")))
torch.testing.assert_close(G_A[0], A.double() @ A.double().T, rtol=1e-13, atol=1e-10)
torch.testing.assert_close(G_B[0], B.double().T @ B.double(), rtol=1e-13, atol=1e-10)
"""
        # in another process, because torch remembers the setting
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_nan_reaches_the_products(self) -> None:
        rows = parts(2, (4,), torch.float16)
        rows[1][0].A[2, 3] = torch.nan
        G_A, G_B = gram.products(FileFactors(rows, CPU))
        assert torch.isfinite(G_A[0]).all()
        assert torch.isnan(G_A[1, 2]).all()
        assert torch.isfinite(G_B).all()


@pytest.mark.parametrize("method", ["lego", "svd", "knots"])
def test_a_merge_of_16_bits_differs_from_the_exact_one_by_less_than_its_file_rounds(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """LoRAs like trained ones: the directions of B fade to a tenth."""
    fade = torch.logspace(0, -1, 8)
    adapters = [
        Adapter(
            {
                f"layer{m}": LowRank(row[i].A.half(), (row[i].B * fade @ row[i].A[:, :8]).half())
                for m, row in enumerate(parts(3, (8, 8), torch.float32, torch.float32, d_in=300, d_out=200))
            }
        )
        for i in range(2)
    ]

    def merged() -> list[LowRank]:
        return list(merge(adapters, METHODS[method](Rank(8)), dtype=torch.float32).adapter.modules.values())

    fast = merged()
    monkeypatch.setattr(gram, "float32_is_exact", lambda device: False)
    off: list[float] = []
    for one, other in zip(fast, merged(), strict=True):
        exact = other.B.double() @ other.A.double()
        off.append(float((one.B.double() @ one.A.double() - exact).norm() / exact.norm()))
    assert 0 < max(off) < 2**-12  # a module whose units are nearly dependent is multiplied in float64 either way
