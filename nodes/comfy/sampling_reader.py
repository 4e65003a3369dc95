"""What a sampling step of ComfyUI tells of the model's passes: areas of conditioning, and how far sampling has come."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from ...core.errors import MergeError
from ...core.mole.regions.picture import AttentionObserver, Part, Picture

_OVERRIDE = "optimized_attention_override"  # of transformer_options: calls the attention in place of ComfyUI


class ComfySamplingReader:
    """Implements `SamplingReader` for ComfyUI.

    Areas (Conditioning Set Area) are cut out of the latent before the model sees it; each sample of a pass carries the
    id of its conditioning, which has the area.

    Args:
        regions, labels: Per expert, its region and its name, see `Mixture`.
    """

    def __init__(self, regions: Sequence[Tensor | None] = (), labels: Sequence[str] = ()) -> None:
        self._several = {
            label: len(map_) for label, map_ in zip(labels, regions, strict=True) if map_ is not None and len(map_) > 1
        }  # number of maps of experts with more than one
        self._whole: tuple[int, int, int] | None = None  # (frames, height, width) of the latent that is sampled
        self._areas: dict[Any, tuple[int, int]] = {}  # id of a conditioning -> (top, left)
        self._sampling: Any = None
        self._step = 0

    def begin_run(self) -> None:
        """Count steps from the beginning."""
        self._step = 0

    def begin_step(self, model: Any, conds: Sequence[Any], latent: Tensor) -> None:
        """Read the conditioning of a step.

        Args:
            model: The BaseModel. conds: Per prompt, its conditioning or ``None``. latent: ``(B, C, .., H, W)``.

        Raises:
            MergeError: An expert has several maps, and the batch another number of pictures.
        """
        self._step += 1
        frames = latent.shape[2] if latent.ndim == 5 else 1
        self._sampling, self._whole = model.model_sampling, (frames, latent.shape[-2], latent.shape[-1])
        for label, maps in self._several.items():
            if frames == 1 and maps != len(latent):
                raise MergeError(
                    f"The region of {label} is for another number of pictures.",
                    expected=f"one mask, or {len(latent)}, one per picture of the batch",
                    found=f"{maps} masks",
                )
        self._areas.clear()
        for part in (part for cond in conds if cond is not None for part in cond):
            area: Any = part.get("area")
            if area is not None:  # sizes, then positions, of the last dimensions; of an area for videos the first count
                positions = area[len(area) // 2 :][: latent.ndim - 2]
                self._areas[part.get("uuid")] = int(positions[-2]), int(positions[-1])

    def parts(self, arguments: Mapping[str, Any], picture: Picture) -> Sequence[Part] | None:
        """Implements `SamplingReader`.

        Raises:
            MergeError: The model sees a part of the picture that is no area of conditioning.
        """
        if self._whole is None:
            return None
        frames, *whole = self._whole
        same_frames = frames == picture.frames or not self._several  # a single map is the same in all frames
        if same_frames and whole == [picture.height, picture.width]:
            return None
        uuids: Sequence[Any] = (arguments.get("transformer_options") or {}).get("uuids") or ()
        if not same_frames or not uuids or any(uuid not in self._areas for uuid in uuids):
            raise MergeError(
                "A region cannot be laid on a part of the picture whose place is not known.",
                expected=f"a latent of {frames} x {whole[0]} x {whole[1]} (frames, height, width)",
                found=f"{picture.frames} x {picture.height} x {picture.width}",
                remedy="remove the regions, or the node that samples in tiles or context windows",
            )
        samples = max(picture.samples // len(uuids), 1)
        return [Part(*self._areas[uuid], whole[0], whole[1]) for uuid in uuids for _ in range(samples)]

    def reached(self, fraction: float, args: Sequence[Any], arguments: Mapping[str, Any]) -> bool:
        sigmas: Any = (arguments.get("transformer_options") or {}).get("sigmas")
        if sigmas is None or self._sampling is None:
            return fraction <= 0
        return float(sigmas.flatten()[0]) <= float(self._sampling.percent_to_sigma(fraction)) * (1 + 1e-6)

    def step(self, args: Sequence[Any], arguments: Mapping[str, Any]) -> int:
        return self._step

    @contextmanager
    def watch_attention(self, arguments: Mapping[str, Any], read: AttentionObserver) -> Generator[None]:
        """ComfyUI has several attention functions, and one place where they can be replaced."""
        options: Any = arguments.get("transformer_options")
        if options is None:
            yield
            return
        inner = options.get(_OVERRIDE)

        def attend(
            function: Any, query: Tensor, key: Tensor, value: Tensor, heads: int, *rest: Any, **more: Any
        ) -> Any:
            parts = (query, key) if more.get("skip_reshape") else (_by_head(query, heads), _by_head(key, heads))
            mask: Tensor | None = more.get("mask", rest[0] if rest else None)
            mask = mask[:, None] if mask is not None and mask.ndim == 3 else mask  # of all heads
            read(*parts, more.get("scale"), mask)
            call = function if inner is None else partial(inner, function)
            return call(query, key, value, heads, *rest, **more)

        options[_OVERRIDE] = attend
        try:
            yield
        finally:
            if inner is None:
                del options[_OVERRIDE]
            else:
                options[_OVERRIDE] = inner


def _by_head(x: Tensor, heads: int) -> Tensor:
    """``(B, T, heads d)`` as ``(B, heads, T, d)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
