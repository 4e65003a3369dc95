"""Predicted accounts, against dense matrices and by hand."""

from __future__ import annotations

import json

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.core.merge.account import CHOSEN, Effect, account_batch, batch_inner, predict
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.ssr import SSR
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from torch import Tensor

from .pools import deltas, make_pool, product, random_pool, total


def moment(seed: int, d: int = 12) -> Tensor:
    X = torch.randn(30, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return X.mT @ X / len(X)


FULL = ModuleStatistics({0: moment(1), 1: moment(2)}, {(0, 1): moment(3)}, moment(4))
Q = torch.linalg.qr(moment(5)).Q[:4]
LIGHT = ModuleStatistics(
    {i: torch.block_diag(Q @ C @ Q.mT, torch.tensor([[0.5 + i]])) for i, C in FULL.own.items()},
    {(0, 1): torch.block_diag(Q @ moment(3) @ Q.mT, torch.tensor([[2.0]]))},
    torch.block_diag(Q @ moment(4) @ Q.mT, torch.tensor([[3.0]])),
    Q,
)


def dense(moments: ModuleStatistics, C: Tensor) -> Tensor:
    if moments.basis is None:
        return C
    return Q.mT @ C[:-1, :-1] @ Q + C[-1, -1] * (torch.eye(12) - Q.mT @ Q)


@pytest.mark.parametrize("moments", [FULL, LIGHT], ids=["full", "light"])
def test_squared_errors_equal_those_of_dense_matrices(moments):
    pool = random_pool((3, 2), weights=[0.7, -1.5], scales=[0.5, 2.0], batch=1)
    statistics = Statistics({"m0": moments})
    rank = Rank(2)
    merged = Calibrated(rank, statistics)(pool)
    (account,) = account_batch(pool, merged, rank, statistics)
    matrices = {
        "sum": total(pool),
        "svd": product(SVD(rank)(pool)),
        "lego": product(Lego(rank)(pool)),
        "lego calibrated": product(Lego(rank, statistics=statistics)(pool)),
        "ssr": product(SSR(rank, statistics)(pool)),
        CHOSEN: product(merged),
    }
    assert set(account) == set(matrices)
    D = deltas(pool)[0]
    wanted = {(0,): (D[0], moments.own[0]), (1,): (D[1], moments.own[1]), (0, 1): (1.2 * D.sum(0), moments.joint[0, 1])}
    for name, (W,) in matrices.items():
        for kind, (target, C) in wanted.items():
            E, M = W - target, dense(moments, C)
            expected = float((E @ M * E).sum() / (target @ M * target).sum())
            assert account[name][kind] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        M = dense(moments, moments.base)
        expected = float((W @ M * W).sum() / (D.sum(0) @ M * D.sum(0)).sum())
        assert account[name][()] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_by_hand():
    # two LoRAs on inputs of their own, of which prompts for LoRA 1 use the first: there the sum is LoRA 1
    A = [torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])]
    B = [torch.tensor([[[3.0], [0.0]]]), torch.tensor([[[0.0], [4.0]]])]
    own = {0: torch.diag(torch.tensor([1.0, 0.0])), 1: torch.diag(torch.tensor([9.0, 1.0]))}
    pool = make_pool(A, B)
    statistics = Statistics({"m0": ModuleStatistics(own, {(0, 1): torch.eye(2)}, torch.eye(2))})
    (account,) = account_batch(pool, SVD(Rank(1))(pool), Rank(2), statistics)
    assert account["sum"][(0,)] == pytest.approx(0, abs=1e-9)
    assert account["sum"][(1,)] == pytest.approx(81 / 16)  # prompts for LoRA 2 wake LoRA 1: 9 * 3^2 against 4^2
    assert account["sum"][0, 1] == pytest.approx((0.2 / 1.2) ** 2)
    assert account["sum"][()] == pytest.approx(1)
    assert account[CHOSEN][()] == pytest.approx(16 / 25)  # only the larger of the two stays
    rows = {row.method: row for row in predict([account], 2)}
    assert rows["sum"].alone == pytest.approx((0, 9 / 4), abs=1e-6)
    assert rows["sum"].joint == pytest.approx(0.2 / 1.2)
    assert rows[CHOSEN].base == pytest.approx(4 / 5)


def test_predictions_are_root_mean_squares_over_modules_that_want_something():
    accounts = [{"sum": {(0,): 0.04, (): 1.0}}, {"sum": {(0,): 0.36, (0, 1): 0.5, (0, 2): 0.3}}]
    (row,) = predict(accounts, 3)
    assert row.alone == (pytest.approx(0.2**0.5), None, None)
    assert row.joint == pytest.approx(0.4**0.5)
    assert row.base == pytest.approx(1.0)
    assert predict([], 3) == ()


def loras() -> list[Adapter]:
    g = torch.Generator().manual_seed(0)
    return [
        Adapter({n: LowRank(torch.randn(3, 12, generator=g), torch.randn(10, 3, generator=g)) for n in "ab"})
        for _ in range(2)
    ]


def test_a_merge_with_statistics_reports_its_predictions():
    statistics = Statistics({"a": FULL})
    for method, given in ((Lego(3, statistics=statistics), None), (SVD(3), statistics)):
        report = merge(loras(), method, statistics=given).report
        assert [row.method for row in report.predicted] == ["sum", "svd", "lego", "lego calibrated", "ssr", CHOSEN]
        rows = {row.method: row for row in report.predicted}
        same = rows["svd" if given else "lego calibrated"]
        assert (rows[CHOSEN].alone, rows[CHOSEN].base) == (pytest.approx(same.alone), pytest.approx(same.base))
        assert rows["lego calibrated"].base < rows["lego"].base
        text = report.text()
        assert "predicted errors" in text
        assert f"    {'svd':16}" in text
        assert json.loads(json.dumps(report.to_dict()))["predicted"][0]["method"] == "sum"
    plain = merge(loras(), SVD(3)).report
    assert plain.predicted == ()
    assert "predicted" not in plain.text()


@pytest.mark.parametrize("moments", [FULL, LIGHT], ids=["full", "light"])
def test_inner_products_equal_those_of_dense_matrices(moments):
    pool = random_pool((3, 2), weights=[0.7, -1.5], scales=[0.5, 2.0], batch=2)
    tables = batch_inner(pool, Statistics({"m1": moments}))
    assert list(tables) == ["m1"]
    D = deltas(pool)[1]
    kinds = {(0,): moments.own[0], (1,): moments.own[1], (0, 1): moments.joint[0, 1], (): moments.base}
    assert set(tables["m1"]) == set(kinds)
    for kind, C in kinds.items():
        M = dense(moments, C)
        expected = torch.stack([torch.stack([(D[i] @ M * D[j]).sum() for j in range(2)]) for i in range(2)])
        torch.testing.assert_close(tables["m1"][kind], expected, rtol=1e-5, atol=1e-6)


def test_an_effect_is_a_parabola_in_the_strength():
    """Of ``W = 2 wanted + v`` with ``|v| = |wanted|`` at a right angle: ``|s W - wanted|^2 = (2 s - 1)^2 + s^2``."""
    effect = Effect(5.0, 2.0, 1.0)
    assert [effect.error(s) for s in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.25, 2])
    assert Effect(5.0, 0.0, 0.0).error(2.0) == pytest.approx(20)
