"""Adapters kept apart and chosen while the model runs: trained gates, masks, and the routers of other papers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import FitSettings
from legomole.hosts.transformers.mixing import mixed
from legomole.hosts.transformers.training import train_gates
from torch import Tensor, nn

from .methods import Method, TaskAdapters

_EXAMPLES, _STEPS = 32, 100  # of the training of gates


@contextmanager
def _label_head(adapters: TaskAdapters) -> Generator[dict[int, int]]:
    """Reduce the head to the labels' tokens, which makes training several times as fast. Yields token -> number."""
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


def gated(reads: str, activation: str, granularity: str, *, balance: float = 0.0, off: Sequence[int] = ()) -> Method:
    """Mix the adapters with gates trained on a few labelled prompts of every task.

    Args:
        reads, activation, granularity: Kind of the gates, see `GateSettings`.
        balance: Weight of the balance loss.
        off: Experts that are switched off after the training.
    """
    settings = GateSettings.model_validate({"reads": reads, "activation": activation, "granularity": granularity})

    @contextmanager
    def use(adapters: TaskAdapters, strength: float) -> Generator[Any]:
        fit = FitSettings(steps=_STEPS, batch=8, balance=balance)
        gates = adapters.cached(_training(settings, fit, activation != "softmax"))
        mixture = Mixture(adapters.adapters, gates, scale=strength)
        with mixed(adapters.world.model, mixture.without(*off) if off else mixture):
            yield adapters.world.model

    return Method(use, "-", f"{_EXAMPLES} examples", fixed=True, whole=True)


@dataclass(frozen=True)
class _Experts:
    """Factors of a layer's experts.

    Args:
        place: Positions of the experts that have the layer.
        down: ``(R, d_in)``. up: ``(d_out, R)``, scales included. owner: ``(R,)``, an index into `place`.
    """

    place: list[int]
    down: Tensor
    up: Tensor
    owner: Tensor

    @classmethod
    def of(cls, adapters: TaskAdapters, name: str) -> _Experts:
        parts = {i: adapter.modules[name] for i, adapter in enumerate(adapters.adapters) if name in adapter.modules}
        owner = torch.repeat_interleave(torch.tensor([len(part.A) for part in parts.values()]))
        down = torch.cat([part.A for part in parts.values()])
        up = torch.cat([part.scale * part.B.float() for part in parts.values()], 1)
        dtype = adapters.world.model.dtype
        return cls(list(parts), down.to(dtype), up.to(dtype), owner)

    def delta(self, x: Tensor, gates: Tensor) -> Tensor:
        """``sum_i g_i B_i A_i x`` for gates ``(.., len(place))``."""
        return (gates.to(x)[..., self.owner] * (x @ self.down.mT)) @ self.up.mT

    def each(self, x: Tensor) -> Tensor:
        """``|B_i A_i x|`` for every expert, ``(.., len(place))``."""
        one_hot = torch.eye(len(self.place))
        return torch.stack([self.delta(x, row).float().norm(dim=-1) for row in one_hot], -1)

    def arrows(self) -> Tensor:
        """First right singular vector of each ``B_i A_i``, ``(len(place), d_in)``."""
        vectors: list[Tensor] = []
        for i in range(len(self.place)):
            rows = self.owner == i
            Q, R = torch.linalg.qr(self.down[rows].float().mT)
            vectors.append(Q @ torch.linalg.svd(self.up[:, rows].float() @ R.mT, full_matrices=False)[2][0])
        return torch.stack(vectors).to(self.down)


def arrow(top: int = 3) -> Method:
    """Arrow: at every layer and token the experts whose first right singular vectors are nearest to the input.

    Args:
        top: Number of experts that take part.

    Source: arXiv:2405.11157, also in PEFT, where all adapters must have the same layers.
    """

    @contextmanager
    def use(adapters: TaskAdapters, strength: float) -> Generator[Any]:
        model = adapters.world.model
        with ExitStack() as stack:
            for name in _names(adapters):
                hook = _arrow_hook(_Experts.of(adapters, name), top, strength)
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            yield model

    return Method(use, "-", whole=True)


def _arrow_hook(experts: _Experts, top: int, strength: float) -> Any:
    arrows = experts.arrows()

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        scores = (inputs[0] @ arrows.mT).abs().float()
        best = scores.topk(min(top, scores.shape[-1]), -1)
        gates = torch.zeros_like(scores).scatter_(-1, best.indices, best.values.softmax(-1))
        return output + strength * experts.delta(inputs[0], gates)

    return hook


