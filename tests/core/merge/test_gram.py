"""Gram-space algebra against torch.linalg on the dense matrices, clustering against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.merge import gram
from sklearn.cluster import AgglomerativeClustering, KMeans

from .pools import close

seeds = st.integers(0, 10_000)


def factors(M: int, P: int, d_in: int, d_out: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(M, P, d_in, generator=g, dtype=torch.float64)
    return A, torch.randn(M, d_out, P, generator=g, dtype=torch.float64)


def points(M: int, P: int, d: int, seed: int = 0) -> torch.Tensor:
    return factors(M, P, d, 1, seed)[0]


def gram_of(X: torch.Tensor) -> torch.Tensor:
    return X @ X.mT


def counts(M: int, k: int) -> torch.Tensor:
    return torch.full((M,), k)


def inertia(X: torch.Tensor, labels: torch.Tensor) -> float:
    """By the definition: summed squared distance to the mean of the own cluster."""
    return sum(float((X[labels == c] - X[labels == c].mean(0)).square().sum()) for c in labels.unique().tolist())


def check_svd(A: torch.Tensor, B: torch.Tensor, c: torch.Tensor, tolerance: float = 1e-7) -> None:
    """`gram.svd` against torch.linalg.svd: the values, the product, and both factors in balanced form."""
    D = B * c[:, None] @ A
    svd = gram.svd(A @ A.mT, B.mT @ B, c)
    left, right = B @ svd.R_B, svd.R_A @ A
    size = torch.linalg.matrix_norm(D).amax().clamp_min(1e-30)
    n = min(D.shape[1], D.shape[2], A.shape[1])
    values = torch.linalg.svdvals(D)
    assert torch.allclose(svd.S[:, :n], values[:, :n], rtol=0, atol=tolerance * float(size))
    assert float(svd.S[:, n:].abs().sum()) == 0
    assert close(left @ right, D, tolerance)
    for gramian in (left.mT @ left, right @ right.mT):
        assert torch.allclose(gramian, torch.diag_embed(svd.S), rtol=0, atol=tolerance * float(size))


class TestSVD:
    @given(seeds, st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
    @settings(max_examples=40, deadline=None)
    def test_equals_the_dense_svd(self, seed, P, d_in, d_out):
        A, B = factors(2, P, d_in, d_out, seed)
        c = torch.randn(2, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        check_svd(A, B, c, 1e-6)

    @pytest.mark.parametrize("spread", [1e2, 1e4])
    def test_ill_conditioned_factors(self, spread):
        A, B = factors(3, 8, 40, 30)
        slope = torch.logspace(0, -float(np.log10(spread)), 8, dtype=torch.float64)
        # neither orthogonal nor equal in size, and strongly correlated rows
        A = slope[:, None] * A + A[:, :1]
        check_svd(A, B * slope, torch.ones(3, 8, dtype=torch.float64))

    def test_duplicates_and_opposites_are_recognised(self):
        A, B = factors(1, 3, 20, 20)
        A, B = torch.cat([A, A, A], 1), torch.cat([B, B, B], 2)
        c = torch.tensor([[1.0] * 3 + [-1.0] * 3 + [0.5] * 3], dtype=torch.float64)
        check_svd(A, B, c)
        svd = gram.svd(A @ A.mT, B.mT @ B, c)
        assert int((svd.S > 0).sum()) == 3

    def test_exact_cancellation_leaves_noise_only(self):
        A, B = factors(1, 4, 20, 20)
        A, B = torch.cat([A, A], 1), torch.cat([B, B], 2)
        c = torch.tensor([[1.0] * 4 + [-1.0] * 4], dtype=torch.float64)
        svd = gram.svd(A @ A.mT, B.mT @ B, c)
        assert float(((B @ svd.R_B) @ (svd.R_A @ A)).norm()) < 1e-6 * float((B[..., :4] @ A[:, :4]).norm())

    def test_a_zero_module_beside_others_stays_zero_and_finite(self):
        A, B = factors(3, 4, 10, 10)
        B[1] = 0
        A[2] = 0
        svd = gram.svd(A @ A.mT, B.mT @ B, torch.ones(3, 4, dtype=torch.float64))
        assert not svd.S[1:].any()
        assert all(torch.isfinite(x).all() for x in (svd.S, svd.R_A, svd.R_B))
        assert close(((B @ svd.R_B) @ (svd.R_A @ A))[0], B[0] @ A[0], 1e-7)

    def test_a_module_alone_is_decomposed_as_in_company(self):
        A, B = factors(3, 6, 30, 20)
        A[1, 5] = A[1, 0] + A[1, 1]  # one direction less
        G_A, G_B, c = A @ A.mT, B.mT @ B, torch.ones(3, 6, dtype=torch.float64)
        together = gram.svd(G_A, G_B, c)
        for m in range(3):
            alone = gram.svd(G_A[m : m + 1], G_B[m : m + 1], c[m : m + 1])
            for ours, theirs in ((alone.S, together.S), (alone.R_A, together.R_A), (alone.R_B, together.R_B)):
                assert torch.allclose(ours[0], theirs[m], rtol=1e-9, atol=1e-9)
        check_svd(A, B, c)

    def test_by_hand(self):
        # B diag(c) A = [[3, 0], [0, -4]]: singular values 4, 3
        A = torch.eye(2, dtype=torch.float64)[None]
        B = torch.eye(2, dtype=torch.float64)[None]
        svd = gram.svd(A @ A.mT, B.mT @ B, torch.tensor([[3.0, -4.0]], dtype=torch.float64))
        assert torch.allclose(svd.S, torch.tensor([[4.0, 3.0]], dtype=torch.float64))
        # row 0 is sqrt(4) e_2 up to the sign both factors share
        assert torch.allclose(svd.R_A[0, 0].abs(), torch.tensor([0.0, 2.0], dtype=torch.float64), atol=1e-12)
        assert torch.allclose(svd.R_B @ svd.R_A, torch.diag_embed(torch.tensor([[3.0, -4.0]]).double()), atol=1e-12)


class TestWard:
    @given(seeds, st.integers(2, 14), st.data())
    @settings(max_examples=40, deadline=None)
    def test_equals_scikit_learns_tree_cut_at_k(self, seed, P, data):
        X = points(3, P, 4, seed)
        k = torch.tensor([data.draw(st.integers(1, P)) for _ in range(3)])
        labels = gram.ward(gram_of(X), k)
        for m in range(3):
            expected = AgglomerativeClustering(int(k[m]), linkage="ward").fit(X[m].numpy()).labels_
            assert torch.equal(labels[m], gram.renumber(torch.tensor(expected, dtype=torch.long)[None])[0])

    def test_k_equal_to_the_number_of_points_keeps_all_apart(self):
        assert gram.ward(gram_of(points(2, 5, 3)), counts(2, 5)).tolist() == [list(range(5))] * 2

    def test_by_hand(self):
        # on a line: 0, 1, 10, 12, 100. Two clusters: {0, 1, 10, 12} and {100}; three: {0, 1}, {10, 12}, {100}
        X = torch.tensor([0.0, 1.0, 10.0, 12.0, 100.0], dtype=torch.float64)[None, :, None].repeat(2, 1, 1)
        assert gram.ward(gram_of(X), torch.tensor([2, 3])).tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 2]]

    def test_coinciding_points_still_give_k_clusters(self):
        labels = gram.ward(torch.ones(1, 6, 6, dtype=torch.float64), counts(1, 4))
        assert sorted(labels.unique().tolist()) == [0, 1, 2, 3]


class TestLloyd:
    @given(seeds, st.integers(4, 16), st.integers(2, 4))
    @settings(max_examples=30, deadline=None)
    def test_same_inertia_as_scikit_learn_from_the_same_start(self, seed, P, k):
        X = points(1, P, 3, seed)
        start = torch.arange(P) % k
        centres = torch.stack([X[0, start == c].mean(0) for c in range(k)]).numpy()
        theirs = KMeans(k, init=centres, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(X[0].numpy())
        labels, found = gram.lloyd(gram_of(X), start[None], counts(1, k))
        assert float(found) == pytest.approx(inertia(X[0], labels[0]), rel=1e-9, abs=1e-9)
        if len(set(theirs.labels_)) == k and len(labels.unique()) == k:
            # both may refill an empty cluster on the way, after which the paths may part
            assert float(found) <= theirs.inertia_ * (1 + 1e-6) or _refilled(X[0], start, k)

    def test_a_tie_moves_nobody(self):
        # the middle point is as far from either centre of {-1, 0} (-0.5) and {0.5, ..} as it can be
        X = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)[None, :, None]
        start = torch.tensor([[0, 0, 1]])  # centres -0.5 and 0.5: the point 0 is 0.5 from each
        labels, found = gram.lloyd(gram_of(X), start, counts(1, 2))
        assert labels.tolist() == start.tolist()
        assert float(found) == pytest.approx(0.5)

    def test_an_empty_cluster_takes_the_farthest_point(self):
        # all start in cluster 0 with mean 4; 12 is farthest and founds cluster 1
        X = torch.tensor([0.0, 1.0, 3.0, 12.0], dtype=torch.float64)[None, :, None]
        labels, found = gram.lloyd(gram_of(X), torch.zeros(1, 4, dtype=torch.long), counts(1, 2))
        assert labels.tolist() == [[0, 0, 0, 1]]
        # mean 4/3: 16/9 + 1/9 + 25/9 = 42/9
        assert float(found) == pytest.approx(42 / 9)

    def test_every_cluster_has_a_member_even_where_points_coincide(self):
        labels, found = gram.kmeans(torch.ones(2, 5, 5, dtype=torch.float64), torch.tensor([5, 3]), starts=3)
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
        _, ours = gram.kmeans(gram_of(X), counts(M, k))
        theirs = sum(KMeans(k, n_init=10, random_state=m).fit(X[m].numpy()).inertia_ for m in range(M))
        assert float(ours.sum()) <= theirs * (1 + 1e-9)

    def test_at_or_below_scikit_learn_on_unrelated_units(self):
        M, k = 12, 8
        X = points(M, 24, 64, 3) * torch.linspace(0.3, 2, 24, dtype=torch.float64)[:, None]
        _, ours = gram.kmeans(gram_of(X), counts(M, k))
        theirs = sum(KMeans(k, n_init=10, random_state=m).fit(X[m].numpy()).inertia_ for m in range(M))
        assert float(ours.sum()) <= theirs * (1 + 1e-9)

    @given(seeds, st.integers(2, 10), st.data())
    @settings(max_examples=30, deadline=None)
    def test_labels_are_a_numbered_partition_and_inertia_is_theirs(self, seed, P, data):
        X = points(2, P, 3, seed)
        k = torch.tensor([data.draw(st.integers(1, P)) for _ in range(2)])
        labels, found = gram.kmeans(gram_of(X), k, starts=2, seed=seed)
        for m in range(2):
            seen = list(dict.fromkeys(labels[m].tolist()))
            assert seen == list(range(int(k[m])))
            assert float(found[m]) == pytest.approx(inertia(X[m], labels[m]), rel=1e-8, abs=1e-9)

    def test_more_starts_never_hurt(self):
        G = gram_of(points(30, 20, 3, 5))
        results = [gram.kmeans(G, counts(30, 6), starts=n)[1] for n in (0, 1, 8)]
        assert (results[1] <= results[0]).all()
        assert (results[2] <= results[1]).all()
        assert (results[2] < results[0]).any()

    def test_a_module_alone_is_clustered_as_in_company(self):
        G = gram_of(points(4, 12, 5, 6))
        k = torch.tensor([3, 4, 5, 11])
        together = gram.kmeans(G, k, starts=4)[0]
        for m in range(4):
            assert torch.equal(gram.kmeans(G[m : m + 1], k[m : m + 1], starts=4)[0][0], together[m])

    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_the_order_of_the_points_does_not_matter(self, seed):
        X = points(2, 12, 3, seed)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        k = counts(2, 4)
        plain, permuted = (gram.kmeans(gram_of(x), k, starts=2)[0] for x in (X, X[:, order]))
        assert torch.equal(gram.renumber(plain[:, order]), permuted)


class TestPlusPlus:
    def test_labels_are_those_of_the_nearest_drawn_centre(self):
        # three far groups: with k = 3 the squared distances make every draw hit a new group
        centres = torch.tensor([0.0, 1e6, -1e6], dtype=torch.float64)
        X = (centres.repeat_interleave(4) + torch.arange(12, dtype=torch.float64))[None, :, None]
        labels = gram.plus_plus(gram_of(X), counts(1, 3), torch.Generator().manual_seed(0))
        assert gram.renumber(labels).tolist() == [[0] * 4 + [1] * 4 + [2] * 4]

    def test_draws_with_probability_proportional_to_the_squared_distance(self):
        # points 0, 1, 3 on a line; first centre uniform. P(second = 3 | first = 0) = 9 / 10, and so on.
        # P(the pair {0, 1}) = 1/3 * 1/10 + 1/3 * 1/5 = 0.1; in the other pairs 0 and 1 or 0 and 3 are centres, and
        # 0 is alone or with 1: only the pair {0, 1} puts 1 and 3 together
        G = gram_of(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)[None, :, None])
        generator = torch.Generator().manual_seed(1)
        draws = torch.cat([gram.plus_plus(G, counts(1, 2), generator) for _ in range(3000)])
        share = float((draws[:, 1] == draws[:, 2]).double().mean())
        assert share == pytest.approx(0.1, abs=0.02)  # standard deviation 0.0055

    def test_smaller_k_uses_fewer_centres(self):
        labels = gram.plus_plus(gram_of(points(2, 9, 4)), torch.tensor([2, 6]), torch.Generator().manual_seed(0))
        assert set(labels[0].tolist()) == {0, 1}
        assert set(labels[1].tolist()) == set(range(6))

    def test_same_generator_same_draws(self):
        G = gram_of(points(3, 9, 4))
        a, b = (gram.plus_plus(G, counts(3, 4), torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(a, b)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_renumber_keeps_the_partition_and_numbers_by_first_member(labels):
    old = torch.tensor([labels])
    new = gram.renumber(old)[0].tolist()
    assert [labels.index(x) for x in labels] == [new.index(x) for x in new]
    assert list(dict.fromkeys(new)) == list(range(len(set(labels))))


def test_distances_by_the_definition():
    X = points(2, 5, 3)
    assert torch.allclose(gram.distances(gram_of(X)), torch.cdist(X, X).square(), atol=1e-10)


@pytest.mark.parametrize("size", [4, 5, 6, 7])
def test_products_in_blocks_are_the_product(size):
    """Blocks that divide the number of rows, and that do not."""
    X = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    G = torch.full((2, 6, 6), torch.nan, dtype=torch.float64)
    gram.product(X, torch.float64, G, rows=size // 2, part=2)
    torch.testing.assert_close(G, X.double() @ X.double().mT, rtol=1e-14, atol=1e-14)
    assert torch.equal(G, G.mT)


def test_ward_where_most_points_lose_their_nearest():
    """A point near the middle is the nearest of most others until it is merged; each module has its own k."""
    X = torch.randn(3, 60, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    X[:, 0] *= 0.01
    k = torch.tensor([2, 5, 59])
    labels = gram.ward(X @ X.mT, k)
    for m in range(3):
        expected = torch.from_numpy(AgglomerativeClustering(int(k[m]), linkage="ward").fit(X[m].numpy()).labels_)
        assert torch.equal(labels[m][:, None] == labels[m], expected[:, None] == expected)
