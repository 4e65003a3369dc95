"""Adapters kept apart and chosen while the model runs: trained gates, masks, and the routers of other papers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import FitSettings
from legomole.hosts.transformers.mixing import mixed
from legomole.hosts.transformers.training import train_gates
from torch import Tensor, nn

from ..common import merged_in
from .methods import Method, TaskAdapters

_EXAMPLES = 32


@contextmanager
def _label_head(adapters: TaskAdapters) -> Generator[dict[int, int]]:
    """Reduce the model's head to the labels' tokens, which makes training several times as fast. Yields their numbers."""
    model = adapters.world.model
    tokens = sorted({token for task in adapters.tasks for token in adapters.world.task(task).first})
    head, model.lm_head = model.lm_head, nn.Linear(model.config.hidden_size, len(tokens), bias=False)
    model.lm_head.weight = nn.Parameter(head.weight[tokens].clone(), requires_grad=False)
    try:
        yield {token: i for i, token in enumerate(tokens)}
    finally:
        model.lm_head = head


@cache
def _training(gates: GateSettings, fit: FitSettings, others: bool) -> Callable[[TaskAdapters], GateSet]:
    """Return the same function for the same settings, so that `cached` trains each kind of gates once."""

    def compute(adapters: TaskAdapters) -> GateSet:
        world = adapters.world
        mixture = Mixture(adapters.adapters, GateSet(len(adapters.adapters), gates))
        with _label_head(adapters) as number:
            examples = [
                [(list(e.ids), [number[world.task(task).first[e.label]]]) for e in world.task(task).train[:_EXAMPLES]]
                for task in adapters.tasks
            ]
            neutral = [(list(rows[:-1]), [0]) for rows in world.neutral] if others else []
            settings = fit.model_copy(update={"seed": adapters.seed})
            return train_gates(world.model, mixture, examples, settings=settings, others=neutral).gates.gates

    return compute


def gated(reads: str, activation: str, granularity: str, *, balance: float = 0.0, steps: int = 100) -> Method:
    """Mix the adapters with gates trained on a few labelled prompts of every task.

    Args:
        reads, activation, granularity: Kind of the gates, see `GateSettings`.
        balance: Weight of the balance loss. steps: Training steps.
    """
    settings = GateSettings.model_validate({"reads": reads, "activation": activation, "granularity": granularity})
    fit = FitSettings(steps=steps, batch=8, balance=balance)

    @contextmanager
    def use(adapters: TaskAdapters, strength: float) -> Generator[Any]:
        gates = adapters.cached(_training(settings, fit, activation != "softmax"))
        with mixed(adapters.world.model, Mixture(adapters.adapters, gates, scale=strength)):
            yield adapters.world.model

    return Method(use, "-", f"{_EXAMPLES} examples", fixed=True, whole=True)


Router = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class _Experts:
    """Factors of a layer's experts: ``down (R, d_in)``, ``up (d_out, R)`` with scales, and the owner of each row."""

    down: Tensor
    up: Tensor
    owner: Tensor
    arrows: Tensor  # (N, d_in): first right singular vectors

    @classmethod
    def of(cls, adapters: TaskAdapters, name: str) -> tuple[_Experts, list[int]]:
        parts = [(i, a.modules[name]) for i, a in enumerate(adapters.adapters) if name in a.modules]
        scaled = [part.scale * part.B.float() for _, part in parts]
        dtype = adapters.world.model.dtype
        owner = torch.repeat_interleave(torch.tensor([len(part.A) for _, part in parts]))
        arrows = [_first_right(part.A.float(), B) for (_, part), B in zip(parts, scaled, strict=True)]
        down, up = torch.cat([part.A.to(dtype) for _, part in parts]), torch.cat([B.to(dtype) for B in scaled], 1)
        return cls(down, up, owner, torch.stack(arrows).to(dtype)), [i for i, _ in parts]


def _first_right(A: Tensor, B: Tensor) -> Tensor:
    """First right singular vector of ``B A``."""
    Q, R = torch.linalg.qr(A.mT)
    return Q @ torch.linalg.svd(B @ R.mT, full_matrices=False)[2][0]


def arrow(top: int = 3) -> Method:
    """Arrow: at every layer and token the experts whose first right singular vector is nearest to the input.

    Args:
        top: Number of experts that take part.

    Source: arXiv:2405.11157; PEFT's `ArrowConfig`, whose adapters must have the same layers.
    """

    def gates(x: Tensor, experts: _Experts) -> Tensor:
        scores = (x @ experts.arrows.mT).abs().float()
        n = min(top, scores.shape[-1])
        best = scores.topk(n, -1)
        return torch.zeros_like(scores).scatter_(-1, best.indices, best.values.softmax(-1))

    @contextmanager
    def use(adapters: TaskAdapters, strength: float) -> Generator[Any]:
        with ExitStack() as stack:
            for name in _names(adapters):
                experts, _ = _Experts.of(adapters, name)
                layer = adapters.world.model.get_submodule(name)
                stack.callback(layer.register_forward_hook(_adding(experts, gates, strength)).remove)
            yield adapters.world.model

    return Method(use, "-", fixed=True, whole=True)


def _names(adapters: TaskAdapters) -> list[str]:
    return list(dict.fromkeys(name for adapter in adapters.adapters for name in adapter.modules))


def _adding(experts: _Experts, gates: Callable[[Tensor, _Experts], Tensor], strength: float) -> Any:
    """Forward hook that adds the gated experts to a layer's output."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        g = gates(x, experts)[..., experts.owner].to(x)
        return output + strength * (g * (x @ experts.down.mT)) @ experts.up.mT

    return hook


ROUTED: dict[str, Method] = {
    "mole": gated("hidden", "softmax-null", "network"),
    "mole token": gated("token", "softmax-null", "network"),
    "mole-paper": gated("experts", "softmax", "block", balance=0.5),
    "arrow": arrow(),
}
