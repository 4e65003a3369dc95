"""Features: measure what every gate reads, and build untrained gates of the right size and scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import MergeError
from ..mole.attach import Attachment
from ..mole.gates import Gate, GateSet, feature_spread

MEASURED_EXAMPLES = 64  # number of examples that features are measured on
_REFERENCE_FEATURES = 64  # number of features with which the default learning rate was found


class _RunningMoments:
    """Number, sum and sum of squares of features, in float64 on the CPU."""

    def __init__(self, owner: Tensor | None) -> None:
        self.owner = owner
        self.n, self.sum, self.square = 0, torch.zeros(()), torch.zeros(())

    def add(self, f: Tensor) -> None:
        f = f.detach().double().cpu()
        self.n += f.shape[0]
        self.sum, self.square = self.sum + f.sum(0), self.square + f.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.n

    @property
    def variance(self) -> Tensor:
        return (self.square / self.n - self.mean.square()).clamp_min(0)


def standardise_features(attachment: Attachment, run: Callable[[], None]) -> GateSet:
    """Build gates that standardise the features they read during `run`; all gates are even.

    Args:
        attachment: A mixture on its model, which uses the new gates afterwards. Its settings say what gates read.
        run: Runs the model on prompts of every kind.

    Raises:
        MergeError: The model reached no gate, or gates read all positions in a row (``flat``) at different sizes.
    """
    moments: dict[str, _RunningMoments] = {}

    def add(scope: str, f: Tensor, owner: Tensor | None) -> None:
        of_scope = moments.setdefault(scope, _RunningMoments(None if owner is None else owner.cpu()))
        if of_scope.n and of_scope.sum.shape != f.shape[1:]:
            raise MergeError(
                "A gate reads an input whose size changes.",
                module=scope or "(network)",
                expected=f"{tuple(of_scope.sum.shape)}",
                found=tuple(f.shape[1:]),
                remedy="use images (and prompts) of one size, or gates that read text, hidden or experts",
            )
        of_scope.add(f)

    bank = attachment.bank
    detector = bank.gates.detector
    attachment.use(GateSet(bank.experts, bank.gates.settings, detector=detector))
    with torch.no_grad(), attachment.watch_inputs(add):
        run()
    if not moments:
        raise MergeError(
            "The model did not reach a single gate.",
            remedy="check that the LoRAs change layers that the model uses for these prompts",
        )
    gates: dict[str, Gate] = {}
    device = next(iter(bank.stacks.values())).D.device
    for scope, of_scope in moments.items():
        mean, spread = of_scope.mean, feature_spread(of_scope.variance)
        gates[scope] = Gate(
            len(mean),
            bank.experts,
            bank.gates.settings,
            mean=mean.float(),
            spread=spread.float(),
            owner=of_scope.owner,
            layer=attachment.layers_read.get(scope, ""),
        )
    scaled = scale_features(GateSet(bank.experts, bank.gates.settings, gates, detector)).to(device)
    attachment.use(scaled)
    return scaled


def scale_features(gates: GateSet) -> GateSet:
    """Scale the gates' features, in place, so that one learning rate suits any number of them.

    AdamW changes every weight by the learning rate, so a logit by that times the number of features. They are scaled to
    act like 64 features, however many there are.
    """
    with torch.no_grad():
        for name in gates.names:
            gate = gates[name]
            scale = max(1.0, gate.features / _REFERENCE_FEATURES)
            gate.spread.mul_(scale)
            gate.weight.mul_(scale)
    return gates
