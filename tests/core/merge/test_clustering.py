"""Clustering from Gram matrices, against scikit-learn and by hand."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.merge.clustering import kmeans, lloyd, plus_plus, renumber, squared_distances, ward
from sklearn.cluster import AgglomerativeClustering, KMeans

seeds = st.integers(0, 10_000)


def points(M: int, P: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(M, P, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(X: torch.Tensor) -> torch.Tensor:
    return X @ X.mT


def counts(M: int, k: int) -> torch.Tensor:
    return torch.full((M,), k)


def inertia(X: torch.Tensor, labels: torch.Tensor) -> float:
    """By the definition: summed squared distance to the mean of the own cluster."""
    return sum(float((X[labels == c] - X[labels == c].mean(0)).square().sum()) for c in labels.unique().tolist())


class TestWard:
    @given(seeds, st.integers(2, 14), st.data())
    @settings(max_examples=40, deadline=None)
    def test_equals_scikit_learns_tree_cut_at_k(self, seed, P, data):
        X = points(3, P, 4, seed)
        k = torch.tensor([data.draw(st.integers(1, P)) for _ in range(3)])
        labels = ward(gram_of(X), k)
        for m in range(3):
            expected = AgglomerativeClustering(int(k[m]), linkage="ward").fit(X[m].numpy()).labels_
            assert torch.equal(labels[m], renumber(torch.tensor(expected, dtype=torch.long)[None])[0])

    def test_k_equal_to_the_number_of_points_keeps_all_apart(self):
        assert ward(gram_of(points(2, 5, 3)), counts(2, 5)).tolist() == [list(range(5))] * 2

    def test_by_hand(self):
        # on a line: 0, 1, 10, 12, 100. Two clusters: {0, 1, 10, 12} and {100}; three: {0, 1}, {10, 12}, {100}
        X = torch.tensor([0.0, 1.0, 10.0, 12.0, 100.0], dtype=torch.float64)[None, :, None].repeat(2, 1, 1)
        assert ward(gram_of(X), torch.tensor([2, 3])).tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 2]]

    def test_coinciding_points_still_give_k_clusters(self):
        labels = ward(torch.ones(1, 6, 6, dtype=torch.float64), counts(1, 4))
        assert sorted(labels.unique().tolist()) == [0, 1, 2, 3]


class TestLloyd:
    @given(seeds, st.integers(4, 16), st.integers(2, 4))
    @settings(max_examples=30, deadline=None)
    def test_same_inertia_as_scikit_learn_from_the_same_start(self, seed, P, k):
        X = points(1, P, 3, seed)
        start = torch.arange(P) % k
        centres = torch.stack([X[0, start == c].mean(0) for c in range(k)]).numpy()
        theirs = KMeans(k, init=centres, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(X[0].numpy())
        labels, found = lloyd(gram_of(X), start[None], counts(1, k))
        assert float(found) == pytest.approx(inertia(X[0], labels[0]), rel=1e-9, abs=1e-9)
        if len(set(theirs.labels_)) == k and len(labels.unique()) == k:
            # both may refill an empty cluster on the way, after which the paths may part
            assert float(found) <= theirs.inertia_ * (1 + 1e-6) or _refilled(X[0], start, k)

    def test_a_tie_moves_no_point(self):
        # the middle point is as far from either centre of {-1, 0} (-0.5) and {0.5, ..} as it can be
        X = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)[None, :, None]
        start = torch.tensor([[0, 0, 1]])  # centres -0.5 and 0.5: the point 0 is 0.5 from each
        labels, found = lloyd(gram_of(X), start, counts(1, 2))
        assert labels.tolist() == start.tolist()
        assert float(found) == pytest.approx(0.5)

    def test_an_empty_cluster_takes_the_farthest_point(self):
        # all start in cluster 0 with mean 4; 12 is farthest and founds cluster 1
        X = torch.tensor([0.0, 1.0, 3.0, 12.0], dtype=torch.float64)[None, :, None]
        labels, found = lloyd(gram_of(X), torch.zeros(1, 4, dtype=torch.long), counts(1, 2))
        assert labels.tolist() == [[0, 0, 0, 1]]
        # mean 4/3: 16/9 + 1/9 + 25/9 = 42/9
        assert float(found) == pytest.approx(42 / 9)

    def test_every_cluster_has_a_member_even_where_points_coincide(self):
        labels, found = kmeans(torch.ones(2, 5, 5, dtype=torch.float64), torch.tensor([5, 3]), starts=3)
        assert [len(row.unique()) for row in labels] == [5, 3]
        assert found.tolist() == [0, 0]


def _refilled(X: torch.Tensor, start: torch.Tensor, k: int) -> bool:
    """Whether plain Lloyd from this start ever empties a cluster."""
    labels = start
    for _ in range(100):
        centres = torch.stack([X[labels == c].mean(0) for c in range(k)])
        nearest = torch.cdist(X, centres).argmin(1)
        if len(nearest.unique()) < k:
            return True
        if torch.equal(nearest, labels):
            return False
        labels = nearest
    return False


class TestKMeans:
    def test_at_or_below_scikit_learn_over_a_whole_adapter(self):
        # units as in three LoRAs that share some: 12 modules, 3 x 8 units in 64 dimensions
        M, k = 12, 8
        shared = points(M, 8, 64, 1).repeat(1, 3, 1)
        X = shared + 0.7 * points(M, 24, 64, 2)
        _, ours = kmeans(gram_of(X), counts(M, k))
        theirs = sum(KMeans(k, n_init=10, random_state=m).fit(X[m].numpy()).inertia_ for m in range(M))
        assert float(ours.sum()) <= theirs * (1 + 1e-9)

    def test_at_or_below_scikit_learn_on_unrelated_units(self):
        M, k = 12, 8
        X = points(M, 24, 64, 3) * torch.linspace(0.3, 2, 24, dtype=torch.float64)[:, None]
        _, ours = kmeans(gram_of(X), counts(M, k))
        theirs = sum(KMeans(k, n_init=10, random_state=m).fit(X[m].numpy()).inertia_ for m in range(M))
        assert float(ours.sum()) <= theirs * (1 + 1e-9)

    @given(seeds, st.integers(2, 10), st.data())
    @settings(max_examples=30, deadline=None)
    def test_labels_are_a_numbered_partition_and_inertia_is_theirs(self, seed, P, data):
        X = points(2, P, 3, seed)
        k = torch.tensor([data.draw(st.integers(1, P)) for _ in range(2)])
        labels, found = kmeans(gram_of(X), k, starts=2, seed=seed)
        for m in range(2):
            seen = list(dict.fromkeys(labels[m].tolist()))
            assert seen == list(range(int(k[m])))
            assert float(found[m]) == pytest.approx(inertia(X[m], labels[m]), rel=1e-8, abs=1e-9)

    def test_more_starts_never_hurt(self):
        G = gram_of(points(30, 20, 3, 5))
        results = [kmeans(G, counts(30, 6), starts=n)[1] for n in (0, 1, 8)]
        assert (results[1] <= results[0]).all()
        assert (results[2] <= results[1]).all()
        assert (results[2] < results[0]).any()

    def test_a_module_alone_is_clustered_as_in_company(self):
        G = gram_of(points(4, 12, 5, 6))
        k = torch.tensor([3, 4, 5, 11])
        together = kmeans(G, k, starts=4)[0]
        for m in range(4):
            assert torch.equal(kmeans(G[m : m + 1], k[m : m + 1], starts=4)[0][0], together[m])

    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_the_order_of_the_points_does_not_matter(self, seed):
        X = points(2, 12, 3, seed)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        k = counts(2, 4)
        plain, permuted = (kmeans(gram_of(x), k, starts=2)[0] for x in (X, X[:, order]))
        assert torch.equal(renumber(plain[:, order]), permuted)


class TestPlusPlus:
    def test_labels_are_those_of_the_nearest_drawn_centre(self):
        # three far groups: with k = 3 the squared distances make every draw hit a new group
        centres = torch.tensor([0.0, 1e6, -1e6], dtype=torch.float64)
        X = (centres.repeat_interleave(4) + torch.arange(12, dtype=torch.float64))[None, :, None]
        labels = plus_plus(gram_of(X), counts(1, 3), torch.Generator().manual_seed(0))
        assert renumber(labels).tolist() == [[0] * 4 + [1] * 4 + [2] * 4]

    def test_draws_with_probability_proportional_to_the_squared_distance(self):
        # points 0, 1, 3 on a line; first centre uniform. P(second = 3 | first = 0) = 9 / 10, and so on.
        # P(the pair {0, 1}) = 1/3 * 1/10 + 1/3 * 1/5 = 0.1; in the other pairs 0 and 1 or 0 and 3 are centres, and
        # 0 is alone or with 1: only the pair {0, 1} puts 1 and 3 together
        G = gram_of(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)[None, :, None])
        generator = torch.Generator().manual_seed(1)
        draws = torch.cat([plus_plus(G, counts(1, 2), generator) for _ in range(3000)])
        share = float((draws[:, 1] == draws[:, 2]).double().mean())
        assert share == pytest.approx(0.1, abs=0.02)  # standard deviation 0.0055

    def test_smaller_k_uses_fewer_centres(self):
        labels = plus_plus(gram_of(points(2, 9, 4)), torch.tensor([2, 6]), torch.Generator().manual_seed(0))
        assert set(labels[0].tolist()) == {0, 1}
        assert set(labels[1].tolist()) == set(range(6))

    def test_same_generator_same_draws(self):
        G = gram_of(points(3, 9, 4))
        a, b = (plus_plus(G, counts(3, 4), torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(a, b)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_renumber_keeps_the_partition_and_numbers_by_first_member(labels):
    old = torch.tensor([labels])
    new = renumber(old)[0].tolist()
    assert [labels.index(x) for x in labels] == [new.index(x) for x in new]
    assert list(dict.fromkeys(new)) == list(range(len(set(labels))))


def test_squared_distances_by_the_definition():
    X = points(2, 5, 3)
    assert torch.allclose(squared_distances(gram_of(X)), torch.cdist(X, X).square(), atol=1e-10)


def test_ward_where_most_points_lose_their_nearest():
    """A point near the middle is the nearest of most others until it is merged; each module has its own k."""
    X = torch.randn(3, 60, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    X[:, 0] *= 0.01
    k = torch.tensor([2, 5, 59])
    labels = ward(X @ X.mT, k)
    for m in range(3):
        expected = torch.from_numpy(AgglomerativeClustering(int(k[m]), linkage="ward").fit(X[m].numpy()).labels_)
        assert torch.equal(labels[m][:, None] == labels[m], expected[:, None] == expected)
