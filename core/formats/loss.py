"""How much of an adapter a file has lost: by rounding to its dtype, and by an approximation at reading."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..adapter import Adapter
from ..lowrank import LowRank, product_energy


def energy_kept(original: Adapter, written: Adapter) -> float:
    """The share of an adapter's squared norm that its file reproduces, 0 to 1.

    What approximations at reading cut off (`LowRank.lost`) belongs to the adapter and is missing in the file.

    Args:
        original: The adapter as read from its source.
        written: The adapter as read back, under the same names.
    """
    error = total = 0.0
    summed = {name for name in original.modules if f"{name}.weight" in original.diffs and name not in written.modules}
    for name, part in original.modules.items():
        if name in summed:  # into the full difference, see `writing.state_dict_with_alpha`
            continue
        error += _difference(part, written.modules.get(name)) + part.lost
        total += part.energy() + part.lost
    for name, tensor in original.diffs.items():
        diff, module = tensor.double(), name.removesuffix(".weight")
        if module in summed:
            diff = diff + original.modules[module].delta().reshape(diff.shape)
        error += float((diff - _tensor(written.diffs, name, tensor)).square().sum())
        total += float(diff.square().sum())
    return max(0.0, 1.0 - error / total) if total > 0 else 1.0


def _difference(part: LowRank, other: LowRank | None) -> float:
    """``|delta - delta'|_F^2``, from the stacked factors."""
    if other is None:
        return part.energy()
    A = torch.cat([part.A.double(), other.A.double()])
    B = torch.cat([part.scale * part.B.double(), -other.scale * other.B.double()], 1)
    return product_energy(A, B)


def _tensor(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    return tensors[name].double() if name in tensors else torch.zeros_like(like, dtype=torch.float64)
