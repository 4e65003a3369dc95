"""Bring adapters to common module names, or say why they cannot be brought there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import combinations

from ..adapter import Adapter, base_model, is_text_encoder
from ..errors import LegoMoleError, MergeError, name_some
from ..formats.peft_config import check_together
from .keymap import KeyMap, rename, unmapped
from .spelling import respelled

_BLOCK = re.compile(r"\.\d+\.")
Resolver = Callable[[Sequence[Adapter]], KeyMap]


def align(adapters: Sequence[Adapter], *, key_map: Resolver | None = None) -> list[Adapter]:
    """The adapters under common module names.

    Adapters that name their layers alike are returned as they are: their names are those of the merged file. Where two
    of them share no layer of the diffusion model (or of the text encoders), or each has kinds of layers the other lacks
    (a fused ``qkv`` here, a ``to_q`` there), names that differ in prefix and punctuation only are spelled alike. If
    that is not enough, the host's key map is asked, and followed if more of the layers meet under it. An adapter of the
    text encoder alone and one of the diffusion model alone may be merged as long as they come in one dialect: they are
    disjoint parts of one model. So may PEFT folders that name the same base model and have blocks of it in common.

    Args:
        adapters: As loaded.
        key_map: A host's function from adapters to a key map; ``None`` where no host is at hand.

    Returns:
        The adapters, in order, renamed exactly where that was necessary.

    Raises:
        MergeError: Adapters without a common layer, or for different base models or vocabularies.
    """
    adapters = list(adapters)
    result = adapters
    met = _strangers(adapters) is None
    if not met or _differ_in_kind(adapters):
        spelled = respelled(adapters)
        if _strangers(spelled) is None and (not met or _shared(spelled) > _shared(adapters)):
            result, met = spelled, True
    known: KeyMap = {}
    if key_map is not None and len(adapters) > 1 and (not met or _differ_in_kind(result)):
        try:
            known = key_map(adapters)
        except LegoMoleError:
            if not met and not _one_base(adapters):
                raise
        renamed = [rename(adapter, known) for adapter in adapters]
        changed = any(new.layers != old.layers for new, old in zip(renamed, adapters, strict=True))
        # the same layers under other names are no gain: the files' own names are kept then
        if changed and (_shared(renamed) > _shared(result) * (1 + 1e-9) or not met):
            result = renamed
    strangers = _strangers(result)
    if strangers is not None and not _parts_of_one_model(strangers, adapters, known):
        first, second = strangers
        raise MergeError(
            "Two LoRAs have no layer in common.",
            file=f"{first.source.path or first.label} and {second.source.path or second.label}",
            expected="LoRAs of the same base model",
            found=f"{first.source.format or '?'} names such as {name_some(first.modules, 2)}; "
            f"{second.source.format or '?'} names such as {name_some(second.modules, 2)}",
            remedy="check that both are for the same base model; if they are, connect the model in ComfyUI"
            if key_map is not None
            else "install diffusers (pip install 'legomole[diffusers]') or connect the model in ComfyUI, "
            "so that the names can be translated",
        )
    _check_shapes(result)
    check_together(result)
    return result


def _components(adapter: Adapter) -> tuple[set[str], set[str]]:
    """Module names of the diffusion (or language) model, and of the text encoders."""
    text = {name for name in adapter.modules if is_text_encoder(name)}
    return set(adapter.modules) - text, text


def _strangers(adapters: Sequence[Adapter]) -> tuple[Adapter, Adapter] | None:
    """Two adapters that should have met and did not, or ``None`` when all are of one piece."""
    parts = [_components(adapter) for adapter in adapters]
    for side in (0, 1):
        having = [i for i, part in enumerate(parts) if part[side]]
        names, waiting = set[str]().union(*(parts[i][side] for i in having[:1])), having[1:]
        while waiting:
            near = [i for i in waiting if names & parts[i][side]]
            if not near:
                return adapters[having[0]], adapters[waiting[0]]
            names = names.union(*(parts[i][side] for i in near))
            waiting = [i for i in waiting if i not in near]
    kinds = [(bool(model), bool(text), _flat(adapter)) for (model, text), adapter in zip(parts, adapters, strict=True)]
    for i, j in combinations(range(len(adapters)), 2):
        met = any(a and b for a, b in zip(kinds[i][:2], kinds[j][:2], strict=True))
        if any(kinds[i][:2]) and any(kinds[j][:2]) and not met and kinds[i][2] != kinds[j][2]:
            return adapters[i], adapters[j]
    return None


def _flat(adapter: Adapter) -> bool:
    """Whether the names are underscored rather than dotted."""
    return all("." not in name for name in adapter.modules)


def _parts_of_one_model(strangers: tuple[Adapter, Adapter], originals: Sequence[Adapter], known: KeyMap) -> bool:
    """Whether both are known to have layers of the same network: merely disjoint ones then.

    The key map knows all layers; or it knows none, and the adapters say it themselves.
    """
    if not known:
        return _one_base(strangers)
    roots = [{name.split(".", 1)[0] for name in _components(adapter)[0]} for adapter in strangers]
    return not unmapped(originals, known) and roots[0] == roots[1]


def _one_base(adapters: Sequence[Adapter]) -> bool:
    """Whether all are PEFT folders that name the same base model and call its blocks alike, if they have any."""
    bases = {base_model(adapter.metadata) if adapter.source.format == "peft" else None for adapter in adapters}
    blocks = [{_BLOCK.split(name)[0] for name in adapter.modules if _BLOCK.search(name)} for adapter in adapters]
    return len(bases) == 1 and None not in bases and all(a & b or not a or not b for a, b in combinations(blocks, 2))


def _differ_in_kind(adapters: Sequence[Adapter]) -> bool:
    """Whether any two adapters each have a kind of layer that the other lacks."""
    kinds = [{re.sub(r"\d+", "#", name) for name in adapter.modules} for adapter in adapters]
    return any(a - b and b - a for a, b in combinations(kinds, 2))


def _shared(adapters: Sequence[Adapter]) -> float:
    """The share of output rows that more than one adapter changes; the same for a fused layer and its pieces."""
    rows: dict[str, list[int]] = {}
    for adapter in adapters:
        for name, part in adapter.modules.items():
            rows.setdefault(name, []).append(part.d_out)
    total = sum(max(sizes) for sizes in rows.values())
    return sum(max(sizes) for sizes in rows.values() if len(sizes) > 1) / total if total else 0.0


def _check_shapes(adapters: Sequence[Adapter]) -> None:
    first: dict[str, tuple[Adapter, tuple[int, int]]] = {}
    for adapter in adapters:
        for name, part in adapter.modules.items():
            other, shape = first.setdefault(name, (adapter, (part.d_out, part.d_in)))
            if shape != (part.d_out, part.d_in):
                raise MergeError(
                    "The LoRAs are for different base models.",
                    file=f"{other.source.path or other.label} and {adapter.source.path or adapter.label}",
                    module=name,
                    expected="the same layer shape (d_out, d_in) in all",
                    found=f"{shape}{_base(other)} and {(part.d_out, part.d_in)}{_base(adapter)}",
                    remedy="merge only LoRAs trained for the same base model",
                )


def _base(adapter: Adapter) -> str:
    base = base_model(adapter.metadata)
    return "" if base is None else f" ({base})"
