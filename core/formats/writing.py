"""From an Adapter to named tensors: the part every format shares."""

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


def cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """The tensor in another dtype.

    Raises:
        SaveError: A number too large for it.
    """
    result = tensor.to(dtype)
    if result is not tensor and dtype.itemsize < 4 and bool((~torch.isfinite(result.float())).any()):
        raise SaveError(
            f"A number is too large for {str(dtype).removeprefix('torch.')}.",
            module=key,
            expected=f"at most {torch.finfo(dtype).max:g}",
            found=f"{float(tensor.float().abs().max()):g}",
            remedy="save as bf16 or fp32",
        )
    return result


def cast_adapter(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Factors and diffs in another dtype; extras stay as they are."""
    return replace(
        adapter,
        modules={
            name: replace(part, A=cast(part.A, dtype, name), B=cast(part.B, dtype, name))
            for name, part in adapter.modules.items()
        },
        diffs={name: cast(tensor, dtype, name) for name, tensor in adapter.diffs.items()},
    )


def folded(part: LowRank, module: str) -> LowRank:
    """The same update with scale 1: the scale goes into the factor that has room for it in its dtype."""
    if part.scale == 1.0:
        return replace(part, alpha=None)
    peak_A, peak_B = (float(x.float().abs().max()) for x in (part.A, part.B))
    # shrink the larger, grow the smaller: neither over- nor underflow
    if (peak_A >= peak_B) == (abs(part.scale) < 1):
        return replace(part, A=cast(part.scale * part.A.float(), part.A.dtype, module), alpha=None)
    return replace(part, B=cast(part.scale * part.B.float(), part.B.dtype, module), alpha=None)


def factors(part: LowRank) -> tuple[Tensor, Tensor]:
    """Down and up as files hold them: a convolution's kernel unfolded again."""
    if not part.kernel:
        return part.A, part.B
    down = part.A.reshape(part.rank, part.d_in // math.prod(part.kernel), *part.kernel)
    return down, part.B.reshape(part.d_out, part.rank, *(1 for _ in part.kernel))


def processor_keys(module: str) -> tuple[str, str] | None:
    """Keys of down and up for XLabs' attention processors, whose readers know no others and no alpha."""
    if re.search(r"\.processor\.\w+_lora\d?$", module) is None:
        return None
    return f"{module}.down.weight", f"{module}.up.weight"


def with_alpha(adapter: Adapter) -> dict[str, Tensor]:
    """``lora_down``, ``lora_up`` and ``alpha`` of every module; diffs as ``.diff`` and ``.diff_b``."""
    state: dict[str, Tensor] = {}
    for name, part in adapter.modules.items():
        processor = processor_keys(name)
        if processor is not None:
            state[processor[0]], state[processor[1]] = factors(folded(part, name))
            continue
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = factors(part)
        state[f"{name}.alpha"] = torch.tensor(float(part.rank if part.alpha is None else part.alpha))
    for name, tensor in adapter.diffs.items():
        module, _, parameter = name.rpartition(".")
        state[f"{module}.diff_b" if parameter == "bias" else f"{module}.diff"] = tensor
    return with_extras(state, adapter)


def low_rank_bias(adapter: Adapter, format: str) -> dict[str, Tensor]:
    """The diffs as biases of B, the only place lora_A/lora_B formats have for them; zero for the other modules.

    A loader turns such biases on for every layer or for none.

    Raises:
        SaveError: Diffs that are not the bias of a module with factors.
    """
    biases = {name.removesuffix(".bias"): tensor for name, tensor in adapter.diffs.items() if name.endswith(".bias")}
    lost = [
        name
        for name in adapter.diffs
        if name.removesuffix(".bias") not in adapter.modules or name not in {f"{module}.bias" for module in biases}
    ]
    if lost:
        raise SaveError(
            f"The {format} format has no place for changes of norms and other whole parameters.",
            found=name_some(lost, 3),
            remedy="save as comfy or kohya, which have one",
        )
    if not biases:
        return {}
    return {
        name: biases[name] if name in biases else torch.zeros(part.d_out, dtype=part.B.dtype)
        for name, part in adapter.modules.items()
    }


def with_extras(state: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Add the tensors that are carried along under the keys their file had."""
    clash = sorted(set(state) & set(adapter.extras))
    if clash:
        raise SaveError("Keys carried along clash with keys of the merge.", found=name_some(clash, 3))
    return {**state, **adapter.extras}


def demand_names(adapter: Adapter, format: str, fits: Callable[[str], bool], example: str) -> None:
    """Raise unless the format can say the adapter's module names.

    Raises:
        SaveError: Names of another dialect.
    """
    wrong = [name for name in adapter.layers if not fits(name)]
    if wrong:
        raise SaveError(
            f"The layers are not named as the {format} format names them.",
            expected=f"names such as {example}",
            found=name_some(wrong, 3),
            remedy="keep the format of the input files, or rename the layers with a host's key map first",
        )


def strings(metadata: Mapping[str, str], *without: str) -> dict[str, str]:
    return {key: str(value) for key, value in metadata.items() if key not in without}
