"""Layers by pattern: shell patterns, ready names of parts and blocks of a model, and ranges of blocks."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from ..adapter import is_text_encoder
from .blocks import FIRST, LAST, MIDDLE, blocks_of
from .unet_blocks import BLOCKS, PRESETS, in_preset

_ATTENTION = re.compile(r"attn|selfattention|encdecattention|(^|[._])attention[._]", re.IGNORECASE)
_CROSS = re.compile(r"attn2|cross_?attn|encdecattention", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"(^|[._])(ff|ffn|mlp|ff_context|feed_forward|proj_mlp|densereludense|fc1|fc2)([._]|$)", re.IGNORECASE
)
_CONVOLUTION = re.compile(r"(^|[._])(resnets|conv\w*|in_layers|out_layers|downsamplers|upsamplers|op)([._]|$)")
# Names of blocks in the layouts of Stability and of diffusers; underscores and dots separate words alike.
_DOWN = re.compile(r"(^|[._])(input_blocks|down_blocks)[._]")
_MID = re.compile(r"(^|[._])(middle_block|mid_block)[._]")
_UP = re.compile(r"(^|[._])(output_blocks|up_blocks)[._]")
_SINGLE = re.compile(r"(^|[._])single_(transformer_)?blocks[._]")
_DOUBLE = re.compile(
    r"(^|[._])double_blocks[._]|^(lora_transformer_|transformer\.|diffusion_model\.|base_model\.model\.)*transformer_blocks[._]"
)
_RANGE = re.compile(r"([A-Za-z_]+)\.(\d+)-(\d+)")

_BY_NAME: dict[str, Callable[[str], bool]] = {
    "attention": lambda name: _ATTENTION.search(name) is not None,
    "cross-attention": lambda name: _CROSS.search(name) is not None,
    "feed-forward": lambda name: _FEED_FORWARD.search(name) is not None and _ATTENTION.search(name) is None,
    "convolution": lambda name: _CONVOLUTION.search(name) is not None,
    "text-encoder": is_text_encoder,
    "unet-down": lambda name: _DOWN.search(name) is not None,
    "unet-mid": lambda name: _MID.search(name) is not None,
    "unet-up": lambda name: _UP.search(name) is not None,
    "double-blocks": lambda name: _DOUBLE.search(name) is not None,
    "single-blocks": lambda name: _SINGLE.search(name) is not None,
}
_BY_SECTION = {"first-blocks": FIRST, "middle-blocks": MIDDLE, "last-blocks": LAST}

_UNET = (*BLOCKS, *PRESETS)

PARTS = (*_BY_NAME, *_BY_SECTION, *_UNET)
"""Names of parts that can stand in place of a pattern."""
PARTS_TEXT = f"{', '.join((*_BY_NAME, *_BY_SECTION))}; for U-Nets also blocks and presets such as IN04 and MIDD"
"""The same, for errors."""


def layers_matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the layers that a pattern matches, in order.

    Args:
        pattern: Terms with commas between them; a leading ``!`` matches all other layers. A term is a shell pattern of
            layer names (``*attn2*``); a name of `PARTS`; or a range of blocks, ``WORDS.FIRST-LAST`` such as
            ``double_blocks.0-4``, ``layers.8-15`` or, for blocks of all kinds, ``blocks.0-9``. First, middle and last
            blocks are thirds of the blocks that `names` has.
        names: Layer names in any dialect.
    """
    matched = {name for term in _terms(pattern) for name in _matching_term(term, names)}
    return [name for name in names if (name in matched) != pattern.startswith("!")]


def unknown_terms(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the terms of a pattern that match no layer and are no name of a part: typing errors, most likely."""
    return [term for term in _terms(pattern) if term not in PARTS and not _matching_term(term, names)]


def _terms(pattern: str) -> list[str]:
    return [term.strip() for term in pattern.removeprefix("!").split(",")]


def _matching_term(term: str, names: Iterable[str]) -> list[str]:
    if term in _BY_NAME:
        return [name for name in names if _BY_NAME[term](name)]
    if term in _BY_SECTION:
        return [name for block in blocks_of(names) if block.section == _BY_SECTION[term] for name in block.layers]
    if term in _UNET:
        return [name for name in names if in_preset(term, name)]
    blocks = _RANGE.fullmatch(term)
    if blocks is None:
        return [name for name in names if fnmatch.fnmatchcase(name, term)]
    number = re.compile(rf"(?:^|[._]){re.escape(blocks[1])}[._](\d+)(?:[._]|$)")
    wanted = range(int(blocks[2]), int(blocks[3]) + 1)
    return [name for name in names if (match := number.search(name)) is not None and int(match[1]) in wanted]