Router = Callable[[Tensor, Tensor], Tensor]  # table rows (B, T) and mask -> gates (B, N)


def routed(router: Callable[[TaskAdapters], Router], data: str = "") -> Method:
    """Choose gates for each prompt before the model reads it.

    Args:
        router: Makes the function that chooses. data: See `Method`.
    """

    @contextmanager
    def use(adapters: TaskAdapters, strength: float) -> Generator[Any]:
        model, choose = adapters.world.model, adapters.cached(router)
        gates: list[Tensor] = []

        def read(_: nn.Module, __: tuple[Any, ...], inputs: dict[str, Tensor]) -> None:
            ids = inputs["input_ids"]
            with torch.no_grad():
                gates[:] = [choose(ids, inputs.get("attention_mask", torch.ones_like(ids)))]

        def adding(experts: _Experts) -> Any:
            return lambda _, inputs, output: (
                output + strength * experts.delta(inputs[0], gates[0][:, None, experts.place])
            )

        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(read, with_kwargs=True).remove)
            for name in _names(adapters):
                hook = adding(_Experts.of(adapters, name))
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            yield model

    return Method(use, "-", data, fixed=bool(data), whole=True)


def _classifier(adapters: TaskAdapters) -> Router:
    """Logistic regression on the mean state of the prompt: an adapter, or none."""
    from sklearn.linear_model import LogisticRegression

    world = adapters.world
    prompts = [(i, e.ids) for i, task in enumerate(adapters.tasks) for e in world.task(task).train[:_EXAMPLES]]
    prompts += [(len(adapters.tasks), rows) for rows in world.neutral]
    table = world.model.model.embed_tokens.weight
    features = torch.stack([_normalised(table[list(rows)].float()).mean(0) for _, rows in prompts])
    model = LogisticRegression(max_iter=1000).fit(features.numpy(), [i for i, _ in prompts])

    def choose(ids: Tensor, mask: Tensor) -> Tensor:
        weight = mask[..., None] / mask.sum(1)[:, None, None]
        mean = (_normalised(world.model.model.embed_tokens.weight[ids].float()) * weight).sum(1)
        chosen = torch.from_numpy(model.predict(mean.numpy()))
        return nn.functional.one_hot(chosen, len(adapters.tasks) + 1)[:, :-1].float()

    return choose


def _normalised(states: Tensor) -> Tensor:
    return states / states.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


def _logo(adapters: TaskAdapters, top: int = 3) -> Router:
    """LoGo: experts in proportion to the norm of what they would add in the last block, at the last token.

    Source: LoGo (ACL 2026), without training; one more pass of the base model per prompt.
    """
    world = adapters.world
    last = max(int(name.split(".")[2]) for name in _names(adapters))
    probed = {name: _Experts.of(adapters, name) for name in _names(adapters) if f".{last}." in name and "attn" in name}

    def choose(ids: Tensor, mask: Tensor) -> Tensor:
        scores = torch.zeros(len(ids), len(adapters.tasks))
        with ExitStack() as stack:
            for name, experts in probed.items():
                layer = world.model.get_submodule(name)
                hooks, layer._forward_hooks = layer._forward_hooks, OrderedDict()  # the probe sees the base model

                def probe(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor, experts: _Experts = experts) -> None:
                    scores[:, experts.place] += experts.each(inputs[0][:, -1])

                layer.register_forward_hook(probe)
                stack.callback(setattr, layer, "_forward_hooks", hooks)
            for name in set(_names(adapters)) - set(probed):
                layer = world.model.get_submodule(name)
                hooks, layer._forward_hooks = layer._forward_hooks, OrderedDict()
                stack.callback(setattr, layer, "_forward_hooks", hooks)
            world.model.model(input_ids=ids, attention_mask=mask, use_cache=False)
        best = scores.topk(min(top, scores.shape[1]), 1)
        return torch.zeros_like(scores).scatter_(1, best.indices, best.values / best.values.sum(1, keepdim=True))

    return choose


def _names(adapters: TaskAdapters) -> list[str]:
    return list(dict.fromkeys(name for adapter in adapters.adapters for name in adapter.modules))


ROUTED: dict[str, Method] = {
    "mole": gated("hidden", "softmax-null", "network"),
    "mole token": gated("token", "softmax-null", "matrix"),
    "mole, first expert off": gated("hidden", "softmax-null", "network", off=(0,)),
    "classifier": routed(_classifier, f"{_EXAMPLES} prompts"),
    "mole-paper": gated("experts", "softmax", "block", balance=0.5),
    "arrow": arrow(),
    "logo": routed(_logo),
}
