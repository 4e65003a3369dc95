"""Region."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor
from torch.nn.functional import interpolate

from ...core.errors import MergeError
from ...core.pictures.regions import box_region, scaled_size, shown_region, with_soft_edges
from ..comfy import folders
from ..sockets import CATEGORY, LEGOMOLE_REGIONS, NamedRegion

_LONGEST = 512  # pixels of a box's mask, and of the preview; a model has far fewer positions
_SHOWN = 8  # images of a batch, or frames, in the preview
_GREY = 0.5  # of the preview without an image
_NO_LORA = "none"  # in the combo of LoRAs


class Region(io.ComfyNode):
    """Makes a mask that says where in the picture a LoRA acts, from a box or from a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_Region",
            display_name="Region",
            category=CATEGORY,
            description="The part of the picture in which a LoRA acts: a box, or a mask painted in the mask editor. "
            "Choose the LoRA here, or connect the mask to its number on MoLE Mix.",
            search_aliases=["regional lora", "mask", "box", "area", "attention couple", "regional prompt", "legomole"],
            is_output_node=True,  # it shows its region also before it is connected
            inputs=[
                _share("x", 0.0, "Left edge of the box, as a share of the picture's width."),
                _share("y", 0.0, "Upper edge of the box, as a share of the picture's height."),
                _share("width", 0.5, "Width of the box, as a share of the picture's width.", 0.01),
                _share("height", 1.0, "Height of the box, as a share of the picture's height.", 0.01),
                io.Boolean.Input(
                    "invert", default=False, tooltip="Everything but the box, or but the painted part of the mask."
                ),
                io.Float.Input(
                    "feather",
                    default=0.1,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Width of the soft edge, as a share of the picture's shorter side. 0: a hard edge. The "
                    "edges of two regions side by side add up to 1.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="A painted mask, e.g. of Load Image, in place of the box. Mask nodes of ComfyUI can change "
                    "it before, or the region after.",
                ),
                io.MultiType.Input(
                    "picture",
                    [io.Image, io.Latent],
                    optional=True,
                    tooltip="An image to show the region on, or the latent to sample: gives the region the picture's "
                    "shape. Without one a box is square, which only matters for soft edges.",
                ),
                io.Combo.Input(
                    "lora",
                    options=[_NO_LORA, *folders.file_names(folders.LORAS)],
                    default=_NO_LORA,
                    optional=True,
                    tooltip="The LoRA that acts in this region, wherever it is in the list. Connect regions to MoLE "
                    "Mix for it. none: connect MASK to the number of the LoRA instead.",
                ),
                LEGOMOLE_REGIONS.Input(
                    "regions", optional=True, tooltip="Regions of other LoRAs, from another Region, to add this one to."
                ),
            ],
            outputs=[
                io.Mask.Output("MASK", tooltip="The region, for MoLE Mix. 1 where the LoRA acts, 0 elsewhere."),
                LEGOMOLE_REGIONS.Output(
                    "regions",
                    display_name="regions",
                    tooltip="The incoming regions plus this one with its LoRA, for named_regions of MoLE Mix.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora: str | None = None) -> bool | str:
        return lora == _NO_LORA or folders.check_name(lora, folders.LORAS)

    @classmethod
    def execute(
        cls,
        x: float,
        y: float,
        width: float,
        height: float,
        invert: bool,
        feather: float,
        mask: Tensor | None = None,
        picture: Any = None,
        lora: str = _NO_LORA,
        regions: tuple[NamedRegion, ...] = (),
    ) -> io.NodeOutput:
        images = picture if isinstance(picture, torch.Tensor) else None
        shape = None if picture is None else _shape_of(picture)
        if mask is None:
            region = box_region(scaled_size(shape or (1, 1), _LONGEST), x, y, width, height)
        else:
            region = mask.detach().float().cpu().reshape(-1, *mask.shape[-2:]).clamp(0, 1)
        region = with_soft_edges(1 - region if invert else region, feather, shape)
        preview = shown_region(_background(images, shape or (region.shape[-2], region.shape[-1])), region[:_SHOWN])
        named = () if lora == _NO_LORA else (NamedRegion(lora, folders.lora_path(lora), region),)
        return io.NodeOutput(region, (*regions, *named), ui=ui.PreviewImage(preview, cls=cls))


def _share(name: str, default: float, tooltip: str, least: float = 0.0) -> Any:
    return io.Float.Input(
        name,
        default=default,
        min=least,
        max=1.0,
        step=0.01,
        display_mode=io.NumberDisplay.slider,
        tooltip=tooltip,
    )


def _shape_of(picture: Any) -> tuple[int, int]:
    """Height and width of an IMAGE in pixels, or of a LATENT in positions, which have the same aspect."""
    if isinstance(picture, torch.Tensor):
        return picture.shape[1], picture.shape[2]
    samples: Tensor = picture["samples"]
    if samples.ndim < 4:
        raise MergeError(
            "This latent is no picture.",
            expected="(batch, channels, height, width)",
            found=tuple(samples.shape),
            remedy="connect an image or an image's latent to picture, or nothing",
        )
    return samples.shape[-2], samples.shape[-1]


def _background(images: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """What the region is shown on, ``(B, H, W, 3)``: the images, or grey."""
    size = scaled_size(shape, _LONGEST)
    if images is None:
        return torch.full((1, *size, 3), _GREY)
    channels = images[:_SHOWN, ..., :3].detach().float().cpu().movedim(-1, 1)
    return interpolate(channels, size, mode="area").movedim(1, -1)
