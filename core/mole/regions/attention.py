"""Cross attention under regions: each position of the picture reads keys and values of the experts that act there.

Keys and values are computed from the text, so that they have no position. The attention runs once for every map, with
the keys and values of that map's experts, and only for the positions where the map is not 0:
``sum_m c_m(p) Attention_m(p)``, with the maps as ``c_m`` and ``c_0 = 1 - sum_m c_m`` for the attention without their
experts. With hard edges that is exact, and costs little: every position runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import MergeError
from ..forwards import ArgumentFinder, ReplacedForward
from ..gate_values import GateValues
from ..gates import READS_TEXT
from .factors import RegionFactors, Selection

_QUERY, _TEXT = ("x", "hidden_states"), ("context", "encoder_hidden_states", "y", "cond")


class _Run(NamedTuple):
    """One run of the attention.

    Args:
        experts: ``(N,)``, which experts change keys and values.
        weight: ``(1 or B, P, 1)``, the share of its output at its positions.
        positions: ``(P,)`` long; ``None``: all.
    """

    experts: Tensor
    weight: Tensor
    positions: Tensor | None


class CrossAttentionForward(ReplacedForward):
    """Replaced forward method of a cross attention whose keys or values experts with maps change.

    Args:
        module: The attention. gate_values: See `ReplacedForward`. path: Its path.
        regions: The factors. experts: The experts that change its keys or values.
    """

    def __init__(
        self, module: nn.Module, gate_values: GateValues, path: str, regions: RegionFactors, experts: Sequence[int]
    ) -> None:
        self.path, self.regions, self.experts = path, regions, experts
        super().__init__(module, gate_values)
        self.query, self.text = ArgumentFinder(self.inner, _QUERY), ArgumentFinder(self.inner, _TEXT)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active or not self.regions.has_maps:
            return self.inner(*args, **kwargs)
        inputs, text = (self.query.find(args, kwargs), *args[:1]), self.text.find(args, kwargs)
        x = next((value for value in inputs if isinstance(value, Tensor)), None)
        if x is None or x.ndim != 3 or text is None:
            return self.inner(*args, **kwargs)
        runs = self.regions.cached(
            ("runs", self.path, x.shape[1], x.device), lambda: self._runs(x, self._may_select(x, text, args, kwargs))
        )
        if runs is None:
            return self.inner(*args, **kwargs)
        out: Tensor | None = None
        for run in runs:
            sub_args, sub_kwargs = args, kwargs
            if run.positions is not None:
                sub = x.index_select(1, run.positions)
                sub_args = tuple(sub if value is x else value for value in args)
                sub_kwargs = {name: sub if value is x else value for name, value in kwargs.items()}
            with self.regions.selected(Selection(run.experts, run.positions, x.shape[1])):
                y: Any = self.inner(*sub_args, **sub_kwargs)
            if not isinstance(y, Tensor) or y.ndim != 3 or y.shape[1] != len(run.weight[0]):
                raise MergeError(
                    "A region cannot be laid on a cross attention: its output is no sequence of the picture.",
                    module=self.path,
                    expected=f"(batch, {x.shape[1]}, width)",
                    found=tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__,
                    remedy="remove the regions",
                )
            before: Tensor = y.new_zeros(len(y), x.shape[1], y.shape[2]) if out is None else out
            weighted = run.weight.to(y) * y
            out = before + weighted if run.positions is None else before.index_add(1, run.positions, weighted)
        return out

    def _may_select(self, x: Tensor, text: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the attention may run for some positions alone: nothing else that it gets has a position each."""
        gates = self.gate_values
        if gates.reads not in READS_TEXT and gates.gates_need_input:
            return False  # these gates read all positions
        others = [value for value in (*args, *kwargs.values()) if value is not x and value is not text]
        return not any(isinstance(value, Tensor) and x.shape[1] in value.shape for value in others)

    def _runs(self, x: Tensor, may_select: bool) -> list[_Run] | None:
        """The runs whose weighted sum is the attention's output; ``None`` if one run with all experts is enough."""
        m = self.regions.picture_positions(x.shape[1])  # (S, T, N)
        groups: dict[int, list[int]] = {}  # the experts of each map: several may share one
        for i, map_ in enumerate(self.regions.maps):
            if map_ is not None and i in self.experts:
                groups.setdefault(id(map_), []).append(i)
        if m is None or not groups:
            return None
        n = m.shape[-1]
        grouped = [i for members in groups.values() for i in members]
        always = torch.tensor([float(i not in grouped) for i in range(n)])
        shares = [m[..., members[0]] for members in groups.values()]
        parts = [(always, 1 - torch.stack(shares).sum(0))]
        for members, share in zip(groups.values(), shares, strict=True):
            parts.append((always + torch.tensor([float(i in members) for i in range(n)]), share))
        runs: list[_Run] = []
        for experts, share in parts:
            positions = None
            if not torch.compiler.is_compiling():  # a graph cannot depend on values: compiled, all positions run
                acts = (share.abs() > 1e-6).any(0)
                if not bool(acts.any()):
                    continue
                positions = acts.nonzero()[:, 0] if may_select and not bool(acts.all()) else None
            weight = share if positions is None else share[:, positions]
            runs.append(_Run(experts, weight[..., None].to(x), None if positions is None else positions.to(x.device)))
        return runs
