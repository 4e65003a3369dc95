"""From tensors by key to an Adapter: the part that all formats share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..adapter import Adapter, Source, check_finite
from ..errors import FormatError, name_some
from ..lowrank import LowRank, best_rank_k, concat, fold_tucker, reduce_to_width
from ..memory import is_out_of_memory
from . import convert
from .base_weights import BaseWeights
from .dora import DORA_REMEDY, dora_delta
from .suffixes import UNSUPPORTED, classify, role_of

AlphaLookup = Callable[[str, int], float | None]
"""(module, rank) -> alpha, for modules without an alpha key; ``None`` means scale 1."""

_KINDS = {".hada_": "LoHa", ".lokr_": "LoKr", ".": "full difference"}
_LOHA_ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def assemble(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: Source,
    *,
    convert_rank: int | None = None,
    alpha_of: AlphaLookup | None = None,
    base: BaseWeights | None = None,
) -> Adapter:
    """Assemble the tensors of a file into modules, diffs and extras.

    Args:
        tensors: Key -> tensor. They keep their dtype; factors are views of them.
        metadata: The file's string metadata.
        source: The adapter's source, which errors name.
        convert_rank: LoHa, LoKr and full differences become low-rank updates of this rank. ``None`` refuses LoHa and
            LoKr, and keeps full differences as diffs.
        alpha_of: Alpha of modules without an alpha key; ``None`` means scale 1 for all of them.
        base: Weights of the base model, with which DoRA becomes low-rank updates of `convert_rank`; ``None`` refuses
            it.

    Raises:
        FormatError: The adapter is not a low-rank sum, a factor has no partner, shapes do not fit, or the file holds
            no LoRA.
    """
    convert.check_convert_rank(convert_rank)
    roles, rest = classify(tensors)
    _check_kinds(roles, tensors, source, convert_rank, base)
    duplicates = [key for key in rest if role_of(key) is not None]
    if duplicates:
        raise FormatError(
            "The file holds one tensor twice, under two spellings of its key.",
            file=source.path or None,
            module=name_some(duplicates, 3),
            expected="one spelling, e.g. lora_A or lora_down",
            found=name_some([key for key in tensors if role_of(key) == role_of(duplicates[0])], 3),
            remedy="remove one of them, or export the LoRA again",
        )
    modules: dict[str, LowRank] = {}
    diffs: dict[str, Tensor] = {}
    for module, keys in roles.items():
        parts = {role: tensors[key] for role, key in keys.items()}
        try:
            updates = _updates(module, parts, convert_rank, alpha_of, base)
            if updates:
                modules[module] = updates[0] if len(updates) == 1 else concat(updates, [1.0] * len(updates))
            diffs.update(_diffs(module, parts, updates, convert_rank))
        except (FormatError, RuntimeError, ArithmeticError, LookupError, TypeError) as error:
            # e.g. a product of tensors that do not fit, an empty tensor, an alpha that is not a number
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            raise _add_location(error, source, keys) from error
    if not modules and not diffs:
        raise FormatError(
            "The file holds no LoRA.",
            file=source.path or None,
            expected="keys such as <layer>.lora_down.weight or <layer>.lora_A.weight",
            found=f"{len(tensors)} other keys: {name_some(tensors, 3)}" if tensors else "no tensors",
            remedy="choose a LoRA file; a whole checkpoint or an embedding cannot be merged as one",
        )
    adapter = Adapter(modules, diffs, {key: tensors[key] for key in rest}, metadata, source)
    if convert_rank is not None and (_not_low_rank(roles, tensors) or any("dora" in parts for parts in roles.values())):
        adapter = _with_approximation_note(adapter, roles, tensors, convert_rank)
    return adapter


def _unsupported_kind(kind: str, keys: Sequence[str], source: Source) -> FormatError:
    if kind == "T-LoRA":
        problem = "The file is a T-LoRA: its rank depends on the timestep, so no single LoRA has its effect."
        remedy = "use it in the program it was trained for, or train a plain LoRA"
    else:
        problem = f"The file is a LoRA of the kind {kind}, which does not add a low-rank matrix to a layer."
        remedy = "convert it in ComfyUI, as far as that can load it: connect the model and set a convert_rank"
        if source.format == "peft":
            remedy = "if PEFT can turn it into a LoRA, do that first: peft.save_as_lora(folder, model, rank=16)"
    return FormatError(problem, file=source.path or None, found=name_some(keys, 3), remedy=remedy)


def _with_approximation_note(
    adapter: Adapter, roles: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor], rank: int
) -> Adapter:
    """The adapter with the rank of its approximations in its source, and their loss in its notes."""
    kinds: dict[str, str] = {}  # module -> kind
    for module, parts in roles.items():
        keys = _not_low_rank({module: parts}, tensors)
        if "dora" in parts:
            kinds[module] = "DoRA"
        elif keys and module in adapter.modules:
            kinds[module] = next(kind for part, kind in _KINDS.items() if any(part in key for key in keys))
    updates = [adapter.modules[module] for module in kinds]
    note = convert.approximation_note(adapter.label, sorted(set(kinds.values())), updates, rank)
    return replace(adapter, source=replace(adapter.source, convert_rank=rank), notes=(*adapter.notes, note))


def _check_kinds(
    roles: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, Tensor],
    source: Source,
    convert_rank: int | None,
    base: BaseWeights | None,
) -> None:
    for kind in UNSUPPORTED:
        keys = [keys[kind] for keys in roles.values() if kind in keys]
        if keys:
            raise _unsupported_kind(kind, keys, source)
    dora = [keys["dora"] for keys in roles.values() if "dora" in keys]
    if dora and (base is None or convert_rank is None):
        raise FormatError(
            "This is a DoRA: it rescales the base model's weights, which are not in the file."
            if base is None
            else "This is a DoRA, which becomes a LoRA only by approximation.",
            file=source.path or None,
            found=f"{len(dora)} modules with magnitudes: {name_some(dora, 3)}",
            remedy=DORA_REMEDY,
        )
    if convert_rank is None:
        keys = [key for key in _not_low_rank(roles, tensors) if not key.endswith((".diff", ".w_norm"))]
        if keys:
            raise FormatError(
                "The file holds LoHa or LoKr, which become a LoRA only by approximation.",
                file=source.path or None,
                found=f"{len(keys)} keys: {name_some(keys, 3)}",
                remedy="allow it with a rank: --convert-rank 32 (convert_rank=32 in Python)",
            )


def _not_low_rank(roles: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys of LoHa, LoKr and full differences of matrices."""
    return [
        key
        for parts in roles.values()
        for role, key in parts.items()
        if role.startswith(("hada_", "lokr_")) or (role == "diff" and convert.is_matrix(tensors[key]))
    ]


