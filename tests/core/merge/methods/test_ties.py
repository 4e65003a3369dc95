"""TIES: by hand, against PEFT's functions, against PEFT's whole merge."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.errors import MergeError
from legomole.core.merge.methods.consensus import threshold, ties, trim
from legomole.core.merge.methods.dare import Dare
from legomole.core.merge.methods.knots import Knots
from legomole.core.merge.methods.ties import Ties
from legomole.core.merge.rank import Rank
from peft.utils import merge_utils

from ..pools import best, close, deltas, product, random_pool, total
from .oracle import peft_delta

elections = pytest.mark.parametrize("election", ["total", "frequency"])


def test_trim_by_hand():
    part = torch.tensor([[1.0, -5.0, 0.5], [3.0, -2.0, 0.0]])
    assert trim(part, threshold(part, 0.5)).tolist() == [[0.0, -5.0, 0.0], [3.0, -2.0, 0.0]]
    assert trim(part, threshold(part, 0.34)).tolist() == [[0.0, -5.0, 0.0], [3.0, 0.0, 0.0]]  # int(2.04) = 2
    assert trim(part, threshold(part, 0.01)).tolist() == [[0.0, -5.0, 0.0], [0.0, 0.0, 0.0]]  # one at least
    assert trim(part, threshold(part, 1)).tolist() == part.tolist()


def test_trim_keeps_all_equals_at_the_threshold():
    part = torch.tensor([1.0, -1.0, 1.0, 0.5])
    assert trim(part, threshold(part, 0.5)).tolist() == [1.0, -1.0, 1.0, 0.0]


def test_ties_by_hand():
    parts = [torch.tensor([3.0, 1.0, -1.0, 0.0]), torch.tensor([1.0, -2.0, 1.0, 0.0]), torch.tensor([-1.0, 4, 0, 0])]
    # sums 3, 3, 0 (a draw is positive), 0. Who agrees: {1, 2}, {1, 3}, {2}, nobody
    # weights 1, 2, 10: (3 + 2) / 2, (1 + 40) / 2, 2 / 1, 0
    assert ties(parts.__getitem__, [1, 2, 10], 1.0).tolist() == [2.5, 20.5, 2.0, 0.0]
    # frequency: signs sum to 1, 1, 0: the same winners here
    assert ties(parts.__getitem__, [1, 2, 10], 1.0, "frequency").tolist() == [2.5, 20.5, 2.0, 0.0]


def test_the_two_elections_differ_where_one_large_value_meets_two_small_ones():
    parts = [torch.tensor([5.0]), torch.tensor([-1.0]), torch.tensor([-2.0])]
    assert ties(parts.__getitem__, [1, 1, 1], 1.0, "total").tolist() == [5.0]
    assert ties(parts.__getitem__, [1, 1, 1], 1.0, "frequency").tolist() == [-1.5]


@elections
@given(seed=st.integers(0, 10_000), n=st.integers(1, 4), density=st.floats(0.1, 0.95))
@settings(max_examples=25, deadline=None)
def test_equals_peft_on_tensors(election, seed, n, density):
    g = torch.Generator().manual_seed(seed)
    parts = list(torch.randn(n, 7, 9, generator=g, dtype=torch.float64))
    weights = torch.randn(n, generator=g, dtype=torch.float64)
    expected = merge_utils.ties(parts, weights, density, election)
    assert torch.allclose(ties(parts.__getitem__, weights.tolist(), density, election), expected, atol=1e-12)


@elections
def test_equals_peft_ties_svd(election):
    pool = random_pool((3, 2, 4), weights=[0.7, -1.5, 2.0], scales=[0.5, 2.0, 1.0])
    theirs = peft_delta(pool, "ties_svd", svd_rank=4, density=0.4, majority_sign_method=election)
    merged = Ties(Rank(4), density=0.4, sign_election=election)(pool)
    assert merged.ranks.tolist() == [4] * 3
    assert close(product(merged), theirs, 1e-4)


def test_one_adapter_untrimmed_is_its_svd():
    pool = random_pool((4,), weights=[-2.0])
    assert close(product(Ties(Rank(2), density=1.0)(pool)), best(total(pool), 2), 1e-4)


@pytest.mark.parametrize("method", [Ties, Knots, Dare])
@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_the_density_is_checked(method, density):
    with pytest.raises(MergeError, match="density"):
        method(Rank(2), density=density)


def test_large_modules_take_the_randomized_path_to_the_same_result():
    pool = random_pool((4, 4), d_in=320, d_out=300, batch=1)
    dense = ties(deltas(pool)[0].__getitem__, [1, 1], 0.5)
    error = (dense - product(Ties(Rank(4))(pool))[0]).norm()
    assert error <= 1.001 * (dense - best(dense, 4)).norm()
