"""Factors of units: how much each unit of a layer acts at each of its positions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import MergeError
from ..concepts import ConceptDetector, text_mask
from ..stack import Stack
from .automatic import AutomaticRegions
from .layouts import Sees, SequenceLayout, layout_of, sees
from .maps import maps_of_pass, resized
from .picture import Picture, SamplingReader, Tokens, grid_with, patch_size, picture_of, text_lengths, tokens_of


class Selection(NamedTuple):
    """A part of a cross attention that runs by itself, see `core.mole.regions.attention`.

    Args:
        experts: ``(N,)``, which experts change the keys and values.
        positions: ``(P,)`` long, the positions of the picture that it runs for; ``None``: all.
        length: Number of the picture's positions before the selection.
    """

    experts: Tensor
    positions: Tensor | None
    length: int


class RegionFactors:
    """Factors of a bank's units in the current forward pass.

    Args:
        model: The module tree.
        maps: Per expert, see `core.mole.regions.maps`; or ``"automatic"``.
        steps: Per expert, the part of the sampling run in which it acts, 0 .. 1.
        labels: Names of the experts.
        reader: Reads what only the host knows.

    Attributes:
        automatic: Reads maps from the model's attention, if they are automatic.
        named: ``(1 or B, N)`` bool, the experts whose words each sample's text has; ``None`` if unknown. Their text
            layers act in full in models of joint attention.
        selection: Set while a part of a cross attention runs by itself.

    Raises:
        MergeError: Steps without a reader.
    """

    def __init__(
        self,
        model: nn.Module,
        maps: Sequence[Tensor | None] | Literal["automatic"],
        steps: Sequence[tuple[float, float]],
        labels: Sequence[str],
        reader: SamplingReader | None = None,
    ) -> None:
        self.maps: tuple[Tensor | None, ...] = (None,) * len(labels) if maps == "automatic" else tuple(maps)
        self.steps, self.labels, self.reader = tuple(steps), tuple(labels), reader
        self.layout, self.patch, self._class = layout_of(model), patch_size(model), type(model).__name__
        self._has_cross_attention = any(sees(self._class, path) == "cross" for path, _ in model.named_modules())
        self._roles: dict[str, Sees] = {}
        self.named: Tensor | None = None
        self.selection: Selection | None = None
        self._picture: Picture | None = None
        self._text: Tensor | None = None
        self._text_lengths: list[int] | None = None
        self._active: tuple[bool, ...] = ()
        self._key: Any = None  # of what the caches hold
        self._maps: Tensor | None = None  # (1 or B, N, frames, height, width)
        self._cache: dict[Any, Any] = {}
        self.automatic: AutomaticRegions | None = None
        if maps == "automatic":
            self.automatic = AutomaticRegions(
                self._class, self.patch, self.layout or SequenceLayout(order="text first")
            )
        if reader is None and (self.automatic is not None or any(part != (0.0, 1.0) for part in self.steps)):
            raise MergeError(
                "LoRAs that act in a part of the sampling steps, and automatic regions, need a host that counts them.",
                remedy="use legomole.mixed on a diffusers pipeline, or ComfyUI",
            )

    def begin_pass(
        self,
        text: Tensor | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        detector: ConceptDetector | None = None,
        rows: Sequence[int] = (),
    ) -> None:
        """Read the size of the picture, and which experts act now.

        Args:
            text: Text conditioning ``(B, tokens, F)``, if the model has one. args, kwargs: The model's arguments.
            detector, rows: For automatic regions, see `AutomaticRegions.begin_pass`.

        Raises:
            MergeError: There are maps, and no picture in the arguments; or see `AutomaticRegions.begin_pass`.
        """
        self.named, self._text = None, text
        self._active = tuple(self._acts_now(part, args, kwargs) for part in self.steps)
        key: Any = self._active
        parts = None
        if self.has_maps or self.automatic is not None:
            picture = picture_of(args, kwargs, frames_first=self.layout is not None and self.layout.frames_first)
            if picture is None:
                raise MergeError(
                    "The model got no picture that a region could be laid on.",
                    module=self._class,
                    expected="a latent (batch, channels, height, width), or (.., frames, height, width)",
                    remedy="remove the regions",
                )
            self._picture = picture
            parts = None if self.reader is None else self.reader.parts(kwargs, picture)
            mask = None if text is None else text_mask(kwargs, text)
            if self.automatic is not None and self.reader is not None:
                before = self.automatic.maps
                self.automatic.begin_pass(picture, text, mask, detector, rows, self.reader, args, kwargs)
                found = self.automatic.maps
                if found is not before:
                    self.maps = (None,) * len(self.labels) if found is None else tuple(found.unbind(1))
                    self._key = None
            without_padding = self.layout is not None and self.layout.without_padding
            self._text_lengths = text_lengths(text, mask if without_padding else None)
            key = (self._active, picture, parts if parts is None else tuple(parts), tuple(self._text_lengths or ()))
        if key != self._key:
            self._cache.clear()
            self._key = key
            if self.has_maps and self._picture is not None:
                self._maps = maps_of_pass(self.maps, self._picture, parts, self.labels)

    def end_pass(self) -> None:
        self.named = self._text = None
        if self.automatic is not None:
            self.automatic.end_pass()

    @property
    def has_maps(self) -> bool:
        return any(map_ is not None for map_ in self.maps)

    def _acts_now(self, part: tuple[float, float], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        start, end = part
        if part == (0.0, 1.0) or self.reader is None:
            return True
        return self.reader.reached(start, args, kwargs) and (end >= 1 or not self.reader.reached(end, args, kwargs))

    def unit_factors(self, path: str, stack: Stack, z: Tensor) -> Tensor | None:
        """Factors that broadcast with ``z = D x`` of a layer; ``None`` if all are 1.

        Args:
            path: Path of the layer. stack: Its experts. z: ``(B, .., R)``, or ``(B, R, ..)`` of a convolution.

        Raises:
            MergeError: The layer's positions fit no known layout of the picture.
        """
        if not self.has_maps:
            return None if all(self._active) else self._same_everywhere("steps", self._acting, stack, z)
        role = self._role(path)
        if role == "cross" and self._sees_picture(z):
            role = "picture"
        if role == "cross" and self.selection is not None:
            experts = self.selection.experts[None]
            return self._same_everywhere(None, lambda: experts * self._acting(), stack, z)
        if role != "picture":
            named = self.named if role == "text" and not self._has_cross_attention else None
            kind = "largest" if role == "cross" or self._has_cross_attention else "mean"
            key = kind if named is None else None  # another prompt names others
            return self._same_everywhere(key, lambda: self._pooled(kind, named), stack, z)
        if not stack.kernel and (z.ndim == 2 or z.shape[1:-1].numel() == 1) and len(z) == self._samples:
            return self._same_everywhere("mean", lambda: self._pooled("mean"), stack, z)

        def compute() -> Tensor:
            units = self._positions(path, stack, z).index_select(-1, stack.owner.cpu())
            units = units.movedim(-1, 1) if stack.kernel else units
            if len(units) not in (1, len(z)):
                units = units.repeat(len(z) // len(units), *(1,) * (units.ndim - 1))
            return units.to(z)

        joint = self.layout is not None and self.layout.is_joint(path)
        if self.selection is not None or (joint and self.named is not None):
            return compute()  # not for another selection or another prompt
        shape = tuple(z.shape[2:] if stack.kernel else z.shape[1:-1])
        return self.cached(("positions", shape, len(z), joint, stack.layout, z.dtype, z.device), compute)

    def _role(self, path: str) -> Sees:
        if path not in self._roles:
            self._roles[path] = sees(self._class, path)
        return self._roles[path]

    @property
    def _samples(self) -> int:
        return 1 if self._picture is None else self._picture.samples

    def _sees_picture(self, z: Tensor) -> bool:
        """Whether a layer named as cross attention's key or value sees the picture: a second self-attention."""
        if self._picture is None or z.ndim != 3 or (self._text is not None and z.shape[1] == self._text.shape[1]):
            return False
        return grid_with(self._picture, self.patch, z.shape[1]) is not None and self.selection is None

    def _acting(self) -> Tensor:
        return torch.tensor([[float(on) for on in self._active]])

    def _pooled(self, kind: str, named: Tensor | None = None) -> Tensor:
        """``(1 or B, N)``: the mean or the largest value of each map; the largest for experts that a text names."""
        assert self._maps is not None
        largest = self._maps.amax((2, 3, 4))
        g = largest if kind == "largest" else self._maps.mean((2, 3, 4))
        if named is not None:
            tensors: list[Tensor] = [named.to(g.device), g, largest]
            rows = max(map(len, tensors))
            if all(rows % len(m) == 0 for m in tensors):
                in_full, g, largest = (m.repeat(rows // len(m), 1) for m in tensors)
                g = torch.where(in_full, largest, g)
        return g * self._acting()

    def _positions(self, path: str, stack: Stack, z: Tensor) -> Tensor:
        """Factors per position of the picture, ``(rows, .., N)`` in the shape of `z` with channels last."""
        assert self._maps is not None
        picture, maps = self._picture, self._maps * self._acting()[..., None, None, None]
        assert picture is not None
        rows, inner = len(z), tuple(z.shape[2:] if stack.kernel else z.shape[1:-1])
        if not stack.kernel and z.ndim == 2 and rows % picture.samples == 0:
            return self._sequence(path, maps, rows // picture.samples).expand(picture.samples, -1, -1).flatten(0, 1)
        by_frame = rows == picture.samples * picture.frames and picture.frames > 1 and len(inner) < 3
        if rows != picture.samples and not by_frame:
            raise self._unknown(path, z)
        if len(inner) == 1 and not stack.kernel:
            if by_frame:
                g = self._sequence(path, maps, inner[0] * picture.frames)
                return g.unflatten(1, (picture.frames, inner[0])).flatten(0, 1)
            return self._sequence(path, maps, inner[0])
        if len(inner) == 2 or (len(inner) == 3 and not by_frame):
            size = (picture.frames, *inner) if len(inner) == 2 else inner
            if len(inner) == 2 and not by_frame and picture.frames > 1:
                raise self._unknown(path, z)
            if stack.kernel and not self._halved(picture, size):
                raise self._unknown(path, z)
            g = self._at(maps, Tokens(*size))  # (S, N, f, h, w)
            g = g.movedim(1, -1)
            return g.flatten(0, 1) if by_frame else g[:, 0] if len(inner) == 2 else g
        raise self._unknown(path, z)

    @staticmethod
    def _halved(picture: Picture, size: Sequence[int]) -> bool:
        """Whether a convolution's output has the latent's proportions, up to rounding."""
        height, width = size[-2:]
        scale = max(picture.height / height, picture.width / width)
        return abs(picture.height - scale * height) <= 2 * scale and abs(picture.width - scale * width) <= 2 * scale

    def _sequence(self, path: str, maps: Tensor, count: int) -> Tensor:
        """``(S, count, N)`` for a sequence with `count` positions."""
        assert self._picture is not None
        selection = self.selection
        if selection is not None and selection.positions is not None and count == len(selection.positions):
            return self._sequence_of(path, maps, selection.length)[:, selection.positions.cpu()]
        return self._sequence_of(path, maps, count)

    def _sequence_of(self, path: str, maps: Tensor, count: int) -> Tensor:
        assert self._picture is not None
        layout, picture = self.layout, self._picture
        if layout is None:
            grid = grid_with(picture, self.patch, count)
            if grid is None:
                raise self._unknown(path, count)
            return self._flat(maps, grid)
        tokens = tokens_of(picture, self.patch)
        joint = layout.is_joint(path)
        if joint:
            starts = layout.starts(tokens.count, count, self._text_lengths)
        else:  # references follow the picture, or come before it
            starts = [max(0, count - layout.padded(tokens.count)) if layout.order == "picture last" else 0]
        if count < tokens.count or not starts:
            raise self._unknown(path, count)
        flat, other = self._flat(maps, tokens), self._pooled("mean")  # other: of references, registers and padding
        text, lengths = (self._pooled("mean", self.named), self._text_lengths or [0]) if joint else (other, [0])
        rows = max(len(flat), len(text), len(other), len(starts) if len(set(starts)) > 1 else 1)
        g = other.repeat(rows // len(other), 1)[:, None].repeat(1, count, 1)
        for row in range(rows):
            start, begin = starts[row % len(starts)], layout.text_start(tokens.count)
            g[row, begin : begin + lengths[row % len(lengths)]] = text[row % len(text)]
            g[row, start : start + tokens.count] = flat[row % len(flat)]
        return g

    def _flat(self, maps: Tensor, tokens: Tokens) -> Tensor:
        return self._at(maps, tokens).flatten(2).mT

    @staticmethod
    def _at(maps: Tensor, tokens: Tokens) -> Tensor:
        return resized(maps.flatten(0, 1), (tokens.frames, tokens.height, tokens.width)).unflatten(0, maps.shape[:2])

    def _same_everywhere(self, key: str | None, g: Callable[[], Tensor], stack: Stack, z: Tensor) -> Tensor:
        """Factors of experts ``(S, N)``, the same at all positions of `z`, as factors of units.

        Args:
            key: What the factors are, to keep them; ``None``: do not. g: Computes the factors of experts.
        """

        def compute() -> Tensor:
            units = g().index_select(-1, stack.owner.cpu())
            if len(units) not in (1, len(z)):
                units = units.repeat(len(z) // len(units), 1) if len(z) % len(units) == 0 else units.mean(0, True)
            ones = (1,) * (z.ndim - 2)
            return (units.view(*units.shape, *ones) if stack.kernel else units.view(len(units), *ones, -1)).to(z)

        return (
            compute() if key is None else self.cached((key, stack.layout, z.ndim, len(z), z.dtype, z.device), compute)
        )

    @contextmanager
    def selected(self, selection: Selection) -> Generator[None]:
        """Inside the block a part of a cross attention runs by itself."""
        self.selection = selection
        try:
            yield
        finally:
            self.selection = None

    def cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, kept while the picture, its parts and the acting experts stay the same."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def picture_positions(self, count: int) -> Tensor | None:
        """``(1 or B, count, N)`` values of the maps at the picture's positions; ``None`` if `count` fits no grid."""
        if self._picture is None or self._maps is None:
            return None
        grid = grid_with(self._picture, self.patch, count)
        return None if grid is None else self._flat(self._maps, grid)

    def _unknown(self, path: str, found: Any) -> MergeError:
        p = self._picture
        shape = tuple(found.shape) if isinstance(found, Tensor) else f"{found} positions"
        return MergeError(
            "A region cannot be laid on a layer: its positions are not those of the picture.",
            module=path,
            expected="" if p is None else f"a grid of {p.frames} x {p.height} x {p.width}, or a coarser one",
            found=f"{shape} in {self._class}",
            remedy="leave this layer out of the LoRAs, or remove the regions: this model's layout is not known",
        )
