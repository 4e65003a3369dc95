"""The kinds of models and gates that mixtures are tested with."""

from __future__ import annotations

import pytest
from legomole.core.mole.gates import GateSettings

from .models import InPlace, Transformer, UNet

MODELS = {"transformer": lambda: Transformer(1), "u-net": UNet, "in place": lambda: InPlace(1)}
READS = ("text", "text-mean", "hidden", "experts", "flat")
GRANULARITIES = ("network", "block", "layer", "matrix")
KINDS = [(reads, "delta", granularity) for reads in READS for granularity in GRANULARITIES] + [
    (reads, "output", "block") for reads in READS
]
each_kind = pytest.mark.parametrize(("reads", "mixing", "granularity"), KINDS)


def settings(reads: str, granularity: str = "layer", activation: str = "sigmoid") -> GateSettings:
    return GateSettings(reads=reads, granularity=granularity, activation=activation)
