"""DARE: deterministic masks, expectation, PEFT's definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

from legomole.core.merge.methods.dare import Dare
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.pool import Pool
from legomole.core.merge.rank import Rank
from peft.utils import merge_utils

from ..pools import close, deltas, make_pool, product, random_pool, total


def full(pool: Pool) -> Rank:
    return Rank(min(pool.A.shape[2], pool.B.shape[1]))


def test_density_one_is_the_svd_of_the_sum():
    pool = random_pool((3, 2), weights=[0.7, -1.5], scales=[0.5, 2.0])
    assert close(product(Dare(Rank(3), density=1.0)(pool)), product(SVD(Rank(3))(pool)), 1e-4)


def test_entries_are_dropped_or_rescaled_never_changed_otherwise():
    # P = 8 units in a 6 x 7 matrix: rank 6 holds any result, so the masks can be read off it
    pool = random_pool((8,), d_in=7, d_out=6, batch=2)
    ratio = product(Dare(full(pool), density=0.25)(pool)) / total(pool)
    dropped = ratio.abs() < 1e-3
    assert torch.allclose(ratio[~dropped], torch.tensor(4.0).double(), atol=1e-2)
    assert 0 < int(dropped.sum()) < dropped.numel()
    assert not torch.equal(dropped[0], dropped[1])  # every module its own mask


def test_the_expectation_is_the_sum():
    pool = random_pool((8, 8), d_in=7, d_out=6, batch=1, weights=[1.0, -0.5])
    draws = 900
    mean = sum(product(Dare(full(pool), seed=seed)(pool)) for seed in range(draws)) / draws
    # at density 1/2 an entry is 0 or doubled: standard deviation |delta|, after 900 draws |delta| / 30
    spread = deltas(pool).square().sum(1).sqrt() / draws**0.5
    off = (mean - total(pool)) / spread
    assert float(off.abs().max()) < 4.5
    assert float(off.square().mean()) == pytest.approx(1, abs=0.7)  # 42 entries: standard deviation 0.22


def test_the_dense_result_is_pefts_for_the_same_mask(monkeypatch):
    pool = random_pool((8, 8), d_in=7, d_out=6, batch=1, weights=[0.7, -1.5], scales=[0.5, 2.0])
    method = Dare(full(pool), density=0.3, seed=5)
    parts = [delta / weight for delta, weight in zip(deltas(pool)[0], (0.7, -1.5), strict=True)]
    masks = iter([method._mask(part, f"m0/{i}").double() for i, part in enumerate(parts)])
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(masks))
    expected = merge_utils.dare_linear(parts, torch.tensor([0.7, -1.5], dtype=torch.float64), 0.3)
    assert close(product(method(pool))[0], expected, 1e-4)


def test_the_seed_decides_and_nothing_drawn_before():
    pool = random_pool((3, 2))
    first = product(Dare(Rank(3))(pool))
    torch.manual_seed(123)
    assert torch.equal(product(Dare(Rank(3))(pool)), first)
    assert not close(product(Dare(Rank(3), seed=1)(pool)), first, 1e-2)


def test_neither_order_nor_company_of_modules_matters():
    one, two = random_pool((3, 2), batch=1, seed=1), random_pool((3, 2), batch=1, seed=2)
    both = make_pool(
        [torch.cat([two.A[:, s], one.A[:, s]]) for s in (slice(0, 3), slice(3, 5))],
        [torch.cat([two.B[..., s], one.B[..., s]]) for s in (slice(0, 3), slice(3, 5))],
        names=["two", "one"],
    )
    together = product(Dare(Rank(3))(both))
    assert torch.equal(product(Dare(Rank(3))(replace(one, names=("one",))))[0], together[1])
    assert torch.equal(product(Dare(Rank(3))(replace(two, names=("two",))))[0], together[0])
