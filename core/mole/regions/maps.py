"""Maps of regions: checked, resized and cropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...errors import MergeError
from .picture import Part, Picture


def checked_maps(maps: Sequence[Any], labels: Sequence[str]) -> tuple[Tensor | None, ...]:
    """One map per expert, each ``None`` (everywhere) or ``(K, H, W)`` float32 with values in 0 .. 1.

    Args:
        maps: One per expert, ``None`` or ``(H, W)`` or ``(K, H, W)`` for pictures of a batch or frames of a video; none
            for experts that act everywhere. A map of ones is no map.
        labels: Names of the experts.

    Raises:
        MergeError: Another number of maps, another shape, or values outside of 0 .. 1.
    """
    if not maps:
        return (None,) * len(labels)
    if len(maps) != len(labels):
        raise MergeError("Every LoRA needs a region or None.", expected=len(labels), found=len(maps))
    return tuple(
        None if map_ is None else _checked(torch.as_tensor(map_), label)
        for map_, label in zip(maps, labels, strict=True)
    )


def _checked(map_: Tensor, label: str) -> Tensor | None:
    map_ = map_.detach().to("cpu", torch.float32)
    if map_.ndim not in (2, 3) or map_.numel() == 0:
        raise MergeError(
            f"The region of {label} is not a map.",
            expected="shape (height, width), or (pictures, height, width)",
            found=tuple(map_.shape),
        )
    if not bool(((map_ >= 0) & (map_ <= 1)).all()):  # false for NaN too
        raise MergeError(
            f"The region of {label} has values outside of 0 .. 1.",
            expected="0 where the LoRA is off, 1 where it acts in full",
            found=f"{float(map_.min()):g} .. {float(map_.max()):g}",
        )
    return None if bool((map_ == 1).all()) else map_.reshape(-1, *map_.shape[-2:])


def maps_of_pass(
    maps: Sequence[Tensor | None], picture: Picture, parts: Sequence[Part] | None, labels: Sequence[str]
) -> Tensor:
    """The maps at the size of the latent that a model was called with, ``(1 or samples, N, frames, height, width)``.

    Args:
        maps: See `checked_maps`.
        picture: The latent.
        parts: Per sample, the part of the whole picture that it shows; ``None``: each shows all of it.
        labels: Names of the experts.

    Raises:
        MergeError: Maps for another number of pictures than the batch has.
    """
    size = picture.height, picture.width
    if parts is None:
        fitted = [_fitted(m, picture, size, label) for m, label in zip(maps, labels, strict=True)]
        samples = max(map(len, fitted))
        return torch.stack([m.expand(samples, -1, -1, -1) for m in fitted], 1)
    wholes = {
        whole: [_fitted(m, picture, whole, label) for m, label in zip(maps, labels, strict=True)]
        for whole in {(part.whole_height, part.whole_width) for part in parts}
    }
    rows: list[Tensor] = []
    for row, part in enumerate(parts):
        top, left = part.top, part.left
        cut = [
            m[row % len(m), :, top : top + size[0], left : left + size[1]].expand(-1, *size)
            for m in wholes[part.whole_height, part.whole_width]
        ]
        rows.append(torch.stack(cut))
    return torch.stack(rows)


def _fitted(map_: Tensor | None, picture: Picture, size: tuple[int, int], label: str) -> Tensor:
    """``(1 or samples, frames, height, width)``."""
    if map_ is None:
        return torch.ones(1, picture.frames, *size)
    if picture.frames > 1:
        return resized(map_[None], (picture.frames, *size))
    if len(map_) > 1 and picture.samples % len(map_):
        raise MergeError(
            f"The region of {label} is for another number of pictures.",
            expected=f"one map, or as many as the batch has ({picture.samples})",
            found=len(map_),
        )
    fitted = resized(map_[:, None], (1, *size))
    # the prompts of guidance follow each other in a batch, each with all pictures
    return fitted if len(map_) == 1 else fitted.repeat(picture.samples // len(map_), 1, 1, 1)


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps ``(S, frames, height, width)`` at another size: means when smaller, linear when larger.

    Means keep edges exact that lie between positions of the smaller map.
    """
    maps = maps[:, None]
    height, width = (max(new, old) for new, old in zip(size[1:], maps.shape[-2:], strict=True))
    if (height, width) != tuple(maps.shape[-2:]):
        flat = interpolate(maps.flatten(0, 2)[:, None], (height, width), mode="bilinear", align_corners=False)
        maps = flat.view(*maps.shape[:3], height, width)
    if tuple(size) != tuple(maps.shape[-3:]):
        maps = interpolate(maps, tuple(size), mode="area")
    return maps[:, 0]
