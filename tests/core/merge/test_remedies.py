"""cap and equalize: by hand, by dense SVDs, and in merges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import legomole
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.formats import load
from legomole.core.lowrank import LowRank, truncated_svd
from legomole.core.merge.edits import Edits
from legomole.core.merge.engine import merge
from legomole.core.merge.methods import MergeMethod
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.rank import Rank
from legomole.core.merge.remedies import cap_limits, equalizing_factors

from .adapters import named, part
from .findings.hand_made import adapter
from .findings.hand_made import part as diagonal


@pytest.mark.parametrize(
    ("values", "limit"),
    [((9, 5, 3, 1), 6), ((9, 5, 3), 10), ((9, 5), 10), ((9,), 18), ((9, 5, 0, 0), 10), ((0, 0), 0)],
)
def test_the_limit_is_times_the_lower_median_of_what_is_not_zero(values: tuple[float, ...], limit: float):
    assert float(cap_limits(torch.tensor([values], dtype=torch.float64), 2.0)[0]) == limit


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.floats(1, 20), st.integers(0, 1000))
def test_values_above_the_limit_become_the_largest_within_it_and_vectors_stay(rank: int, cap: float, seed: int):
    update = part(rank, 12, 9, seed=seed, alpha=2.0)
    U, S, Vh = torch.linalg.svd(update.delta().double(), full_matrices=False)
    limit = cap * S[:rank].median()  # torch's median is the lower one
    allowed = S[limit * 1.002 >= S].max()
    capped = Edits(cap=cap).apply(Adapter({"a": update})).modules["a"]
    assert capped.rank == rank
    torch.testing.assert_close(capped.delta().double(), (U * S.clamp_max(allowed)) @ Vh, rtol=3e-3, atol=1e-4)


def test_layers_within_the_limit_stay_as_they_are_and_a_second_cap_changes_nothing():
    lora = named("a", {"spiked": diagonal(50, 1, 1), "sound": diagonal(5, 1, 1)})
    once = Edits(cap=8).apply(lora)
    assert once.modules["sound"] is lora.modules["sound"]
    assert "1 layers of a, which removes 99.9% of their energy: spiked" in once.notes[0]  # (2500 - 1) / 2502
    assert Edits(cap=8).apply(once).modules["spiked"] is once.modules["spiked"]
    half = Adapter({"a": lora.modules["spiked"].to(torch.float16)})
    once = Edits(cap=8).apply(half)
    assert once.dtype == torch.float16
    assert Edits(cap=8).apply(once).modules["a"] is once.modules["a"]


@pytest.mark.parametrize("method", [Concat(), Lego(Rank(3))])
def test_a_merge_with_a_cap_is_the_merge_of_capped_loras(method):
    a, b = adapter("a", diagonal(50, 1, 1), diagonal(2, 1)), adapter("b", diagonal(40, 2, 1, first=4), diagonal(3, 1))
    result = merge([a, b], method, [0.5, -2], cap=8)
    wanted = merge([Edits(cap=8).apply(a), Edits(cap=8).apply(b)], method, [0.5, -2])
    for name in result.adapter.modules:
        torch.testing.assert_close(result.adapter.modules[name].delta(), wanted.adapter.modules[name].delta())
    assert [finding.kind for finding in merge([a, b], method).report.findings][:2] == ["spike", "spike"]
    assert "spike" not in [finding.kind for finding in result.report.findings]
    assert sum(note.startswith("cap 8 lowered") for note in result.report.notes) == 2


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_equalize_by_share(share: float):
    """Norms 8 and 2, whose geometric mean is 4."""
    factors = equalizing_factors([8.0, 2.0, 0.0], share)
    assert factors == pytest.approx([0.5**share, 2.0**share, 1.0])
    loras = [adapter("a", diagonal(8)), adapter("b", diagonal(2, first=4))]
    report = merge(loras, Concat(), [1, 0.5], equalize=share).report
    assert report.modules[0].norms == pytest.approx((8 * 0.5**share, 0.5 * 2 * 2**share), rel=1e-5)
    assert report.weights == pytest.approx((0.5**share, 0.5 * 2**share))
    assert any(note.startswith("equalize") for note in report.notes) == (share > 0)


def test_equalize_hears_only_layers_that_take_part_and_what_the_cap_leaves():
    a = adapter("a", diagonal(100, 1, 1), diagonal(7))
    b = adapter("b", diagonal(2, first=4), diagonal(1, first=4))
    report = merge([a, b], Concat(), equalize=1.0, module_weights=[{"blocks.0.*": 0}, {"blocks.0.*": 0}]).report
    assert report.modules[0].norms == pytest.approx((7**0.5, 7**0.5), rel=1e-5)
    report = merge([a, b], Concat(), equalize=1.0, cap=2).report  # 1, 1, 1 and 7 against 2 and 1
    loud, quiet = math.sqrt(1 + 1 + 1 + 49), math.sqrt(4 + 1)
    mean = math.sqrt(loud * quiet)
    assert report.weights == pytest.approx((mean / loud, mean / quiet), rel=1e-4)


@pytest.mark.parametrize(("cap", "equalize"), [(0.5, 0), (float("nan"), 0), (float("inf"), 0), (None, -0.1), (None, 2)])
def test_settings_out_of_range(cap, equalize):
    with pytest.raises(MergeError):
        merge([adapter("a", diagonal(1))], Concat(), cap=cap, equalize=equalize)


def test_keeping_layers():
    lora = Adapter(
        {"x.attn.q": part(2), "x.mlp.w": part(2), "y.mlp.w": part(2)},
        {"x.attn.q.bias": torch.ones(6), "y.mlp.w.bias": torch.ones(6)},
    )
    kept = Edits(only="feed-forward").apply(lora)
    assert (list(kept.modules), list(kept.diffs)) == (["x.mlp.w", "y.mlp.w"], ["y.mlp.w.bias"])
    assert "1 layers of adapter were left out: x.attn.q" in kept.notes[0]
    assert Edits(only="*").apply(lora).notes == ()
    for pattern in ("atention", "text-encoder", "!*"):
        with pytest.raises(MergeError, match="matches nothing"):
            Edits(only=pattern).apply(lora)


def test_parts_as_module_weights():
    lora = named("a", {"x.attn.q": part(2), "x.mlp.w": part(2)})
    result = merge([lora], Concat(), module_weights=[{"!attention": 0, "attention": 0.5}])
    assert list(result.adapter.modules) == ["x.attn.q"]
    torch.testing.assert_close(result.adapter.modules["x.attn.q"].delta(), 0.5 * lora.modules["x.attn.q"].delta())
    assert len(merge([lora], Concat(), module_weights=[{"!attention,*mlp*": 0}]).adapter.modules) == 2
    with pytest.raises(MergeError, match="matches nothing"):
        merge([lora], Concat(), module_weights=[{"!atention": 0}])


def test_a_capped_module_keeps_its_kernel_and_what_was_lost():
    convolution = LowRank(torch.eye(3, 18) * torch.tensor([[90.0], [1], [1]]), torch.eye(4, 3), kernel=(3, 3), lost=2.0)
    capped = Edits(cap=8).apply(Adapter({"conv": convolution})).modules["conv"]
    assert (capped.kernel, capped.lost) == ((3, 3), 2.0)


LAYER = "transformer.transformer_blocks.1.ff.net.0.proj"


def with_spike(lora: Adapter) -> Adapter:
    """The LoRA with the top direction of one feed-forward layer 20 times as large."""
    update = lora.modules[LAYER]
    A, B = truncated_svd(update.A.double(), update.scale * update.B.double(), update.rank)
    B[:, 0] *= 20
    return replace(lora, modules={**lora.modules, LAYER: LowRank(A.float(), B.float())})


@pytest.mark.parametrize("method", [Concat(), SVD(), Lego()])
def test_a_cap_takes_a_spike_out_of_trained_loras(method: MergeMethod):
    """Distance from the merge of the sound LoRAs, relative to it, at rank 4.

    A layer whose first value is high in the sound LoRA too is capped as well: that is the distance that is left, and
    the one of the sound LoRAs with a cap. In pictures it costs nothing, see docs/recipes.md.
    """
    folder = Path(legomole.__file__).parent / "nano" / "weights" / "loras"
    sound = [load(folder / f"{name}-0.safetensors") for name in ("heart", "wood")]
    spiked = [with_spike(lora) for lora in sound]

    def merged(loras: Sequence[Adapter], cap: float | None) -> torch.Tensor:
        modules = merge(loras, method, cap=cap, dtype=torch.float32).adapter.modules
        return torch.cat([modules[name].delta().flatten() for name in sorted(modules)])

    wanted = merged(sound, None)
    broken, capped, harmless = (
        float((merged(loras, cap) - wanted).norm() / wanted.norm())
        for loras, cap in ((spiked, None), (spiked, 8.0), (sound, 8.0))
    )
    assert broken > 4
    assert capped < 0.3
    assert harmless < 0.2
    found = [f for f in merge(spiked, method).report.findings if f.kind == "spike"]
    assert [(f.loras, f.layers) for f in found] == [((name,), (LAYER,)) for name in ("heart-0", "wood-0")]
