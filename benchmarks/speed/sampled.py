"""Tools that are too slow to run as a whole: one layer of every shape is timed, times the number of such layers.

Reading and writing files is not counted. Where a full matrix is decomposed, a layer of more than `_LARGEST` elements is
shrunk by a factor f in both dimensions, and its time multiplied by ``f^3``, the complexity of an SVD.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from legomole.core.lowrank import LowRank
from legomole.core.merge.clustering import kmeans
from torch import Tensor

from .cases import Case
from .whole import peft_model

_LARGEST = 1_700_000  # elements; 1280 x 1280 fits
_ONE = "lora_unet_layer"
_ROUNDS = 3  # rounds, of which the fastest counts

Units = Sequence[LowRank]


@dataclass(frozen=True)
class Sampled:
    """Result of a tool.

    Args:
        seconds: Seconds for all layers.
        inertia: Ratio of our clusters' inertia to the tool's, if it clusters.
    """

    seconds: float
    inertia: float | None = None


Tool = Callable[[Case, Path], Sampled]


def _shapes(case: Case) -> Counter[tuple[int, int]]:
    return Counter((d_out, d_in) for _, d_out, d_in in case.layers)


def _units(case: Case, shape: tuple[int, int]) -> list[LowRank]:
    """Return one layer of every LoRA."""
    one = replace(case, layers=[(_ONE, *shape)])
    return [one.lora(seed).modules[_ONE] for seed in range(case.n)]


def fastest(work: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """Return the seconds of the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _factor(shape: tuple[int, int]) -> int:
    factor = 1
    while shape[0] * shape[1] > _LARGEST * factor**2:
        factor *= 2
    return factor


def per_layer(work: Callable[[Units, int], object], *, cubic: bool = False) -> Tool:
    """Return a tool that calls `work` with the LoRAs of each layer and the rank of the result.

    Args:
        cubic: Whether the work grows with the third power of the layer's size.
    """

    def tool(case: Case, folder: Path) -> Sampled:
        seconds = 0.0
        for shape, count in _shapes(case).items():
            factor = _factor(shape) if cubic else 1
            units = _units(case, (shape[0] // factor, shape[1] // factor))
            seconds += count * factor**3 * fastest(lambda units=units: work(units, case.rank))
        return Sampled(seconds)

    return tool


def kohya_svd(units: Units, rank: int) -> tuple[Tensor, Tensor]:
    """Merge as kohya's ``svd_merge_lora``: truncated SVD of the dense sum, with the extreme entries clamped."""
    delta = torch.zeros(units[0].d_out, units[0].d_in)
    for unit in units:
        delta += unit.scale * (unit.B.float() @ unit.A.float())
    U, S, Vh = torch.linalg.svd(delta)
    up, down = U[:, :rank] * S[:rank], Vh[:rank]
    limit = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.99)
    return up.clamp(-limit, limit), down.clamp(-limit, limit)


def _stacked(units: Units) -> list[Tensor]:
    return [
        torch.stack([unit.A.float() for unit in units]),
        torch.stack([unit.scale * unit.B.float() for unit in units]),
    ]


def mergekit_ties(units: Units, rank: int) -> list[Tensor]:
    """Apply TIES to each factor: keep the larger half, elect a sign per entry, average the entries that agree."""
    return [_ties(factor) for factor in _stacked(units)]


def _ties(factor: Tensor) -> Tensor:
    flat = factor.flatten(1)
    limit = flat.abs().kthvalue(flat.shape[1] // 2, 1).values[:, None]
    flat = torch.where(flat.abs() > limit, flat, 0)
    agrees = flat.sign() == flat.sum(0).sign()
    return ((flat * agrees).sum(0) / agrees.sum(0).clamp_min(1)).view(factor.shape[1:])


def mergekit_dare(units: Units, rank: int) -> list[Tensor]:
    """Apply DARE to each factor: drop half of the entries at random, double the rest, add."""
    return [(factor * torch.bernoulli(torch.full_like(factor, 0.5)) * 2).sum(0) for factor in _stacked(units)]


def sklearn_lego(case: Case, folder: Path) -> Sampled:
    """Cluster as in the LEGO paper with scikit-learn's ``KMeans(n_init=10)``; compare inertia on the same units."""
    from sklearn.cluster import KMeans

    seconds, ours, theirs = 0.0, 0.0, 0.0
    for shape, count in _shapes(case).items():
        units = _units(case, shape)
        X = torch.cat(
            [torch.cat([abs(u.scale) ** 0.5 * u.A.float(), abs(u.scale) ** 0.5 * u.B.float().T], 1) for u in units]
        )
        start = time.perf_counter()
        clusters = KMeans(case.rank, n_init=10, random_state=0).fit(X.numpy())
        torch.from_numpy(clusters.cluster_centers_).contiguous()
        seconds += count * (time.perf_counter() - start)
        theirs += count * float(clusters.inertia_)
        ours += count * float(kmeans((X.double() @ X.double().mT)[None], torch.tensor([case.rank]))[1])
    return Sampled(seconds, ours / theirs)


def peft_svd(case: Case, folder: Path) -> Sampled:
    """Merge with PEFT's ``add_weighted_adapter``, on models of a single layer."""
    seconds = 0.0
    names = [str(i) for i in range(case.n)]
    for shape, count in _shapes(case).items():
        factor = _factor(shape)
        d_out, d_in = shape[0] // factor, shape[1] // factor
        one = replace(case, name=f"{case.name}-{d_out}-{d_in}", layers=[(_ONE, d_out, d_in)], format="kohya")
        model = peft_model(one, one.write(folder))
        start = time.perf_counter()
        model.add_weighted_adapter(names, [1.0] * case.n, "merged", combination_type="svd", svd_rank=case.rank)
        seconds += count * factor**3 * (time.perf_counter() - start)
    return Sampled(seconds)


SAMPLED: dict[str, Tool] = {
    "peft-svd": peft_svd,
    "kohya-svd": per_layer(kohya_svd, cubic=True),
    "mergekit-ties": per_layer(mergekit_ties),
    "mergekit-dare": per_layer(mergekit_dare),
    "sklearn-lego": sklearn_lego,
}
