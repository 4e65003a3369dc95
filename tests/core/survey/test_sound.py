"""Reports without a merge."""

from __future__ import annotations

import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank, concat
from legomole.core.merge.methods.concat import Concat
from legomole.core.survey.sound import NoMerge, merge_sound_layers


def test_a_report_without_a_merge_is_that_of_the_exact_sum():
    """Findings, norms and cosines; the LoRAs hold a spike, a common part and different ranks."""
    g = torch.Generator().manual_seed(0)
    shared = LowRank(torch.randn(2, 12, generator=g), torch.randn(10, 2, generator=g))
    adapters = []
    for rank, size in ((3, 500.0), (5, 1.0)):
        own = LowRank(torch.randn(rank, 12, generator=g), torch.randn(10, rank, generator=g))
        own.B[:, 0] *= size
        adapters.append(Adapter({"a": own, "b": concat([shared, own], [1.0, 0.2]), "c": shared}))
    merged = merge_sound_layers(adapters, Concat(), dtype=torch.float32).report
    plain = merge_sound_layers(adapters, NoMerge(), dtype=torch.float32).report
    assert plain.findings == merged.findings != ()
    assert plain.overlap() == merged.overlap()
    assert [module.norms for module in plain.modules] == [module.norms for module in merged.modules]
    assert {module.error for module in plain.modules} == {1.0}
