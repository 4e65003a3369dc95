"""Mixtures of experts in PEFT: LoRAs of single experts, and LoRAs of the parameter that holds all experts of a layer.

transformers 4 has a linear layer per expert, ``experts.3.gate_proj``. transformers 5 stacks them into parameters,
``experts.gate_up_proj (E, 2 d, d_in)`` and ``experts.down_proj``, which PEFT adapts by ``target_parameters``; PEFT
stacks adapters of the first kind when it loads them. In this engine every expert is a module of its own: those of a
parameter are named ``experts.gate_up_proj.3of8``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import FormatError, SaveError, name_some
from ..lowrank import LowRank
from .writing import fold_scale

SINGLE_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
# projections of single experts -> the parameter that holds them in transformers 5
_PARAMETER_OF = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "down_proj": "down_proj",
    "w2": "down_proj",
}
_PARTNER = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}
STACKED_EXPERT = re.compile(r"(.+)\.([^.]+)\.(\d+)of(\d+)")
# PEFT nests the wrappers of one module's parameters in the order in which transformers registers them
_REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")
_WRAPPER = ".base_layer"


# --- one linear layer per expert --------------------------------------------------------------------------------------


def equalise_ranks(modules: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The modules with one rank and scale for all experts of a projection, so that PEFT can stack them. Exact.

    Lower ranks are padded with zero units. Experts, and partners of fused projections, that are missing become zero.
    """
    result = dict(modules)
    for (layer, _), projections in _expert_groups(modules).items():
        parts = [part for experts in projections.values() for part in experts.values()]
        one_scale = len({part.scale for part in parts}) == 1
        count = 1 + max(index for experts in projections.values() for index in experts)
        for projection in [*projections]:
            partner = _PARTNER.get(projection)
            if partner is not None and partner not in projections:
                projections[partner] = {}
        for projection, experts in projections.items():
            model = next(iter(experts.values()), parts[0])
            rank = max((part.rank for part in experts.values()), default=1)
            scale = parts[0].scale if one_scale else 1.0
            for index in range(count):
                name = f"{layer}.{index}.{projection}"
                part = experts.get(index)
                if part is None:
                    zero = LowRank(model.A.new_zeros(rank, model.d_in), model.B.new_zeros(model.d_out, rank))
                    result[name] = replace(zero, alpha=_alpha_of(scale, rank))
                else:
                    result[name] = _padded(part if one_scale else fold_scale(part, name), rank)
    return {name: result[name] for name in sorted(result)}


def parameter_ranks(modules: Mapping[str, LowRank], r: int, lora_alpha: float) -> dict[str, tuple[int, float]]:
    """Rank and alpha of the parameters into which PEFT stacks single experts, where they are not the default.

    Args:
        modules: From `equalise_ranks`.
        r, lora_alpha: The configuration's. PEFT multiplies both by the number of projections that are fused.

    Returns:
        Regular expression for the parameter's name, as a key of ``rank_pattern`` -> (rank, alpha).
    """
    result: dict[str, tuple[int, float]] = {}
    for (layer, parameter), projections in _expert_groups(modules).items():
        parts = [next(iter(experts.values())) for experts in projections.values()]
        rank = sum(part.rank for part in parts)
        alpha = parts[0].scale * rank
        if (rank, alpha) == (r * len(parts), lora_alpha * len(parts)):
            continue
        # Mixtral's block_sparse_moe is called mlp in transformers 5
        path = layer.replace(".block_sparse_moe.", ".mlp.")
        result[f"^{re.escape(f'{path}.{parameter}')}"] = rank, alpha
    return result


def _expert_groups(modules: Mapping[str, LowRank]) -> dict[tuple[str, str], dict[str, dict[int, LowRank]]]:
    """(layer, parameter) -> projection -> number of the expert -> its update."""
    groups: dict[tuple[str, str], dict[str, dict[int, LowRank]]] = defaultdict(lambda: defaultdict(dict))
    for name in sorted(modules):
        if match := SINGLE_EXPERT.fullmatch(name):
            groups[match[1], _PARAMETER_OF[match[3]]][match[3]][int(match[2])] = modules[name]
    return groups


def _alpha_of(scale: float, rank: int) -> float | None:
    return None if scale == 1.0 else scale * rank


def _padded(part: LowRank, rank: int) -> LowRank:
    """The same update with zero units up to a rank."""
    missing = rank - part.rank
    if missing == 0:
        return part
    A = torch.cat([part.A, part.A.new_zeros(missing, part.d_in)])
    B = torch.cat([part.B, part.B.new_zeros(part.d_out, missing)], 1)
    return replace(part, A=A, B=B, alpha=_alpha_of(part.scale, rank))


# --- one parameter for all experts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StackedParameter:
    """A parameter in a file: its name in the model, and the name of its wrapper, which is the module in the file."""

    name: str
    wrapper: str


