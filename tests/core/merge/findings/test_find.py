"""All findings together: order, sound LoRAs, broken ones, and threads."""

from __future__ import annotations

import math

import pytest
import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.lowrank import LowRank
from legomole.core.merge.engine import merge
from legomole.core.merge.findings.find import without_broken_layers
from legomole.core.merge.findings.finding import lights
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.rank import Rank

from ....lora_files import KOHYA_FLUX, KOHYA_SD15, KOHYA_SDXL, Shapes
from .hand_made import adapter, part


def random_lora(seed: int, shapes: Shapes) -> Adapter:
    """As trainers begin: rows of length one, small columns; any rank, sizes within a factor of 1.3."""
    g = torch.Generator().manual_seed(seed)
    rank, size = int(torch.randint(4, 33, (1,), generator=g)), 0.01 * (1 + 0.3 * float(torch.rand(1, generator=g)))
    modules: dict[str, LowRank] = {}
    for name, (d_out, *d_in) in shapes.items():
        width = math.prod(d_in)
        A, B = torch.randn(rank, width, generator=g), torch.randn(d_out, rank, generator=g)
        modules[name] = LowRank(A / width**0.5, size * B, alpha=rank)
    return Adapter(modules, source=Source(f"lora{seed}.safetensors"))


@pytest.mark.parametrize("shapes", [KOHYA_SD15, KOHYA_SDXL, KOHYA_FLUX])
def test_nothing_is_found_in_twenty_sound_loras(shapes: Shapes):
    loras = [random_lora(seed, {name: shapes[name] for name in list(shapes)[:5]}) for seed in range(20)]
    assert merge(loras, Concat(), dtype=torch.float32).report.findings == ()
    for start in range(0, 20, 5):  # a few at a time, which are compared block by block
        assert merge(loras[start : start + 5], Concat(), dtype=torch.float32).report.findings == ()


def test_the_most_severe_comes_first_and_every_lora_has_a_light():
    spiked = adapter("lcm-lora", part(1, 1), part(99, 1), part(1, 1))
    quiet = adapter("quiet", part(0.1, 0.1, first=5), part(0.1, first=5), part(0.1, first=5))
    report = merge([spiked, quiet, adapter("sound", part(9, first=12))], Concat()).report
    assert [finding.level for finding in report.findings] == ["fault", "warning", "note"]
    assert [(label, light) for label, light, _ in lights(report.inputs, report.findings)] == [
        ("lcm-lora", "red"),
        ("quiet", "yellow"),
        ("sound", "green"),
    ]
    lines = [line for line in report.text().splitlines() if line.startswith("  fault:")]
    assert len(lines) == 1
    assert "To do: merge or convert it with cap 8" in lines[0]
    assert report.to_dict()["findings"][0].keys() == {
        *("kind", "loras", "layers", "value", "threshold", "text", "remedy")
    }


def test_the_method_does_not_change_what_is_found():
    loras = [adapter("a", part(1, 1), part(99, 1), part(1, 1)), adapter("b", part(1, 0.5), part(1, 1), part(9, 1))]
    exact, lego = (merge(loras, method).report.findings for method in (Concat(), Lego(Rank(2))))
    assert [(f.kind, f.loras, f.layers) for f in exact] == [(f.kind, f.loras, f.layers) for f in lego]
    assert [f.value for f in exact] == pytest.approx([f.value for f in lego], rel=1e-4)


def test_layers_with_nan_are_left_out_and_named():
    broken = adapter("a", part(1), part(float("nan")), part(float("inf")), part(2))
    (sound, other), (finding,) = without_broken_layers([broken, adapter("b", part(1))])
    assert sorted(sound.modules) == ["blocks.0.attn.q", "blocks.3.attn.q"]
    assert (finding.kind, finding.loras, finding.value) == ("not_finite", ("a",), 2)
    assert finding.layers == ("blocks.1.attn.q", "blocks.2.attn.q")
    assert list(other.modules) == ["blocks.0.attn.q"]


def test_a_diff_with_nan_is_left_out():
    a = Adapter({"x": part(1)}, {"x.bias": torch.tensor([float("nan")]), "y.bias": torch.ones(1)})
    (sound,), (finding,) = without_broken_layers([a])
    assert list(sound.diffs) == ["y.bias"]
    assert finding.layers == ("x.bias",)


def test_the_largest_finite_values_are_no_nan():
    huge = adapter("a", LowRank(torch.full((1, 8), 3e38), torch.full((8, 1), 3e38)))
    assert without_broken_layers([huge])[1] == ()
