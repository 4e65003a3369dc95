"""Layers that one adapter widens: the other adapters' updates get zeros for the new inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..adapter import Adapter

_SUFFIX = ".reshape_weight"


def widen_inputs(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with updates as wide as the layers are after all adapters are loaded. Exact.

    A loader pads the weight with zeros to the shape in ``<module>.reshape_weight`` before it adds the update.
    """
    widths: dict[str, int] = {}
    for adapter in adapters:
        for key, tensor in adapter.extras.items():
            module = key.removesuffix(_SUFFIX)
            part = adapter.modules.get(module)
            if key.endswith(_SUFFIX) and part is not None and tensor.tolist() == [part.d_out, part.d_in]:
                widths[module] = max(part.d_in, widths.get(module, 0))
    result: list[Adapter] = []
    for adapter in adapters:
        wider = {
            module: replace(part, A=torch.nn.functional.pad(part.A, (0, width - part.d_in)))
            for module, width in widths.items()
            if (part := adapter.modules.get(module)) is not None and part.d_in < width and not part.kernel
        }
        result.append(replace(adapter, modules={**adapter.modules, **wider}) if wider else adapter)
    return result