def stacked_parameters(modules: Iterable[str], targets: Sequence[str]) -> list[StackedParameter]:
    """The parameters that modules of a file adapt.

    Args:
        modules: Names of modules in the file.
        targets: The configuration's ``target_parameters``: names, or endings of names.

    Raises:
        FormatError: It is unclear which wrapper belongs to which parameter.
    """
    wrappers: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        owner = module
        while owner.endswith(_WRAPPER):
            owner = owner.removesuffix(_WRAPPER)
        wrappers[owner].append(module)
    result: list[StackedParameter] = []
    for owner, names in wrappers.items():
        ends = {end for target in targets if f".{owner}.{(end := target.split('.')[-1])}".endswith(f".{target}")}
        if not ends:
            continue
        if len(ends) != len(names) or (len(ends) > 1 and not ends <= set(_REGISTERED)):
            raise FormatError(
                "It is unclear which factors belong to which parameter.",
                module=name_some(sorted(names)),
                expected=f"factors for each of {', '.join(sorted(ends))}, and at most one name other than "
                f"{', '.join(_REGISTERED)}",
                found=f"factors of {len(names)} parameters",
            )
        # the wrapper of the parameter that is registered last is the outermost, without .base_layer
        order = sorted(ends, key=_registration)
        for end, wrapper in zip(order, sorted(names, key=len, reverse=True), strict=True):
            result.append(StackedParameter(f"{owner}.{end}", wrapper))
    nested = sorted({name for names in wrappers.values() for name in names if name.endswith(_WRAPPER)})
    unclear = [name for name in nested if name not in {parameter.wrapper for parameter in result}]
    if unclear or (targets and not result):
        raise FormatError(
            "It is unclear which factors belong to which parameter.",
            module=name_some(unclear) or None,
            expected="target_parameters that name the parameters of all wrapped modules",
            found=f"target_parameters {name_some(targets) or 'empty'}",
            remedy="weights and configuration are not of one adapter: download or export both again",
        )
    return result


def _registration(end: str) -> int:
    return _REGISTERED.index(end) if end in _REGISTERED else 0


def split_experts(name: str, A: Tensor, B: Tensor, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of each expert: name of its module -> ``(A (r, d_in), B (d_out, r))``, views of the parameter's.

    Args:
        name: Name of the parameter.
        A: ``(E r, d_in)``, the units of the first expert first. B: ``(d_out, r E)``, the first units of all experts
            first.
        rank: r.

    Raises:
        FormatError: Factors that are not of this rank.
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] % rank or A.shape[0] != B.shape[1] or not A.shape[0]:
        raise FormatError(
            "The factors do not have the rank in the configuration.",
            module=name,
            expected=f"A (E * {rank}, d_in) and B (d_out, {rank} * E) for E experts",
            found=f"A {tuple(A.shape)}, B {tuple(B.shape)}",
            remedy="weights and configuration are not of one adapter: download or export both again",
        )
    E = A.shape[0] // rank
    B_of = B.reshape(B.shape[0], rank, E)
    return {f"{name}.{e}of{E}": (A[e * rank : (e + 1) * rank], B_of[:, :, e]) for e in range(E)}


def parameter_of(module: str) -> str | None:
    """The parameter that a module is one expert of, ``None`` for other modules."""
    match = STACKED_EXPERT.fullmatch(module)
    return None if match is None else f"{match[1]}.{match[2]}"


@dataclass(frozen=True, eq=False)
class StackedUpdate:
    """The update of a parameter as PEFT stores it.

    Args:
        A: ``(E r, d_in)``. B: ``(d_out, r E)``, see `split_experts`.
        rank: r. alpha: Alpha of an expert.
    """

    A: Tensor
    B: Tensor
    rank: int
    alpha: float


def stack_experts(modules: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], dict[str, StackedUpdate]]:
    """Join the experts of each parameter again: the inverse of `split_experts`. Exact; missing experts become zero.

    Returns:
        Modules of other layers, unchanged; and parameter -> its update.
    """
    others: dict[str, LowRank] = {}
    experts: dict[str, dict[int, LowRank]] = defaultdict(dict)
    counts: dict[str, int] = {}
    for name, part in modules.items():
        if match := STACKED_EXPERT.fullmatch(name):
            parameter = f"{match[1]}.{match[2]}"
            experts[parameter][int(match[3])], counts[parameter] = part, int(match[4])
        else:
            others[name] = part
    stacked: dict[str, StackedUpdate] = {}
    for parameter, parts in experts.items():
        rank = max(part.rank for part in parts.values())
        if len({part.scale for part in parts.values()}) > 1:
            parts = {e: fold_scale(part, parameter) for e, part in parts.items()}
        model = next(iter(parts.values()))
        zero = replace(model, A=model.A[:1] * 0, B=model.B[:, :1] * 0, alpha=_alpha_of(model.scale, 1))
        padded = [_padded(parts.get(e, zero), rank) for e in range(counts[parameter])]
        A = torch.cat([part.A for part in padded])
        B = torch.stack([part.B for part in padded], 2).flatten(1)
        stacked[parameter] = StackedUpdate(A, B, rank, model.scale * rank)
    return others, stacked


def wrapper_names(parameters: Iterable[str]) -> dict[str, str]:
    """Parameter -> name of its wrapper in a file, see `stacked_parameters`.

    Raises:
        SaveError: Several parameters of one module whose order is unknown.
    """
    owners: dict[str, list[str]] = defaultdict(list)
    for parameter in parameters:
        owners[parameter.rpartition(".")[0]].append(parameter.rpartition(".")[2])
    result: dict[str, str] = {}
    for owner, ends in owners.items():
        if len(ends) > 1 and not set(ends) <= set(_REGISTERED):
            raise SaveError("The order of the parameters of a module is unknown.", module=owner, found=name_some(ends))
        for depth, end in enumerate(sorted(ends, key=_registration, reverse=True)):
            result[f"{owner}.{end}"] = owner + _WRAPPER * depth
    return result