def _updates(
    module: str,
    parts: Mapping[str, Tensor],
    convert_rank: int | None,
    alpha_of: AlphaLookup | None,
    base: BaseWeights | None,
) -> list[LowRank]:
    """All low-rank updates of a module: normally one."""
    alpha = _alpha(parts["alpha"]) if "alpha" in parts else None
    for role, tensor in parts.items():
        if convert_rank is not None and role.startswith(("hada_", "lokr_", "diff")):
            check_finite(tensor, f"{module} ({role})", "")  # decompositions of NaN fail with unclear errors
    updates: list[LowRank] = []
    if "down" in parts or "up" in parts or "mid" in parts:
        _require(parts, ("down", "up"))
        updates.append(_lora(module, parts, alpha, alpha_of))
    if "dora" in parts and base is not None and convert_rank is not None:
        return [_dora(module, parts, updates, convert_rank, base)]
    if convert_rank is not None and any(role.startswith("hada_") for role in parts):
        _require(parts, _LOHA_ROLES)
        updates.append(convert.loha(parts, alpha, convert_rank))
    if convert_rank is not None and any(role.startswith("lokr_") for role in parts):
        for index in (1, 2):
            if f"lokr_w{index}" not in parts:
                _require(parts, (f"lokr_w{index}_a", f"lokr_w{index}_b"))
        updates.append(convert.lokr(parts, alpha, convert_rank))
    if convert_rank is not None and "diff" in parts and convert.is_matrix(parts["diff"]):
        updates.append(convert.full(parts["diff"], convert_rank))
    if alpha is not None and not updates and not {"diff", "diff_b", "diff_m"} & set(parts):
        raise FormatError("An alpha has no factors.", expected="lora_down and lora_up beside it", found="alpha alone")
    return updates


def _require(parts: Mapping[str, Tensor], roles: Sequence[str]) -> None:
    """Raise unless a module has tensors of all these roles."""
    missing = [role for role in roles if role not in parts]
    if missing:
        raise FormatError(
            "A factor has no partner.",
            expected=" and ".join(roles),
            found=f"{' and '.join(sorted(parts))}, no {' and '.join(missing)}",
            remedy="the file is damaged or incomplete: export it again",
        )


