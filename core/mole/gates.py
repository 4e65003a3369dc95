"""Gates: how much of each expert goes in, decided from what a gate reads.

``g = softmax((W (f - m) / s + b) / tau)`` as published, with the paper's ``e`` as ``W``, or independent sigmoids, which
can turn every expert off at once. ``m`` and ``s`` are the mean and spread of what the gate read in a calibration pass,
so that one learning rate suits all gates.

Source: arXiv:2404.13628, section 3.2 (gating function) and eq. 10, 11 (balance loss).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import MergeError

Granularity = Literal["network", "block", "layer", "matrix"]
Activation = Literal["sigmoid", "softmax", "softmax-null"]
Reads = Literal["text", "hidden", "experts", "flat", "token"]
INPUT: tuple[Reads, ...] = ("hidden", "token")  # those that read what goes into a block or layer


class GateSettings(BaseModel):
    """What kind of gates.

    Args:
        granularity: One gate for the whole ``network``, per ``block``, per ``layer`` (an attention, a feed-forward) or
            per weight ``matrix``.
        activation: ``softmax`` over the experts with a learnable temperature (the paper's), ``softmax-null`` with one
            more place that stands for none of them, or one ``sigmoid`` per expert, up to `ceiling`.
        reads: ``text``: the model's text conditioning, mean over tokens. ``hidden``: the block's (or layer's) input,
            every position normalised, mean over positions. ``experts``: the experts' own normalised outputs, mean over
            positions (the paper's input, made independent of image size). ``flat``: the same of every position apart
            (as published); works only at the number of positions it was trained with. ``token``: the block's (or
            layer's) input at each position, normalised, which gets gates of its own; for sequences.
        ceiling: The largest value of a sigmoid gate. It starts at 1, the plain sum.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    granularity: Granularity = "layer"
    activation: Activation = "sigmoid"
    reads: Reads = "text"
    ceiling: float = Field(default=1.5, gt=1.0, le=100.0, allow_inf_nan=False)

    def even(self, experts: int) -> float:
        """The value of every gate before any training: 1 for sigmoids (the plain sum), equal shares for softmax."""
        return {"sigmoid": 1.0, "softmax": 1 / experts, "softmax-null": 1 / (experts + 1)}[self.activation]


class Gate(nn.Module):
    """One gate: features ``(.., F)`` to weights ``(.., N)``, float32. A new one gives `GateSettings.even`.

    Args:
        features: Number of features `F`. experts: Number of experts `N`.
        settings: The activation is taken from here.
        mean: ``(F,)``. spread: ``(F,)``, positive. Of the features in the calibration pass; default 0 and 1.
        owner: ``(F,)`` long: the expert a feature belongs to, ascending (at every position anew); ``None`` where they
            belong to none.
        layer: Path of the layer whose input it reads (``hidden``, ``token``), the first of its scope that an expert
            changed; ``""`` where it reads a block's input or something else.
    """

    mean: Tensor
    spread: Tensor
    owner: Tensor | None

    def __init__(
        self,
        features: int,
        experts: int,
        settings: GateSettings,
        *,
        mean: Tensor | None = None,
        spread: Tensor | None = None,
        owner: Tensor | None = None,
        layer: str = "",
    ) -> None:
        super().__init__()
        self.settings, self.experts, self.layer = settings, experts, layer
        rows = experts + (settings.activation == "softmax-null")
        start = -math.log(settings.ceiling - 1) if settings.activation == "sigmoid" else 0.0
        self.weight = nn.Parameter(torch.zeros(rows, features))
        self.bias = nn.Parameter(torch.full((rows,), start))
        self.log_temperature = nn.Parameter(torch.zeros(()), requires_grad=settings.activation != "sigmoid")
        self.register_buffer("mean", torch.zeros(features) if mean is None else mean.float())
        self.register_buffer("spread", torch.ones(features) if spread is None else spread.float())
        self.register_buffer("owner", owner)

    @property
    def features(self) -> int:
        return self.weight.shape[1]

    def logits(self, f: Tensor) -> Tensor:
        """``W (f - m) / s + b``: ``(.., N)``, or ``(.., N + 1)`` with the null expert last."""
        return nn.functional.linear((f.to(self.mean) - self.mean) / self.spread, self.weight, self.bias)

    def forward(self, f: Tensor) -> Tensor:
        return activate(self.logits(f), self.log_temperature, self.settings, self.experts)

    def select(self, keep: Sequence[int]) -> Gate:
        """The gate of a mixture that has only these experts, in this order.

        The rows of the others, and what it read of them, are gone. What it reads stays sorted by expert.
        """
        columns, owner = torch.arange(self.features), None
        if self.owner is not None:
            own = self.owner.cpu()
            place = torch.full((self.experts,), -1)
            place[list(keep)] = torch.arange(len(keep))
            # where the owner falls, the features of the next position begin (gates that read positions apart)
            position = torch.cat([own[:1] * 0, (own[1:] < own[:-1]).cumsum(0)])
            columns = torch.argsort(position * self.experts + place[own], stable=True)
            columns = columns[place[own][columns] >= 0]
            owner = place[own][columns]
        gate = Gate(
            len(columns),
            len(keep),
            self.settings,
            mean=self.mean.cpu()[columns],
            spread=self.spread.cpu()[columns],
            owner=owner,
            layer=self.layer,
        )
        rows = [*keep, *range(self.experts, self.weight.shape[0])]
        with torch.no_grad():
            gate.weight.copy_(self.weight.cpu()[rows][:, columns])
            gate.bias.copy_(self.bias.cpu()[rows])
            gate.log_temperature.copy_(self.log_temperature)
        return gate.to(self.weight.device)


def wide(x: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalised(x: Tensor, dim: int = -1) -> Tensor:
    """`x`, features along `dim`, with every position divided by its root mean square; at least float32.

    In the mean over positions then all count alike. In a transformer's stream some are a hundred times as large as the
    rest (a text's first token, often), and not those that say what is asked for.
    """
    x = wide(x)
    return x * x.square().mean(dim, keepdim=True).clamp_min(1e-12).rsqrt()  # bounded where the root has a gradient


def activate(logits: Tensor, log_temperature: Tensor, settings: GateSettings, experts: int) -> Tensor:
    """Logits ``(..., N)`` or ``(..., N + 1)`` to gates ``(..., N)``; `log_temperature` must broadcast with them."""
    if settings.activation == "sigmoid":
        return settings.ceiling * torch.sigmoid(logits)
    return torch.softmax(logits / log_temperature.exp(), -1)[..., :experts]


class GateSet(nn.Module):
    """All gates of a mixture, by the part of the model they rule. Parts without a gate of their own mix evenly.

    Args:
        experts: Number of experts `N`.
        settings: Of all gates.
        gates: Scope (see `core.mole.scopes`) -> gate. Empty for an untrained set.

    Raises:
        MergeError: A gate for another number of experts.
    """

    def __init__(
        self, experts: int, settings: GateSettings | None = None, gates: Mapping[str, Gate] | None = None
    ) -> None:
        super().__init__()
        self.experts, self.settings = experts, settings or GateSettings()
        self.names = tuple(gates or {})
        for name, gate in (gates or {}).items():
            if gate.experts != experts:
                raise MergeError(
                    "A gate belongs to another number of LoRAs.", module=name, expected=experts, found=gate.experts
                )
        self._gates = nn.ModuleList((gates or {}).values())
        self._place = {name: i for i, name in enumerate(self.names)}

    def __getitem__(self, scope: str) -> Gate:
        return self._gates[self._place[scope]]  # type: ignore[return-value]

    def get(self, scope: str) -> Gate | None:
        return self[scope] if scope in self._place else None

    @property
    def trained(self) -> bool:
        """Whether there are gates at all; without any the mix is even."""
        return bool(self.names)

    def even(self, like: Tensor) -> Tensor:
        """``(1, N)``: what a scope without a gate uses."""
        return like.new_full((1, self.experts), self.settings.even(self.experts), dtype=torch.float32)

    def values(self, f: Tensor) -> list[Tensor]:
        """All gates of the same features ``(B, F)`` in one product: a ``(B, N)`` per name of `names`."""
        gates: list[Gate] = list(self._gates)  # type: ignore[arg-type]
        weight, bias = torch.stack([g.weight for g in gates]), torch.stack([g.bias for g in gates])  # (G, rows, F)
        mean, spread = torch.stack([g.mean for g in gates]), torch.stack([g.spread for g in gates])
        x = (f.to(mean) - mean[:, None]) / spread[:, None]  # (G, B, F)
        temperature = torch.stack([g.log_temperature for g in gates])[:, None, None]
        return list(activate(torch.baddbmm(bias[:, None], x, weight.mT), temperature, self.settings, self.experts))

    def select(self, keep: Sequence[int]) -> GateSet:
        """The gates of a mixture that has only these experts. Softmax shares are renormalised in proportion.

        Source: arXiv:2404.13628, section 3.3 (flexibility at inference: experts masked without retraining).
        """
        return GateSet(len(keep), self.settings, {name: self[name].select(keep) for name in self.names})

    def copy(self) -> GateSet:
        """An independent copy with its own parameters."""
        return self.select(range(self.experts))


def balance_loss(values: Iterable[Tensor]) -> Tensor:
    """``-log prod_i q_i`` with ``q_i`` the mean of expert `i` over all gates: smallest when none is starved.

    Args:
        values: ``(B, N)`` per gate; the batch counts into the mean.

    Source: arXiv:2404.13628 eq. 10, 11.
    """
    q = torch.stack([wide(value).mean(0) for value in values]).mean(0)
    return -q.clamp_min(1e-12).log().sum()


def entropy(values: Iterable[Tensor]) -> Tensor:
    """Mean entropy in nats of the gates, each normalised to sum to one: ``log N`` when even, 0 when one rules."""
    each: list[Tensor] = []
    for value in values:
        p = value.float() / value.float().sum(-1, keepdim=True).clamp_min(1e-12)
        each.append(-(p * p.clamp_min(1e-12).log()).sum(-1).mean())
    return torch.stack(each).mean()
