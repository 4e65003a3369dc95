"""Sketches of second moments, against eigenvectors and dense matrices."""

from __future__ import annotations

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.merge.statistics import ModuleStatistics
from legomole.core.train.sketches import ProjectedMoments, RangeSketch, reduce_basis
from torch import Tensor


def inputs(d: int, strong: int, *, n: int = 400, weak: float = 0.01, seed: int = 0) -> Tensor:
    """Inputs ``(2, n / 2, d)`` with `strong` directions of size 1 to 2 and noise in all others."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(d, strong, generator=g)).Q
    X = torch.randn(n, strong, generator=g) * torch.linspace(1, 2, strong) @ directions.T
    return (X + weak * torch.randn(n, d, generator=g)).view(2, n // 2, d)


def test_the_basis_holds_the_leading_eigenvectors():
    X = inputs(40, 6)
    sketch = RangeSketch(6, seed=3)
    for part in X:
        sketch.add(part)
    Q = sketch.basis().double()
    assert Q.shape == (6, 40)
    torch.testing.assert_close(Q @ Q.T, torch.eye(6).double())
    C = X.flatten(0, 1).double()
    leading = torch.linalg.eigh(C.T @ C).eigenvectors[:, -6:]
    torch.testing.assert_close(Q.T @ Q, leading @ leading.T, atol=2e-3, rtol=0)


def test_a_kind_of_greater_weight_decides_which_directions_stay():
    first, second = inputs(30, 4, seed=1), inputs(30, 4, seed=2)
    kept: list[float] = []
    for weight in (0.01, 100.0):
        sketch = RangeSketch(4, seed=0)
        sketch.add(first)
        sketch.weight = weight
        sketch.add(second)
        projected = second.flatten(0, 1) @ sketch.basis().float().T
        kept.append(float(projected.square().sum() / second.square().sum()))
    assert kept[0] < 0.5
    assert kept[1] > 0.99


def test_the_test_matrix_depends_only_on_the_seed():
    X = inputs(30, 4)
    sketches = [RangeSketch(3, seed) for seed in (1, 1, 2)]
    for sketch in sketches:
        sketch.add(X)
    first, again, other = (sketch.basis() for sketch in sketches)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_inputs_of_few_directions_still_give_an_orthonormal_basis():
    sketch = RangeSketch(8, seed=0)
    sketch.add(inputs(30, 3, n=4, weak=0.0))
    Q = sketch.basis().double()
    torch.testing.assert_close(Q @ Q.T, torch.eye(8).double())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(value):
    sketch = RangeSketch(2, seed=0)
    sketch.add(torch.full((3, 8), value))
    with pytest.raises(MergeError, match="not finite"):
        sketch.basis()


def test_a_layer_without_inputs_is_refused():
    with pytest.raises(MergeError, match=r"found: +none"):
        RangeSketch(2, seed=0).basis()
    with pytest.raises(MergeError, match="had no input"):
        _ = ProjectedMoments(torch.eye(2, 4)).value


def test_projected_moments_by_hand():
    # Q keeps the first two of four inputs; the mean squares of the others are 3 and 5
    X = torch.tensor([[1.0, 2.0, 1.0, -1.0], [3.0, 0.0, 5**0.5, 3.0]])
    moments = ProjectedMoments(torch.eye(2, 4))
    moments.add(X[:1])
    moments.add(X[1:])
    expected = torch.tensor([[5.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 4.0]])
    torch.testing.assert_close(moments.value, expected)


def test_trace_and_moments_inside_the_basis_are_exact():
    X = inputs(30, 5, weak=0.3)
    sketch = RangeSketch(4, seed=0)
    sketch.add(X)
    statistics = ModuleStatistics(base=torch.eye(5), basis=sketch.basis())
    space = statistics.space(torch.eye(30, dtype=torch.float64))
    assert space.Q is not None
    moments = ProjectedMoments(space.Q.float())
    moments.add(X)
    flat = X.flatten(0, 1).double()
    C, approximation = flat.T @ flat / len(flat), space.gram(moments.value.double())
    torch.testing.assert_close(approximation.trace(), C.trace(), rtol=1e-5, atol=0)
    torch.testing.assert_close(space.Q @ approximation @ space.Q.T, space.Q @ C @ space.Q.T, rtol=1e-5, atol=1e-5)


def test_the_largest_directions_of_all_kinds_together_are_kept():
    # two kinds in a basis of three of five inputs; 2 a + b is diag(9, 2, 7) inside, so the first and the third stay
    a, b = torch.diag(torch.tensor([4.0, 1.0, 1.0, 0.5])), torch.diag(torch.tensor([1.0, 0.0, 5.0, 0.25]))
    basis, kept = reduce_basis(torch.eye(3, 5), {"a": a, "b": b}, {"a": 2.0, "b": 1.0}, 2)
    assert torch.equal(basis.abs(), torch.eye(5)[[2, 0]].half())
    # the rest: the second direction and two of the value outside, over three directions
    torch.testing.assert_close(kept["a"], torch.diag(torch.tensor([1.0, 4.0, (1.0 + 2 * 0.5) / 3])))
    torch.testing.assert_close(kept["b"], torch.diag(torch.tensor([5.0, 1.0, (0.0 + 2 * 0.25) / 3])))
