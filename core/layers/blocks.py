"""Blocks of a model, told from the names of its layers alone: for reports, where no model is at hand."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..adapter import is_text_encoder

MANY = 48
"""With more blocks of the model than this, those inside of others (of a U-Net) are told of together."""
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")
# what names begin with that says nothing of the block
_ROOT = re.compile(r"^(lora_(unet|transformer)_+|(unet|transformer|diffusion_model|model)\.|base_model\.model\.)+")
_OUTSIDE = "outside of blocks"
FIRST, MIDDLE, LAST = "the first blocks", "the middle blocks", "the last blocks"
ALL, TEXT, REST = "the blocks", "the text encoders", "the layers outside of blocks"


@dataclass(frozen=True)
class ModelBlock:
    """A block of the model.

    Args:
        name: The common beginning of its layers' names.
        region: Which stretch of the model it lies in, to be said in a sentence: `FIRST`, `MIDDLE`, `LAST` (thirds of
            the blocks), `ALL` where there are fewer than three, `TEXT`, `REST`.
        layers: Names of its layers, sorted.
    """

    name: str
    region: str
    layers: tuple[str, ...]


def blocks_of(layers: Iterable[str]) -> list[ModelBlock]:
    """Layers by blocks, in the order of the model.

    A block is the innermost numbered part of a name below which there are several kinds of layers
    (``transformer_blocks.0``, but not ``to_out.0`` or ``ff.net.0``), else the outermost numbered one. Of blocks more
    than `MANY` all are the outermost. Every text encoder is one part. Dotted and underscored names are read alike.
    """
    layers = sorted(set(layers))
    model = [name for name in layers if not is_text_encoder(name)]
    block = _innermost(model)
    if len(set(block.values())) > MANY:
        block = {name: next(iter(_numbered(name)), (_OUTSIDE, ""))[0] for name in model}
    block |= {name: _NUMBER.split(name)[0].rstrip("._") for name in layers if is_text_encoder(name)}
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        grouped[block[name]].append(name)
    ordered = sorted(grouped, key=_order)
    numbered = [name for name in ordered if name != _OUTSIDE and not is_text_encoder(name)]
    region = {name: _third(i, len(numbered)) for i, name in enumerate(numbered)}
    return [
        ModelBlock(name, region.get(name, REST if name == _OUTSIDE else TEXT), tuple(grouped[name])) for name in ordered
    ]


def short_names(parts_: Sequence[ModelBlock]) -> list[str]:
    """What to call the parts in a picture: ``down 0 attentions 1 transformer 0``; whole names where those are alike."""
    short = [_short(part.name) for part in parts_]
    return short if len(set(short)) == len(short) else [part.name for part in parts_]


def _short(name: str) -> str:
    if name == _OUTSIDE:
        return name
    if is_text_encoder(name):
        return re.sub(r"[._]text_model[._]encoder[._]layers$", "", name)
    words = re.split(r"[._](\d+)(?=[._]|$)", _ROOT.sub("", name))
    return " ".join(re.sub(r"[._]?blocks?$", "", word).strip("._") or word for word in words if word)


def _innermost(layers: Iterable[str]) -> dict[str, str]:
    found = {name: _numbered(name) for name in layers}
    below: dict[str, set[str]] = defaultdict(set)
    for levels in found.values():
        for path, child in levels:
            below[path].add(child)
    block: dict[str, str] = {}
    for name, levels in found.items():
        several = [path for path, _ in levels if len(below[path]) > 1]
        block[name] = several[-1] if several else levels[0][0] if levels else _OUTSIDE
    return block


def _numbered(name: str) -> list[tuple[str, str]]:
    """Beginnings of a name that end in a number, outermost first, each with what comes next."""
    # underscores inside a word cannot be told from those between words: there the rest up to the next number is next
    end = r"[^.]+" if "." in name else r".+?(?=_\d+(?:_|$)|$)"
    found: list[tuple[str, str]] = []
    for match in _NUMBER.finditer(name):
        child = re.match(end, name[match.end() + 1 :])
        found.append((name[: match.end()], child[0] if child else ""))
    return found


def _order(name: str) -> tuple[bool, bool, bool, list[tuple[int, str]]]:
    """As a model runs: U-Net names sort that way by themselves, Flux has its single blocks last."""
    words = [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]
    return is_text_encoder(name), name == _OUTSIDE, "single" in name, words


def _third(i: int, n: int) -> str:
    return ALL if n < 3 else (FIRST, MIDDLE, LAST)[3 * i // n]
