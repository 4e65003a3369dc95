"""Rank: what users may write, and the k it means for a pool."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.errors import MergeError
from legomole.core.merge.rank import Rank

from .pools import best, make_pool, random_pool, total


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16", Rank(16)),
        (16, Rank(16)),
        (" 16 ", Rank(16)),
        ("1.5x", Rank(1.5, "x")),
        ("2 x", Rank(2, "x")),
        ("95%", Rank(95, "%")),
        ("99.5%", Rank(99.5, "%")),
        ("100%", Rank(100, "%")),
        ("auto", Rank(95, "%")),
        (Rank(3), Rank(3)),
    ],
)
def test_parse(text, expected):
    assert Rank.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["0", "-4", "1.5", "0x", "-1x", "0%", "101%", "", "x", "%", "many", "1e3", "nan", 0, -1]
)
def test_parse_refuses_with_a_remedy(text):
    with pytest.raises(MergeError, match=r"not a rank[\s\S]*to do: .*whole number like 16"):
        Rank.parse(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    for unit in ("", "x", "%"):
        with pytest.raises(MergeError):
            Rank(value, unit)


@pytest.mark.parametrize("text", ["16", "1.5x", "95%", "99.5%"])
def test_text_and_back(text):
    assert str(Rank.parse(text)) == text


def test_a_number_means_itself_within_the_pool():
    pool = random_pool((3, 2), batch=2)
    assert Rank(4).resolve(pool).tolist() == [4, 4]
    assert Rank(99).resolve(pool).tolist() == [5, 5]


@pytest.mark.parametrize(
    ("factor", "k"),
    # mean rank 5 / 2: 1x = 2.5 rounds to even, 1.5x = 3.75, 0.01x at least 1, 9x at most P
    [(1, 2), (1.5, 4), (2, 5), (0.01, 1), (9, 5)],
)
def test_a_multiple_counts_from_the_mean_rank(factor, k):
    assert Rank(factor, "x").resolve(random_pool((3, 2), batch=2)).tolist() == [k, k]


def test_a_share_of_energy_by_hand():
    # singular values 3, 2, 1: energies 9, 4, 1 of 14, cumulated 64.3 %, 92.9 %, 100 %
    pool = make_pool([torch.eye(3)[None]], [torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]])
    assert [int(Rank(p, "%").resolve(pool)) for p in (1, 64, 65, 92, 93, 99, 100)] == [1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(("S", "percent"), [((4, 3), 64), ((3, 1), 90), ((2, 1), 80), ((7, 1), 98), ((1, 1), 50)])
def test_a_share_reached_exactly_counts_despite_rounding(S, percent):
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        # turned units round differently, the share stays S_1^2 / (S_1^2 + S_2^2)
        turn = torch.linalg.qr(torch.randn(2, 2, generator=g, dtype=torch.float64)).Q
        pool = random_pool((2,), batch=1)
        G_A = (turn * torch.tensor(S).double().square() @ turn.mT)[None]
        pool.values.products = G_A, torch.eye(2).double()[None]
        assert int(Rank(percent, "%").resolve(pool)) == 1


@given(st.integers(0, 10_000), st.floats(1, 100))
@settings(max_examples=30, deadline=None)
def test_a_share_of_energy_is_kept_and_one_less_would_not_keep_it(seed, percent):
    pool = random_pool((3, 2), weights=[1.0, -0.5], seed=seed)
    D = total(pool)
    for m, k in enumerate(Rank(percent, "%").resolve(pool).tolist()):
        energy = D[m].square().sum()
        assert best(D[m], k).square().sum() >= (percent / 100 - 1e-9) * energy
        assert k == 1 or best(D[m], k - 1).square().sum() < (percent / 100 + 1e-9) * energy


def test_all_the_energy_needs_no_more_than_the_true_rank():
    # the same adapter twice: P = 4, but the sum has rank 2
    one = random_pool((2,), batch=1)
    pool = make_pool([one.A, one.A], [one.B, one.B])
    assert int(Rank(100, "%").resolve(pool)) == 2


def test_a_zero_module_gets_rank_one():
    pool = make_pool([torch.zeros(1, 3, 4)], [torch.zeros(1, 4, 3)])
    assert int(Rank(95, "%").resolve(pool)) == 1
