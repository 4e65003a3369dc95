"""The picture of a forward pass: how many positions it has, and which part of the whole picture each sample shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn


class Picture(NamedTuple):
    """Size of the latent that a model was called with.

    Args:
        samples: Batch size.
        frames: Frames of a video's latent, 1 for pictures.
        height, width: Positions of the latent, or tokens if `is_tokens`.
        is_tokens: Whether a position is a token already: the host has packed the latent's patches.
    """

    samples: int
    frames: int
    height: int
    width: int
    is_tokens: bool = False


class Part(NamedTuple):
    """The part of a picture that a sample shows, in positions of the latent.

    Args:
        top, left: Position of its upper left corner in the whole picture.
        whole_height, whole_width: Size of the whole picture.
    """

    top: int
    left: int
    whole_height: int
    whole_width: int


# Gets queries and keys (B, heads, T, d), the factor of their products (default 1 / sqrt(d)), and the attention mask,
# which broadcasts with (B, heads, T, T): of bools, or added to the products.
AttentionObserver = Callable[[Tensor, Tensor, "float | None", "Tensor | None"], None]


class SamplingReader(Protocol):
    """What only the host knows of a forward pass."""

    def parts(self, arguments: Mapping[str, Any], picture: Picture) -> Sequence[Part] | None:
        """The part of the whole picture that each sample shows; ``None``: every sample shows all of it.

        Args:
            arguments: Keyword arguments of the model. picture: What the model was called with.
        """
        ...

    def reached(self, fraction: float, args: Sequence[Any], arguments: Mapping[str, Any]) -> bool:
        """Whether sampling has reached this fraction of its run, 0 .. 1; 0 is always reached."""
        ...

    def step(self, args: Sequence[Any], arguments: Mapping[str, Any]) -> int:
        """Number of the sampling step of a pass: it counts up within a run, and is lower when another run begins."""
        ...

    def watch_attention(
        self, arguments: Mapping[str, Any], read: AttentionObserver
    ) -> AbstractContextManager[object] | None:
        """A context in which `read` gets the queries, keys and masks of every attention.

        ``None``: the model's attention is torch's ``scaled_dot_product_attention``.
        """
        ...


def picture_of(args: Sequence[Any], kwargs: Mapping[str, Any], *, frames_first: bool = False) -> Picture | None:
    """Size of the picture in the arguments of a model's forward method; ``None`` if it cannot be found.

    Args:
        args, kwargs: The arguments. frames_first: See `core.mole.regions.layouts.SequenceLayout`.
    """
    if frames_first and "hidden_states" in kwargs:
        samples, frames, _, height, width = kwargs["hidden_states"].shape
        return Picture(samples, frames, height, width)
    for read in _READERS:
        if (picture := read(args, kwargs)) is not None:
            return picture
    return None


def _tensor(arguments: Mapping[str, Any], name: str) -> Tensor | None:
    """An argument, if it is a tensor."""
    return arguments[name] if isinstance(arguments.get(name), Tensor) else None


def _packed_with_positions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Picture | None:
    """Flux in diffusers: packed tokens with ``img_ids`` (picture or reference, row, column)."""
    ids, tokens = _tensor(kwargs, "img_ids"), _tensor(kwargs, "hidden_states")
    if ids is None or tokens is None:
        return None
    ids = ids.reshape(-1, *ids.shape[-2:])[0]
    own = ids[ids[:, 0] == ids[0, 0]]
    height, width = (int(own[:, i].max() - own[:, i].min()) + 1 for i in (1, 2))
    return Picture(len(tokens), 1, height, width, True)


def _packed_with_shapes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Picture | None:
    """Qwen-Image in diffusers: packed tokens with ``img_shapes``, the picture's first."""
    shapes, tokens = kwargs.get("img_shapes"), _tensor(kwargs, "hidden_states")
    if not shapes or tokens is None:
        return None
    first: Any = shapes[0]
    frames, height, width = first[0] if isinstance(first[0], (tuple, list)) else first
    return Picture(len(tokens), int(frames), int(height), int(width), True)


def _packed_video(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Picture | None:
    """LTX in diffusers: packed tokens with their numbers of frames, rows and columns."""
    frames, height, width = (kwargs.get(name) for name in ("num_frames", "height", "width"))
    tokens = _tensor(kwargs, "hidden_states")
    if tokens is None or tokens.ndim != 3 or frames is None or height is None or width is None:
        return None
    return Picture(len(tokens), int(frames), int(height), int(width), True)


def _latent(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Picture | None:
    """A latent ``(B, C, H, W)`` or ``(B, C, F, H, W)``, or a list with one ``(C, F, H, W)`` per sample (Z-Image)."""
    values: list[Any] = [*args, *kwargs.values()]
    for value in values:
        if isinstance(value, Tensor) and value.ndim in (4, 5):
            frames = value.shape[2] if value.ndim == 5 else 1
            return Picture(len(value), frames, value.shape[-2], value.shape[-1])
        first: Any = value[0] if isinstance(value, (list, tuple)) and value else None
        if isinstance(first, Tensor) and first.ndim == 4:
            return Picture(len(cast("list[Tensor]", value)), first.shape[1], first.shape[2], first.shape[3])
    return None


_READERS: tuple[Callable[[Sequence[Any], Mapping[str, Any]], Picture | None], ...] = (
    _packed_with_positions,
    _packed_with_shapes,
    _packed_video,
    _latent,
)


def patch_size(model: nn.Module) -> tuple[int, int, int]:
    """Frames, rows and columns of the latent in one token of a transformer; ones for a U-Net."""
    config: Any = getattr(model, "config", None)
    for name in ("patch_size", "all_patch_size"):
        size: Any = getattr(model if config is None else config, name, None)  # diffusers warns at the model's own
        if name == "all_patch_size" and size is not None:
            size = size[0]
        if isinstance(size, int):
            time: Any = getattr(model if config is None else config, "patch_size_t", None)
            return (time if isinstance(time, int) else 1), size, size
        if isinstance(size, (tuple, list)):
            frames, height, width = [1, *cast("Sequence[int]", size)][-3:]
            return frames, height, width
    return 1, 1, 1


@dataclass(frozen=True)
class Tokens:
    """Grid of tokens of a picture."""

    frames: int
    height: int
    width: int

    @property
    def count(self) -> int:
        return self.frames * self.height * self.width


def tokens_of(picture: Picture, patch: Sequence[int]) -> Tokens:
    """The grid of tokens of a latent whose sides are padded to multiples of the patch size."""
    if picture.is_tokens:
        return Tokens(picture.frames, picture.height, picture.width)
    sides = (picture.frames, picture.height, picture.width)
    return Tokens(*(-(-side // size) for side, size in zip(sides, patch, strict=True)))


def grid_with(picture: Picture, patch: Sequence[int], count: int) -> Tokens | None:
    """The grid with this many positions: the tokens of `tokens_of`, or the latent halved any number of times."""
    tokens = tokens_of(picture, patch)
    if tokens.count == count:
        return tokens
    for time in (1, 2, 4, 8) if picture.frames > 1 else (1,):
        side = 1
        while side < 2 * max(picture.height, picture.width):
            tokens = tokens_of(picture._replace(is_tokens=False), (time, side, side))
            if tokens.count == count:
                return tokens
            side *= 2
    return None


def text_lengths(text: Tensor | None, mask: Tensor | None) -> list[int] | None:
    """Number of tokens of each text that are no padding."""
    if text is None:
        return None
    if mask is None:
        return [text.shape[1]] * len(text)
    return [int(n) for n in mask.to(torch.long).sum(1)]
