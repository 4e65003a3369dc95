"""Bring adapters to common module names, or raise an error that says why that is impossible."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import combinations

from ..adapter import CONFIG_KEY, Adapter, base_model, is_text_encoder
from ..errors import LegoMoleError, MergeError, name_some
from ..formats.peft_config import check_compatible
from .common_names import align_family
from .experts import unify_experts
from .keymap import KeyMap, apply_key_map, unmapped_modules
from .resolve import resolve
from .spelling import unify_spelling
from .widen import widen_inputs

KeyMapResolver = Callable[[Sequence[Adapter]], KeyMap]
_BLOCK_NUMBER = re.compile(r"\.\d+\.")


def align(adapters: Sequence[Adapter], *, key_map: KeyMapResolver | None = None) -> list[Adapter]:
    """The adapters under common module names, so that each layer, or part of a layer, has one name in all of them.

    Adapters that name their layers alike are returned unchanged: their names are those of the merged file. If the base
    model's family is known (see `families`), layers are those of its tables: a fused ``qkv`` here and a ``to_q`` there
    are divided at their common boundaries, and layers with several names get those of the first adapter's dialect, or
    of one that can name all parts. Adapters of one family may change different layers of it.

    In unknown families layers are compared by name. Where two adapters share no layer of the diffusion model (or of
    the text encoders), or each has kinds of layers that the other lacks (a fused ``qkv`` here, a ``to_q`` there), names
    that differ in prefix and punctuation only get one spelling. If that is not enough, the host's key map is used,
    provided that more layers are shared under its names.

    Adapters without a common layer may be merged where they are known to change parts of one model: one adapter of the
    text encoders only and one of the diffusion model only, in one dialect; PEFT folders that name the same base model
    and call its blocks alike; and adapters whose layers the key map finds in one network.

    Args:
        adapters: Adapters as loaded.
        key_map: A host's function from adapters to a key map; ``None`` where there is no host.

    Returns:
        The adapters, in order, renamed only where that is necessary.

    Raises:
        MergeError: The adapters share no layer, or are for different base models or vocabularies; or a file holds two
            different updates of one layer.
    """
    adapters = unify_experts(adapters)
    resolution = resolve(adapters)
    if resolution is not None:
        _check_shapes(adapters)
        result = widen_inputs(align_family(adapters, resolution))
        _check_shapes(result)
        check_compatible(result)
        return result
    result = adapters
    connected = _disjoint_pair(adapters) is None
    if not connected or _differ_in_kind(adapters):
        respelled = unify_spelling(adapters)
        gain = not connected or _shared_fraction(respelled) > _shared_fraction(adapters)
        if gain and _disjoint_pair(respelled) is None:
            result, connected = respelled, True
    host_map: KeyMap = {}
    if key_map is not None and len(adapters) > 1 and (not connected or _differ_in_kind(result)):
        try:
            host_map = key_map(adapters)
        except LegoMoleError:
            if not connected and not _name_one_base_model(adapters):
                raise
        renamed = [apply_key_map(adapter, host_map) for adapter in adapters]
        changed = any(new.layers != old.layers for new, old in zip(renamed, adapters, strict=True))
        # the files' own names are kept unless more layers are shared under the host's names
        if changed and (_shared_fraction(renamed) > _shared_fraction(result) * (1 + 1e-9) or not connected):
            result = renamed
    pair = _disjoint_pair(result)
    if pair is not None and not _belong_to_one_model(pair, adapters, host_map):
        first, second = pair
        raise MergeError(
            "Two LoRAs have no layer in common.",
            file=f"{first.source.path or first.label} and {second.source.path or second.label}",
            expected="LoRAs of the same base model",
            found=f"{first.source.format or '?'} names such as {name_some(first.modules, 2)}; "
            f"{second.source.format or '?'} names such as {name_some(second.modules, 2)}",
            remedy=_remedy(pair, key_map is not None),
        )
    result = widen_inputs(result)
    _check_shapes(result)
    check_compatible(result)
    return result


def _remedy(pair: tuple[Adapter, Adapter], has_key_map: bool) -> str:
    """What to do about two adapters without a common layer."""
    if any(CONFIG_KEY in adapter.metadata for adapter in pair):  # ComfyUI loads no language models
        return "check that both are for the same base model"
    if has_key_map:
        return "check that both are for the same base model; if they are, connect the model in ComfyUI"
    return (
        "check that both are for the same base model; if they are, connect the model in ComfyUI, or install diffusers "
        "(pip install 'legomole[diffusers]'), so that the names can be translated"
    )


def _components(adapter: Adapter) -> tuple[set[str], set[str]]:
    """Module names of the diffusion (or language) model, and of the text encoders."""
    text = {name for name in adapter.modules if is_text_encoder(name)}
    return set(adapter.modules) - text, text


def _disjoint_pair(adapters: Sequence[Adapter]) -> tuple[Adapter, Adapter] | None:
    """Two adapters that should share layers and do not, ``None`` if all are connected.

    Within the diffusion model, and within the text encoders, adapters are connected if they share a layer, directly or
    through others. An adapter of one component only belongs to one of the other component if both are in one dialect.
    """
    parts = [_components(adapter) for adapter in adapters]
    for component in (0, 1):
        having = [i for i, part in enumerate(parts) if part[component]]
        reached, waiting = set[str]().union(*(parts[i][component] for i in having[:1])), having[1:]
        while waiting:
            connected = [i for i in waiting if reached & parts[i][component]]
            if not connected:
                return adapters[having[0]], adapters[waiting[0]]
            reached = reached.union(*(parts[i][component] for i in connected))
            waiting = [i for i in waiting if i not in connected]
    for (first, first_parts), (second, second_parts) in combinations(zip(adapters, parts, strict=True), 2):
        comparable = any(a and b for a, b in zip(first_parts, second_parts, strict=True))
        if any(first_parts) and any(second_parts) and not comparable and _is_flat(first) != _is_flat(second):
            return first, second
    return None


def _is_flat(adapter: Adapter) -> bool:
    """Whether the module names are underscored rather than dotted."""
    return all("." not in name for name in adapter.modules)


def _belong_to_one_model(pair: tuple[Adapter, Adapter], originals: Sequence[Adapter], host_map: KeyMap) -> bool:
    """Whether two adapters without a common layer are known to change layers of one network.

    The host's key map has all their layers; or it is empty, and their configurations name one base model.
    """
    if not host_map:
        return _name_one_base_model(pair)
    roots = [{name.split(".", 1)[0] for name in _components(adapter)[0]} for adapter in pair]
    return not unmapped_modules(originals, host_map) and roots[0] == roots[1]


def _name_one_base_model(adapters: Sequence[Adapter]) -> bool:
    """Whether all are PEFT folders that name the same base model and call its blocks alike, if they have any."""
    bases = {base_model(adapter.metadata) if adapter.source.format == "peft" else None for adapter in adapters}
    blocks = [
        {_BLOCK_NUMBER.split(name)[0] for name in adapter.modules if _BLOCK_NUMBER.search(name)} for adapter in adapters
    ]
    return len(bases) == 1 and None not in bases and all(a & b or not a or not b for a, b in combinations(blocks, 2))


def _differ_in_kind(adapters: Sequence[Adapter]) -> bool:
    """Whether any two adapters each have a kind of layer that the other lacks."""
    kinds = [{re.sub(r"\d+", "#", name) for name in adapter.modules} for adapter in adapters]
    return any(a - b and b - a for a, b in combinations(kinds, 2))


def _shared_fraction(adapters: Sequence[Adapter]) -> float:
    """The fraction of output rows that several adapters change; equal for a fused layer and its split layers."""
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
                    found=f"{shape}{_base_model_note(other)} and {(part.d_out, part.d_in)}{_base_model_note(adapter)}",
                    remedy="merge only LoRAs trained for the same base model",
                )


def _base_model_note(adapter: Adapter) -> str:
    base = base_model(adapter.metadata)
    return "" if base is None else f" ({base})"
