"""Blocks of a model by the names of its layers alone: for reports, where no model is at hand."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..adapter import is_text_encoder

MAX_INNER_BLOCKS = 48
"""If the model has more blocks than this, nested blocks (of a U-Net) are grouped by their outermost block."""
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")
# prefixes that do not identify a block
_ROOT = re.compile(r"^(lora_(unet|transformer)_+|(unet|transformer|diffusion_model|model)\.|base_model\.model\.)+")
_OUTSIDE = "outside of blocks"
FIRST, MIDDLE, LAST = "the first blocks", "the middle blocks", "the last blocks"
ALL, TEXT, REST = "the blocks", "the text encoders", "the layers outside of blocks"


@dataclass(frozen=True)
class ModelBlock:
    """A block of the model.

    Args:
        name: The common prefix of its layers' names.
        section: Section of the model, as words for a sentence: `FIRST`, `MIDDLE`, `LAST` (thirds of the blocks), `ALL`
            where there are fewer than three blocks, `TEXT`, `REST`.
        layers: Names of its layers, sorted.
    """

    name: str
    section: str
    layers: tuple[str, ...]


def blocks_of(layers: Iterable[str]) -> list[ModelBlock]:
    """Group layers into blocks, in the order of the model.

    A block is the innermost numbered prefix of a name under which there are several kinds of layers
    (``transformer_blocks.0``, but not ``to_out.0`` or ``ff.net.0``), else the outermost numbered prefix. If there are
    more than `MAX_INNER_BLOCKS`, all blocks are outermost prefixes. Each text encoder is one block. Dotted and
    underscored names give the same blocks.
    """
    layers = sorted(set(layers))
    model_layers = [name for name in layers if not is_text_encoder(name)]
    block = _innermost_blocks(model_layers)
    if len(set(block.values())) > MAX_INNER_BLOCKS:
        block = {name: next(iter(_numbered_prefixes(name)), (_OUTSIDE, ""))[0] for name in model_layers}
    block |= {name: _NUMBER.split(name)[0].rstrip("._") for name in layers if is_text_encoder(name)}
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        grouped[block[name]].append(name)
    ordered = sorted(grouped, key=_order)
    numbered = [name for name in ordered if name != _OUTSIDE and not is_text_encoder(name)]
    section = {name: _third(i, len(numbered)) for i, name in enumerate(numbered)}
    return [
        ModelBlock(name, section.get(name, REST if name == _OUTSIDE else TEXT), tuple(grouped[name]))
        for name in ordered
    ]


def short_names(blocks: Sequence[ModelBlock]) -> list[str]:
    """Names of blocks for figures: ``down 0 attentions 1 transformer 0``; full names if two short ones are equal."""
    short = [_short_name(block.name) for block in blocks]
    return short if len(set(short)) == len(short) else [block.name for block in blocks]


def _short_name(name: str) -> str:
    if name == _OUTSIDE:
        return name
    if is_text_encoder(name):
        return re.sub(r"[._]text_model[._]encoder[._]layers$", "", name)
    words = re.split(r"[._](\d+)(?=[._]|$)", _ROOT.sub("", name))
    return " ".join(re.sub(r"[._]?blocks?$", "", word).strip("._") or word for word in words if word)


def _innermost_blocks(layers: Iterable[str]) -> dict[str, str]:
    """Layer -> its block."""
    prefixes = {name: _numbered_prefixes(name) for name in layers}
    children: dict[str, set[str]] = defaultdict(set)
    for levels in prefixes.values():
        for prefix, child in levels:
            children[prefix].add(child)
    block: dict[str, str] = {}
    for name, levels in prefixes.items():
        with_several = [prefix for prefix, _ in levels if len(children[prefix]) > 1]
        block[name] = with_several[-1] if with_several else levels[0][0] if levels else _OUTSIDE
    return block


def _numbered_prefixes(name: str) -> list[tuple[str, str]]:
    """Prefixes of a name that end in a number, outermost first, each with the part of the name that follows."""
    # underscores within words cannot be told from those between words: there the part extends to the next number
    part = r"[^.]+" if "." in name else r".+?(?=_\d+(?:_|$)|$)"
    prefixes: list[tuple[str, str]] = []
    for match in _NUMBER.finditer(name):
        child = re.match(part, name[match.end() + 1 :])
        prefixes.append((name[: match.end()], child[0] if child else ""))
    return prefixes


def _order(name: str) -> tuple[bool, bool, bool, list[tuple[int, str]]]:
    """Sort key for the order of the model: alphabetical order fits U-Nets, Flux has its single blocks last."""
    words = [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]
    return is_text_encoder(name), name == _OUTSIDE, "single" in name, words


def _third(i: int, n: int) -> str:
    return ALL if n < 3 else (FIRST, MIDDLE, LAST)[3 * i // n]
