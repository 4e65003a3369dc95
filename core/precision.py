"""Matrix products in full float32 precision, whatever the program allows its backends."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# oneDNN's own switch for products in bfloat16, which torch does not report
_ONEDNN_MODES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")


def float32_is_exact(device: torch.device) -> bool:
    """Whether float32 matmuls on a device run in full precision.

    A program may have allowed TF32 or bfloat16 (`torch.set_float32_matmul_precision`, a backend's
    ``fp32_precision`` or ``allow_tf32``, oneDNN's environment variable), or may be inside an autocast block. The
    settings are only read: they are global, and other threads may depend on them.
    """
    if device.type not in ("cpu", "cuda") or torch.is_autocast_enabled(device.type):
        return False
    if any(os.environ.get(name, "").upper() not in ("", "STRICT") for name in _ONEDNN_MODES):
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # raised where the precision was set for a single backend
        return False


def exact_operand(X: Tensor) -> Tensor:
    """`X`, or a float64 copy where a float32 matmul with it would lose precision."""
    return X.double() if X.dtype == torch.float32 and not float32_is_exact(X.device) else X


def matmul(X: Tensor, Y: Tensor, out: Tensor | None = None) -> Tensor:
    """``X @ Y`` in full precision, in the dtype of `X`.

    Args:
        X: ``(..., n, m)``. Y: ``(..., m, p)``, the same dtype.
        out: ``(..., n, p)``, overwritten with the product.
    """
    if exact_operand(X) is X:
        return torch.matmul(X, Y, out=out)
    product = X.double() @ Y.double()
    return product.to(X.dtype) if out is None else out.copy_(product)
