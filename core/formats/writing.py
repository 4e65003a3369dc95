"""From an Adapter to tensors by key: the part that all formats share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import SaveError, name_some
from ..lowrank import LowRank

STALE = (
    "lora_adapter_metadata",  # its scale is in the tensors now, and would be applied a second time
    "ss_network_dim",
    "ss_network_alpha",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
)
"""Metadata that describes the tensors of an input, not those of the output."""


def cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """The tensor in another dtype.

    Raises:
        SaveError: A value is too large for the dtype.
    """
    result = tensor.to(dtype)
    if result is not tensor and dtype.itemsize < 4 and bool((~torch.isfinite(result.float())).any()):
        raise SaveError(
            f"A value is too large for {str(dtype).removeprefix('torch.')}.",
            module=key,
            expected=f"at most {torch.finfo(dtype).max:g}",
            found=f"{float(tensor.float().abs().max()):g}",
            remedy="save as bf16 or fp32",
        )
    return result


def cast_adapter(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter with factors and diffs in another dtype; extras keep theirs."""
    return replace(
        adapter,
        modules={
            name: replace(part, A=cast(part.A, dtype, name), B=cast(part.B, dtype, name))
            for name, part in adapter.modules.items()
        },
        diffs={name: cast(tensor, dtype, name) for name, tensor in adapter.diffs.items()},
    )


def fold_scale(part: LowRank, module: str) -> LowRank:
    """The same update with scale 1: the scale is multiplied into the factor where the dtype has room for it."""
    if part.scale == 1.0:
        return replace(part, alpha=None)
    peak_A, peak_B = (float(x.float().abs().max()) for x in (part.A, part.B))
    # shrink the larger factor or grow the smaller one: avoids overflow and underflow
    if (peak_A >= peak_B) == (abs(part.scale) < 1):
        return replace(part, A=cast(part.scale * part.A.float(), part.A.dtype, module), alpha=None)
    return replace(part, B=cast(part.scale * part.B.float(), part.B.dtype, module), alpha=None)


def unflatten(part: LowRank) -> tuple[Tensor, Tensor]:
    """Down and up factor in the shapes of files: 2-D for linear layers, with the kernel for convolutions."""
    if not part.kernel:
        return part.A, part.B
    down = part.A.reshape(part.rank, part.d_in // math.prod(part.kernel), *part.kernel)
    return down, part.B.reshape(part.d_out, part.rank, *(1 for _ in part.kernel))


_DIFF_KEYS = {"bias": "diff_b", "modulation": "diff_m"}  # parameter -> suffix of its difference


def processor_keys(module: str) -> tuple[str, str] | None:
    """Keys of down and up for XLabs' attention processors, whose readers know no other keys and no alpha."""
    if re.search(r"\.processor\.\w+_lora\d?$", module) is None:
        return None
    return f"{module}.down.weight", f"{module}.up.weight"


def state_dict_with_alpha(adapter: Adapter) -> dict[str, Tensor]:
    """``lora_down``, ``lora_up`` and ``alpha`` of every module; diffs as ``.diff``, ``.diff_b`` and ``.diff_m``.

    A module with a full difference has no factors beside it, of which loaders would use one or the other: the update is
    added to the difference.
    """
    state: dict[str, Tensor] = {}
    full = {name for name in adapter.modules if f"{name}.weight" in adapter.diffs}
    for name, part in adapter.modules.items():
        if name in full:
            continue
        processor = processor_keys(name)
        if processor is not None:
            state[processor[0]], state[processor[1]] = unflatten(fold_scale(part, name))
            continue
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = unflatten(part)
        state[f"{name}.alpha"] = torch.tensor(float(part.rank if part.alpha is None else part.alpha))
    for name, tensor in adapter.diffs.items():
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and module in full:
            tensor = _sum_of(tensor, adapter.modules[module], module)
        state[f"{module}.{_DIFF_KEYS.get(parameter, 'diff')}"] = tensor
    return add_extras(state, adapter)


def _sum_of(diff: Tensor, part: LowRank, module: str) -> Tensor:
    """A full difference of a layer's weight plus a low-rank update of the same weight."""
    if diff.numel() != part.d_out * part.d_in or diff.shape[0] != part.d_out:
        raise SaveError(
            "A full difference and factors of one layer have different shapes.",
            module=module,
            found=f"{tuple(diff.shape)} and {(part.d_out, part.d_in)}",
        )
    return cast(diff.float() + part.delta().reshape(diff.shape), diff.dtype, module)


def lora_B_biases(adapter: Adapter, format: str) -> dict[str, Tensor]:
    """The diffs as biases of B, where the lora_A/lora_B formats store them; zeros for modules without one.

    A loader enables such biases for all layers or for none.

    Raises:
        SaveError: A diff is not the bias of a module with factors.
    """
    biases = {name.removesuffix(".bias"): tensor for name, tensor in adapter.diffs.items() if name.endswith(".bias")}
    unstorable = [
        name
        for name in adapter.diffs
        if not name.endswith(".bias") or name.removesuffix(".bias") not in adapter.modules
    ]
    if unstorable:
        raise SaveError(
            f"The {format} format has no place for changes of norms and other whole parameters.",
            found=name_some(unstorable, 3),
            remedy="save as comfy or kohya, which have one",
        )
    if not biases:
        return {}
    return {
        name: biases[name] if name in biases else torch.zeros(part.d_out, dtype=part.B.dtype)
        for name, part in adapter.modules.items()
    }


def add_extras(state: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Add the adapter's extras under the keys of their input file."""
    clash = sorted(set(state) & set(adapter.extras))
    if clash:
        raise SaveError("Keys carried along clash with keys of the merge.", found=name_some(clash, 3))
    return {**state, **adapter.extras}


def check_names(adapter: Adapter, format: str, can_store: Callable[[str], bool], example: str) -> None:
    """Raise unless the format can store the adapter's module names.

    Raises:
        SaveError: Names of another dialect.
    """
    wrong = [name for name in adapter.layers if not can_store(name)]
    if wrong:
        raise SaveError(
            f"The layers are not named as the {format} format names them.",
            expected=f"names such as {example}",
            found=name_some(wrong, 3),
            remedy="keep the format of the input files, or rename the layers with a host's key map first",
        )


def string_metadata(metadata: Mapping[str, str], *excluded: str) -> dict[str, str]:
    """The metadata without some keys and without what described the tensors of the input, all values as strings."""
    return {key: str(value) for key, value in metadata.items() if key not in (*STALE, *excluded)}
