"""Regions of a picture as masks: boxes, soft edges, and a picture tinted where a region is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, interpolate, pad

from .canvas import SERIES, Colour

_TINT, _SHADE = 0.55, 0.35  # share of the colour in a region; of black outside of it


def box_region(size: tuple[int, int], x: float, y: float, width: float, height: float) -> Tensor:
    """A box as a mask ``(1, H, W)``. A pixel that the box covers in part has that share as its value.

    Args:
        size: Height and width of the mask in pixels.
        x, y: Left and upper edge, as shares of the picture.
        width, height: Size of the box, as shares of the picture; what reaches out of the picture is cut.
    """
    rows, columns = (
        _covered(count, start, start + extent)
        for count, start, extent in zip(size, (y, x), (height, width), strict=True)
    )
    return (rows[:, None] * columns)[None]


def _covered(count: int, start: float, end: float) -> Tensor:
    """The share of each of `count` pixels that lies between two positions, given as shares of the side."""
    edges = (torch.arange(count + 1, dtype=torch.float64)).clamp(start * count, max(start, end) * count)
    return edges.diff().float()


def with_soft_edges(mask: Tensor, feather: float, shape: tuple[int, int] | None = None) -> Tensor:
    """A mask whose edges rise smoothly over a distance, with 0.5 where the hard edge is.

    Two regions that add up to 1 still do afterwards. At the border of the picture nothing fades.

    Args:
        mask: ``(B, H, W)``.
        feather: Width of the soft edge, as a share of the picture's shorter side.
        shape: Height and width of the picture, if the mask has another aspect; default those of the mask.
    """
    height, width = shape or (mask.shape[-2], mask.shape[-1])
    for dim, side in ((-2, height), (-1, width)):
        pixels = feather * min(height, width) / side * mask.shape[dim]
        radius = round(pixels / 4)  # two means, each half as wide
        for _ in range(2 if radius else 0):
            mask = _mean(mask, dim, radius)
    return mask.clamp(0, 1)


def _mean(mask: Tensor, dim: int, radius: int) -> Tensor:
    """The mean of each pixel and its neighbours up to `radius` pixels away along a dimension."""
    lines = mask.transpose(dim, -1)
    means = avg_pool1d(pad(lines, (radius, radius), mode="replicate"), 2 * radius + 1, stride=1)
    return means.transpose(dim, -1)


def shown_region(images: Tensor, mask: Tensor, colour: Colour = SERIES[1]) -> Tensor:
    """Images that are tinted inside of a region and darker outside.

    Args:
        images: ``(B, H, W, 3)`` in 0 .. 1.
        mask: ``(K, h, w)`` of any size; the masks repeat if there are fewer than images, and the images likewise.
        colour: The tint.

    Returns:
        ``(max(B, K), H, W, 3)`` in 0 .. 1.
    """
    count = max(len(images), len(mask))
    fitted = interpolate(mask[:, None], images.shape[1:3], mode="bilinear", antialias=True).clamp(0, 1)
    m = _repeated(fitted, count).movedim(1, -1)
    tint = torch.tensor(colour, dtype=images.dtype) / 255
    inside, outside = images.lerp(tint, _TINT), images * (1 - _SHADE)
    return _repeated(outside, count).lerp(_repeated(inside, count), m.to(images))


def _repeated(values: Tensor, count: int) -> Tensor:
    return values[torch.arange(count) % len(values)]


def scaled_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Height and width with the same aspect, of which the longer is `longest`."""
    height, width = (max(1, round(side * longest / max(size))) for side in size)
    return height, width
