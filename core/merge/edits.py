"""Changes of one LoRA's content: layers to keep, and the cap of singular values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..adapter import Adapter
from ..errors import name_some
from .remedies import CappedLayer, cap_notes, cap_parts, check_remedies
from .tasks import plan_batches, pool_of
from .weights import matched_layers


@dataclass(frozen=True)
class Edits:
    """Changes of a LoRA.

    Args:
        only: Patterns of the layers to keep, see `layers_matching`; default all.
        cap: Limit of singular values, see `cap_limits`; default none.
    """

    only: str | None = None
    cap: float | None = None

    def apply(self, adapter: Adapter) -> Adapter:
        """Return the adapter with these changes, and with notes on them; tensors outside of layers stay.

        Raises:
            MergeError: A pattern that matches nothing, or a cap below 1.
            FormatError: NaN or infinity in the adapter.
        """
        check_remedies(self.cap, 0.0)
        if self.only is not None:
            adapter = _with_layers(adapter, self.only)
        return adapter if self.cap is None else _capped(adapter, self.cap)


def _with_layers(adapter: Adapter, pattern: str) -> Adapter:
    kept = set(matched_layers(adapter, pattern))
    modules = {name: part for name, part in adapter.modules.items() if name in kept}
    diffs = {name: diff for name, diff in adapter.diffs.items() if name.rpartition(".")[0] in kept}
    left_out = [name for name in adapter.layers if name not in kept]
    notes = (f"{len(left_out)} layers of {adapter.label} were left out: {name_some(left_out)}",) if left_out else ()
    return replace(adapter, modules=modules, diffs=diffs, notes=(*adapter.notes, *notes))


@torch.no_grad()
def _capped(adapter: Adapter, cap: float) -> Adapter:
    modules = dict(adapter.modules)
    changed: list[CappedLayer] = []
    ones = [dict.fromkeys(modules, 1.0)]
    for batch in plan_batches([adapter], ones):
        pool, _ = pool_of([adapter], batch, ones, torch.device("cpu"))
        parts, layers = cap_parts(pool, [[modules[name]] for name in batch.names], cap)
        modules |= {name: part for name, (part,) in zip(batch.names, parts, strict=True)}
        changed += layers
    return replace(adapter, modules=modules, notes=(*adapter.notes, *cap_notes([adapter], cap, changed)))
