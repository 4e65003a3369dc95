"""Plane coordinates of units of which only the Gram matrix is known."""

from __future__ import annotations

import torch
from torch import Tensor


def pca(G: Tensor) -> Tensor:
    """Return the first two principal components of points with Gram matrix `G (P, P)`, ``(P, 2)``.

    The largest entry of each component is positive, so that equal input gives an equal picture.
    """
    P = len(G)
    centred = G - G.mean(0) - G.mean(1, keepdim=True) + G.mean()
    values, vectors = torch.linalg.eigh(centred)
    points = (vectors * values.clamp_min(0).sqrt()).flip(1)[:, :2]
    if P < 2:
        return torch.zeros(P, 2, dtype=G.dtype)
    peak = points.gather(0, points.abs().argmax(0, keepdim=True))
    return torch.where(peak < 0, -points, points)