def _alpha(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise FormatError("alpha is not one number.", expected="shape () or (1,)", found=tuple(tensor.shape))
    return float(tensor.reshape(()).item())


def _lora(module: str, parts: Mapping[str, Tensor], alpha: float | None, alpha_of: AlphaLookup | None) -> LowRank:
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    if min(down.ndim, up.ndim) < 2 or math.prod(up.shape[2:]) != 1:
        raise FormatError(
            "The factors do not have the shape of a LoRA.",
            expected="down (r, in, *kernel) and up (out, r, 1, ...)",
            found=f"down {tuple(down.shape)}, up {tuple(up.shape)}",
        )
    kernel = tuple(down.shape[2:])
    if mid is not None:
        if mid.ndim < 3 or math.prod(kernel) != 1 or tuple(mid.shape[:2]) != (up.shape[1], down.shape[0]):
            raise FormatError(
                "The Tucker core does not fit the factors.",
                expected="mid (r, r, *kernel), down (r, in, 1, 1)",
                found=f"mid {tuple(mid.shape)}, down {tuple(down.shape)}, up {tuple(up.shape)}",
            )
        kernel = tuple(mid.shape[2:])
        convert.check_factor_size(mid.numel() // max(1, mid.shape[1]) * math.prod(down.shape[1:]))
        down = fold_tucker(down, mid)
    if alpha is None and alpha_of is not None:
        alpha = alpha_of(module, down.shape[0])
    part = LowRank(down.flatten(1), up.flatten(1), alpha, kernel)
    # merging takes time proportional to the cube of the rank: hours, for a file of some kB
    return part if part.rank <= 4 * min(part.d_in, part.d_out) + 512 else reduce_to_width(part)


def _dora(
    module: str, parts: Mapping[str, Tensor], updates: Sequence[LowRank], convert_rank: int, base: BaseWeights
) -> LowRank:
    """The best update of rank `convert_rank` for a DoRA."""
    others = [role for role in parts if role.startswith(("hada_", "lokr_")) or role == "diff"]
    if not updates or others:
        raise FormatError(
            "Magnitudes of a DoRA without the plain factors of a LoRA cannot be converted here.",
            expected="lora_down and lora_up beside the magnitudes",
            found=" and ".join(sorted(parts)),
            remedy="convert it in ComfyUI with the model connected",
        )
    lora, magnitude = updates[0], parts["dora"]
    for tensor in (lora.A, lora.B, magnitude):
        check_finite(tensor, module, "")
    weight = base.weight(module, lora.d_out, lora.d_in)
    delta = dora_delta(weight, lora.scale * lora.B.double() @ lora.A.double(), magnitude, lora.kernel)
    A, B = best_rank_k(delta, min(convert_rank, *delta.shape))
    return convert.low_rank_of_total(A, B, lora.kernel, float(delta.square().sum()))


def _diffs(
    module: str, parts: Mapping[str, Tensor], updates: Sequence[LowRank], convert_rank: int | None
) -> dict[str, Tensor]:
    """The module's changes of whole parameters, without those that have become low-rank updates."""
    diffs: dict[str, Tensor] = {}
    for role in ("diff", "diff_b", "diff_m", "up_bias"):
        if role in parts and parts[role].is_complex():
            raise FormatError("A change of a parameter is complex.", expected="real numbers", found=parts[role].dtype)
    if "diff" in parts and (convert_rank is None or not convert.is_matrix(parts["diff"])):
        diffs[f"{module}.weight"] = parts["diff"]
    if "diff_m" in parts:
        diffs[f"{module}.modulation"] = parts["diff_m"]
    if "diff_b" in parts:
        diffs[f"{module}.bias"] = parts["diff_b"]
    if "up_bias" in parts:
        _require(parts, ("down", "up"))
        # PEFT scales the output of B including its bias
        scale, bias = updates[0].scale, parts["up_bias"]
        bias = bias if scale == 1.0 else (scale * bias.float()).to(bias.dtype)
        other = diffs.get(f"{module}.bias")
        diffs[f"{module}.bias"] = bias if other is None else other + bias
    return diffs


def _add_location(error: Exception, source: Source, keys: Mapping[str, str]) -> FormatError:
    """The error as a `FormatError` that names the file and the keys."""
    where = name_some(sorted(keys.values()), 4)
    if not isinstance(error, FormatError):
        return FormatError(
            "Tensors of a module do not fit together.", file=source.path or None, module=where, found=str(error)
        )
    return error.at(source.path or None, where)
