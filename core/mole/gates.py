"""Gates: how much of each expert to add, computed from features that a gate reads.

``g = softmax((W (f - m) / s + b) / tau)`` is the paper's gate, with its ``e`` as ``W``. Independent sigmoids can also
switch all experts off at once. ``m`` and ``s`` are mean and standard deviation of the features, measured before
training, so that one learning rate suits all gates.

Source: arXiv:2404.13628, section 3.2 (gating function) and eq. 10, 11 (balance loss).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import MergeError
from .concepts import ConceptDetector, at_least_float32

Granularity = Literal["network", "block", "layer", "matrix"]
Activation = Literal["sigmoid", "softmax", "softmax-null"]
Reads = Literal["text", "text-mean", "hidden", "experts", "flat", "token"]
READS_TEXT: tuple[Reads, ...] = ("text", "text-mean")  # the text conditioning
READS_LAYER_INPUT: tuple[Reads, ...] = ("hidden", "token")  # the input of a block or layer


class GateSettings(BaseModel):
    """Kind of gates.

    Args:
        granularity: One gate for the whole ``network``, per ``block``, per ``layer`` (an attention or a feed-forward)
            or per weight ``matrix``.
        activation: ``softmax`` over the experts with a learnable temperature (the paper's), ``softmax-null`` with an
            additional share for no expert, or one ``sigmoid`` per expert, up to `ceiling`.
        reads: ``text``: which experts' concepts the model's text conditioning names, token by token, see
            `core.mole.concepts`. ``text-mean``: the mean of the text conditioning over all tokens; such gates close
            when a prompt gets longer. ``hidden``: the input of the block (or layer), normalised at every position,
            mean over positions. ``experts``: the experts' own normalised outputs, mean
            over positions (the paper's input, made independent of image size). ``flat``: the same without the mean, all
            positions in a row (as published); works only for the number of positions it was trained with. ``token``:
            the input of the block (or layer) at each position, normalised; every position has its own gate values; for
            sequences.
        ceiling: Largest value of a sigmoid gate. It starts at 1, the plain sum.
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
    """One gate: features ``(.., F)`` to gate values ``(.., N)``, float32. Starts at `GateSettings.even`.

    Args:
        features: Number of features `F`. experts: Number of experts `N`.
        settings: Only `activation` and `ceiling` are used.
        mean: ``(F,)``, mean of the features before training; default 0.
        spread: ``(F,)``, positive, their standard deviation; default 1.
        owner: ``(F,)`` long, the expert that each feature belongs to, ascending (again from the first at every
            position); ``None`` if features belong to no expert.
        layer: Path of the layer whose input the gate reads (``hidden``, ``token``): the first of its scope that an
            expert changes; ``""`` if it reads a block's input or something else.
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

        Drops the rows of the other experts, and the features that belong to them. Features stay sorted by expert.
        """
        columns, owner = torch.arange(self.features), None
        if self.owner is not None:
            old_owner = self.owner.cpu()
            new_index = torch.full((self.experts,), -1)
            new_index[list(keep)] = torch.arange(len(keep))
            # in ``flat`` features the next position begins wherever the owner decreases
            position = torch.cat([old_owner[:1] * 0, (old_owner[1:] < old_owner[:-1]).cumsum(0)])
            columns = torch.argsort(position * self.experts + new_index[old_owner], stable=True)
            columns = columns[new_index[old_owner][columns] >= 0]
            owner = new_index[old_owner][columns]
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


def rms_normalised(x: Tensor, dim: int = -1) -> Tensor:
    """`x`, features along `dim`, with every position divided by its root mean square; at least float32.

    So all positions count equally in a mean over positions. Some hidden states of a transformer (often of a text's
    first token) are a hundred times as large as the others without saying what the prompt asks for.
    """
    x = at_least_float32(x)
    return x * x.square().mean(dim, keepdim=True).clamp_min(1e-12).rsqrt()  # bounded: no gradient at 0


def feature_spread(variance: Tensor) -> Tensor:
    """Standard deviation of features ``(F,)``, bounded below: features that hardly varied must not be magnified."""
    spread = (variance + 0.01 * variance.mean()).sqrt()
    return torch.where(spread > 0, spread, torch.ones_like(spread))


def activate(logits: Tensor, log_temperature: Tensor, settings: GateSettings, experts: int) -> Tensor:
    """Logits ``(.., N)`` or ``(.., N + 1)`` to gate values ``(.., N)``; `log_temperature` must broadcast with them.

    Source: arXiv:2404.13628, section 3.2: ``g = softmax(logits / tau)``.
    """
    if settings.activation == "sigmoid":
        return settings.ceiling * torch.sigmoid(logits)
    return torch.softmax(logits / log_temperature.exp(), -1)[..., :experts]


class GateSet(nn.Module):
    """All gates of a mixture, by scope. Scopes without a gate mix evenly.

    Args:
        experts: Number of experts `N`.
        settings: Settings of all gates.
        gates: Scope (see `core.mole.scopes`) -> gate. Empty for an untrained set.
        detector: Reads the text conditioning for gates that read ``text``: their features are the experts' presence.

    Raises:
        MergeError: A gate or detector for another number of experts, or gates that read ``text`` without a detector.
    """

    def __init__(
        self,
        experts: int,
        settings: GateSettings | None = None,
        gates: Mapping[str, Gate] | None = None,
        detector: ConceptDetector | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.settings = experts, settings or GateSettings()
        self.names = tuple(gates or {})
        for name, gate in (gates or {}).items():
            if gate.experts != experts:
                raise MergeError(
                    "A gate was made for another number of LoRAs.", module=name, expected=experts, found=gate.experts
                )
        if detector is not None and len(detector.words) != experts:
            raise MergeError(
                "The concept detector was made for another number of LoRAs.",
                expected=experts,
                found=len(detector.words),
            )
        if gates and detector is None and self.settings.reads == "text":
            raise MergeError(
                "Gates that read the text need a concept detector.",
                remedy="train the gates, or fit a detector with core.train.detector",
            )
        self.detector = detector
        self._gates = nn.ModuleList((gates or {}).values())
        self._index = {name: i for i, name in enumerate(self.names)}

    def __getitem__(self, scope: str) -> Gate:
        return cast(Gate, self._gates[self._index[scope]])

    def get(self, scope: str) -> Gate | None:
        """The gate of a scope; ``None`` if it has none."""
        return self[scope] if scope in self._index else None

    @property
    def trained(self) -> bool:
        """Whether there are any gates; without them all scopes mix evenly."""
        return bool(self.names)

    def even(self, like: Tensor) -> Tensor:
        """``(1, N)`` on the device of `like`: the gate values of a scope without a gate."""
        return like.new_full((1, self.experts), self.settings.even(self.experts), dtype=torch.float32)

    def text_features(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """What the gates read of a text conditioning: ``(B, N)`` presence, or ``(B, F)``, the mean over tokens.

        Args:
            text: ``(B, T, F)``. mask: ``(B, T)`` bool, false for padding; not used by ``text-mean``.
        """
        if self.settings.reads == "text-mean":
            return at_least_float32(text).mean(1)
        if self.detector is None:  # untrained gates, which read nothing
            return text.new_zeros(len(text), self.experts, dtype=torch.float32)
        return self.detector(text, mask)

    def values(self, f: Tensor) -> list[Tensor]:
        """The values of all gates for the same features ``(B, F)``, in one product: ``(B, N)`` per name in `names`."""
        gates = [self[name] for name in self.names]
        weight, bias = torch.stack([g.weight for g in gates]), torch.stack([g.bias for g in gates])  # (G, rows, F)
        mean, spread = torch.stack([g.mean for g in gates]), torch.stack([g.spread for g in gates])
        x = (f.to(mean) - mean[:, None]) / spread[:, None]  # (G, B, F)
        temperature = torch.stack([g.log_temperature for g in gates])[:, None, None]
        return list(activate(torch.baddbmm(bias[:, None], x, weight.mT), temperature, self.settings, self.experts))

    def select(self, keep: Sequence[int]) -> GateSet:
        """The gates of a mixture that has only these experts. Softmax shares are renormalised in proportion.

        Source: arXiv:2404.13628, section 3.3 (flexibility at inference: experts masked without retraining).
        """
        detector = None if self.detector is None else self.detector.select(keep)
        return GateSet(len(keep), self.settings, {name: self[name].select(keep) for name in self.names}, detector)

    def copy(self) -> GateSet:
        """An independent copy with its own parameters."""
        return self.select(range(self.experts))


def balance_loss(values: Iterable[Tensor]) -> Tensor:
    """``L_balance = -log prod_i q_i`` with ``q_i = mean_m g_i^(m)``: smallest if all experts are used alike.

    Args:
        values: ``(B, N)`` per gate; the mean also runs over the batch.

    Source: arXiv:2404.13628 eq. 10, 11.
    """
    q = torch.stack([at_least_float32(value).mean(0) for value in values]).mean(0)
    return -q.clamp_min(1e-12).log().sum()


def entropy(values: Iterable[Tensor]) -> Tensor:
    """Mean entropy of the gates in nats, each normalised to sum to 1: ``log N`` for even gates, 0 for one expert."""
    entropies: list[Tensor] = []
    for value in values:
        p = value.float() / value.float().sum(-1, keepdim=True).clamp_min(1e-12)
        entropies.append(-(p * p.clamp_min(1e-12).log()).sum(-1).mean())
    return torch.stack(entropies).mean()
