"""Points in the plane for things of which only inner products are known."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MergeError
from ..merge.clustering import squared_distances


def pca(G: Tensor) -> Tensor:
    """The two principal components of points with Gram matrix `G (P, P)`: ``(P, 2)``.

    Of either component the largest entry is positive, so that equal input gives an equal picture.
    """
    P = len(G)
    centred = G - G.mean(0) - G.mean(1, keepdim=True) + G.mean()
    values, vectors = torch.linalg.eigh(centred)
    points = (vectors * values.clamp_min(0).sqrt()).flip(1)[:, :2]
    if P < 2:
        return torch.zeros(P, 2, dtype=G.dtype)
    peak = points.gather(0, points.abs().argmax(0, keepdim=True))
    return torch.where(peak < 0, -points, points)


def tsne(G: Tensor, seed: int = 0) -> Tensor:
    """t-SNE of the directions of points with Gram matrix `G (P, P)`: ``(P, 2)``. Fewer than 4 points: `pca`.

    Raises:
        MergeError: scikit-learn is not installed.
    """
    if len(G) < 4:
        return pca(G)
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise MergeError(
            "t-SNE needs scikit-learn, which is not installed.",
            found=error,
            remedy="pip install scikit-learn (or 'legomole[plots]'), or draw the map by PCA",
        ) from error
    length = G.diagonal().clamp_min(torch.finfo(G.dtype).tiny).sqrt()
    apart = squared_distances((G / length[:, None] / length)[None])[0].fill_diagonal_(0).sqrt()
    found = TSNE(
        metric="precomputed", init="random", perplexity=min(30.0, (len(G) - 1) / 3), random_state=seed
    ).fit_transform(apart.numpy())
    return torch.from_numpy(found).to(G)
