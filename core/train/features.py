"""Calibrate: see what every gate reads, and build untrained gates of the right size and scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import MergeError
from ..mole.attach import Attachment
from ..mole.gates import Gate, GateSet, feature_spread

_FEATURES = 64  # as many as there were where the default learning rate was found


class _Moments:
    def __init__(self, owner: Tensor | None) -> None:
        self.owner = owner
        self.n, self.sum, self.square = 0, torch.zeros(()), torch.zeros(())

    def add(self, f: Tensor) -> None:
        f = f.detach().double().cpu()
        self.n += f.shape[0]
        self.sum, self.square = self.sum + f.sum(0), self.square + f.square().sum(0)


def standardise_features(attachment: Attachment, run: Callable[[], None]) -> GateSet:
    """Gates of the mean and spread that `run` shows them, all still even; the attachment goes on with them.

    Args:
        attachment: A mixture on its model. Its settings say what the gates read.
        run: Runs the model over prompts of every kind.

    Raises:
        MergeError: The model never reached a gate, or reads positions apart (``flat``) at differing sizes.
    """
    found: dict[str, _Moments] = {}

    def seen(scope: str, f: Tensor, owner: Tensor | None) -> None:
        moments = found.setdefault(scope, _Moments(None if owner is None else owner.cpu()))
        if moments.n and moments.sum.shape != f.shape[1:]:
            raise MergeError(
                "A gate reads something whose size changes.",
                module=scope or "(network)",
                expected=f"{tuple(moments.sum.shape)}",
                found=tuple(f.shape[1:]),
                remedy="use pictures (and prompts) of one size, or gates that read text, hidden or experts",
            )
        moments.add(f)

    bank = attachment.bank
    attachment.use(GateSet(bank.experts, bank.gates.settings))
    with torch.no_grad(), attachment.watch_inputs(seen):
        run()
    if not found:
        raise MergeError(
            "The model did not reach a single gate.",
            remedy="check that the LoRAs change layers that the model uses for these prompts",
        )
    gates: dict[str, Gate] = {}
    device = next(iter(bank.stacks.values())).D.device
    for scope, m in found.items():
        mean, spread = m.sum / m.n, feature_spread((m.square / m.n - (m.sum / m.n).square()).clamp_min(0))
        gates[scope] = Gate(
            len(mean),
            bank.experts,
            bank.gates.settings,
            mean=mean.float(),
            spread=spread.float(),
            owner=m.owner,
            layer=attachment.layers_read.get(scope, ""),
        )
    made = scale_features(GateSet(bank.experts, bank.gates.settings, gates)).to(device)
    attachment.use(made)
    return made


def scale_features(gates: GateSet) -> GateSet:
    """The same gates in place, their features scaled so that one learning rate suits any number of them.

    AdamW moves every weight by the learning rate, so a logit by that times the number of features: they are made to
    count as 64, whatever their number.
    """
    with torch.no_grad():
        for name in gates.names:
            gate = gates[name]
            scale = max(1.0, gate.features / _FEATURES)
            gate.spread.mul_(scale)
            gate.weight.mul_(scale)
    return gates
