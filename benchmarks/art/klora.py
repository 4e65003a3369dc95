"""K-LoRA, a run-time rival: in every layer and sampling step either the subject's or the style's LoRA acts.

Source: arXiv:2502.18461. A layer takes the subject's update if the sum of its ``K = r_c r_s`` largest absolute values,
divided by ``gamma``, exceeds the style's sum times ``alpha t + beta``, with the share `t` of the steps that are over.
``gamma`` is the mean over layers of the ratio of both updates' absolute sums.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from legomole.core.lowrank import LowRank
from legomole.nano.sampling import STEPS, sigmas
from torch import Tensor

from ..common import mean
from ..nano.methods import LoraSet

ALPHA, BETA = 1.5, 0.5


@dataclass(frozen=True)
class Choice:
    """Both updates of a layer, ``(d_out, d_in)``, and the share of the steps from which on the style's acts."""

    subject: Tensor
    style: Tensor
    turn: float

    def at(self, over: float) -> Tensor:
        """Return the update at the share `over` of the steps."""
        return self.subject if over < self.turn else self.style


def choices(subject: Mapping[str, LowRank], style: Mapping[str, LowRank]) -> dict[str, Choice]:
    """Return the choice of every layer that either LoRA has; a layer of one LoRA keeps its update in all steps."""
    both = {name: (subject[name].delta().float(), style[name].delta().float()) for name in subject if name in style}
    gamma = mean([(a.abs().sum() / b.abs().sum()).item() for a, b in both.values() if b.any()])
    result: dict[str, Choice] = {}
    for name, (a, b) in both.items():
        count = min(subject[name].rank * style[name].rank, a.numel())
        first, second = (x.abs().flatten().topk(count).values.sum().item() for x in (a, b))
        # the subject's acts while first / gamma > second (alpha t + beta)
        result[name] = Choice(a, b, (first / gamma / second - BETA) / ALPHA if second else math.inf)
    for part in (subject, style):
        for name in part.keys() - both.keys():
            delta = part[name].delta().float()
            result[name] = Choice(delta, delta, 0.0)
    return result


@contextmanager
def k_lora(loras: LoraSet, strength: float, _: Sequence[str]) -> Generator[Any]:
    """Let the LoRAs of a subject and a style, in this order, act by turns inside the block."""
    model = loras.transformer
    chosen = choices(*(adapter.modules for adapter in loras.adapters))
    weights = {name: model.get_submodule(name.removeprefix("transformer.")).weight for name in chosen}
    before = {name: weight.clone() for name, weight in weights.items()}
    levels, current = sigmas()[:-1], [-1]

    def turn(_: Any, args: Any, arguments: Mapping[str, Any]) -> None:
        step = int((levels - arguments["timestep"][0] / 1000).abs().argmin())
        if step != current[0]:
            current[0] = step
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(before[name] + strength * chosen[name].at(step / STEPS))

    handle = model.register_forward_pre_hook(turn, with_kwargs=True)
    try:
        yield model
    finally:
        handle.remove()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])
