"""Blocks of a U-Net by the names of the block-weight loaders: BASE, IN01 .. IN11, MID, OUT00 .. OUT11, and presets."""

from __future__ import annotations

import re

from ..adapter import is_text_encoder

_STABILITY = re.compile(r"(?:^|[._])(input|output)_blocks[._](\d+)[._]")
_DIFFUSERS = re.compile(
    r"(?:^|[._])(down|up)_blocks[._](\d+)[._](attentions|resnets|downsamplers|upsamplers)[._](\d+)[._]"
)
_MID = re.compile(r"(?:^|[._])(middle_block|mid_block)[._]")
_OUT_DEEP, _OUT_SHALLOW = ("OUT03", "OUT04", "OUT05", "OUT06"), ("OUT07", "OUT08", "OUT09", "OUT10", "OUT11")
_IN_DEEP = ("IN05", "IN07", "IN08")

PRESETS: dict[str, frozenset[str]] = {
    "INS": frozenset(("BASE", "IN01", "IN02", "IN04")),
    "IND": frozenset(_IN_DEEP),
    "INALL": frozenset(("BASE", "IN01", "IN02", "IN04", *_IN_DEEP)),
    "MIDD": frozenset((*_IN_DEEP, "MID", *_OUT_DEEP)),
    "OUTD": frozenset(_OUT_DEEP),
    "OUTS": frozenset(_OUT_SHALLOW),
    "OUTALL": frozenset((*_OUT_DEEP, *_OUT_SHALLOW)),
}
"""Name of a preset -> the blocks that it keeps. Source: the preset file of sd-webui-lora-block-weight, in which they
have the weight 1 and all others 0."""
BLOCKS = ("BASE", *(f"IN{n:02}" for n in range(12)), "MID", *(f"OUT{n:02}" for n in range(12)))
"""Names of blocks; BASE are the text encoders."""


def unet_block(name: str) -> str | None:
    """The block of a layer, by its name in Stability's or diffusers' layout with dots or underscores.

    diffusers' ``down_blocks.i`` holds Stability's input blocks ``3 i + 1 ..`` (its downsampler is ``3 i + 3``), and
    ``up_blocks.i`` the output blocks ``3 i ..`` (its upsampler belongs to the last one).
    """
    if is_text_encoder(name):
        return "BASE"
    if _MID.search(name):
        return "MID"
    if (match := _STABILITY.search(name)) is not None:
        return _code(match[1] == "input", int(match[2]))
    if (match := _DIFFUSERS.search(name)) is None:
        return None
    down, outer, inner = match[1] == "down", int(match[2]), int(match[4])
    inner = 2 if match[3].endswith("samplers") else inner
    return _code(down, 3 * outer + inner + down)


def _code(into: bool, number: int) -> str:
    return f"{'IN' if into else 'OUT'}{number:02}"


def in_preset(term: str, name: str) -> bool:
    """Whether a layer is in a block or a preset, a name in `BLOCKS` or `PRESETS`."""
    block = unet_block(name)
    return block == term or block in PRESETS.get(term, ())
