"""Statistics: second moments of layer inputs, by kind of prompt, against models merged by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.merge.statistics import ModuleStatistics
from legomole.core.mole.attach import attach
from legomole.core.mole.mixture import Mixture
from legomole.core.train import Prompt, measure
from legomole.core.train.measure import CalibrationSettings, measure_statistics
from torch import Tensor

from ..mole.mixtures import lora, merged, untouched
from ..mole.models import FEATURES, Transformer

PROMPTS = [Prompt("a", (0,)), Prompt("b", (1,)), Prompt("a b", (0, 1)), Prompt("c", ()), Prompt("", ())]


class Flow:
    """A flow model of tokens."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.calls = model, []
        self.texts = torch.randn(len(PROMPTS), 3, FEATURES, generator=torch.Generator().manual_seed(9))

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        noise = torch.randn(len(prompts), 5, 4, generator=torch.Generator().manual_seed(seed))
        return noise - self.model(noise, self.texts[list(prompts)])

    def noise(self, batch: int, seed: int) -> Tensor:
        return torch.randn(batch, 5, 4, generator=torch.Generator().manual_seed(seed))

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        t = t[:, None, None]
        return (1 - t) * latents + t * noise

    def goal(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noise - latents

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        self.calls.append((noisy, tuple(prompts)))
        return self.model(noisy, self.texts[list(prompts)])

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return noisy - t[:, None, None] * prediction


def run(settings: CalibrationSettings, prompts: Sequence[Prompt] = PROMPTS, **options):
    model = Transformer()
    loras = (lora(model, 1), lora(model, 2))
    flow = Flow(model)
    modules = {f"transformer.{name}": name for name in loras[0].modules}
    with attach(model, Mixture(loras)) as attachment:
        statistics = measure_statistics(attachment, flow, prompts, modules, settings, **options)
    assert untouched(model)
    del flow.calls[0]  # the pass that finds shared inputs
    return statistics, flow, loras


def inputs_by_hand(flow: Flow, loras: Sequence, gates: Sequence[float], path: str, calls: Sequence) -> Tensor:
    """The inputs ``(n, d_in)`` of a layer when a model with the LoRAs in its weights repeats some calls."""
    by_hand = merged(Transformer(), loras, gates)
    observed: list[Tensor] = []
    hook = by_hand.get_submodule(path).register_forward_pre_hook(lambda _, args: observed.append(args[0]))
    for x, rows in calls:
        by_hand(x, flow.texts[list(rows)])
    hook.remove()
    return torch.cat([x.flatten(0, -2) for x in observed])


GATES = {(): (0, 0), (0,): (1, 0), (1,): (0, 1), (0, 1): (1.5, 1.5)}


def of_kind(moments: ModuleStatistics, named: tuple[int, ...]) -> Tensor:
    C = moments.own[named[0]] if len(named) == 1 else moments.joint[named] if named else moments.base
    assert C is not None
    return C


def calls_of(flow: Flow, named: tuple[int, ...]) -> list[tuple[Tensor, tuple[int, ...]]]:
    return [(x, rows) for x, rows in flow.calls if {PROMPTS[i].named for i in rows} == {named}]


def test_second_moments_equal_those_of_models_merged_by_hand():
    settings = CalibrationSettings(mode="thorough", samples=6, batch=4, compose=1.5)
    statistics, flow, loras = run(settings)
    for named, gates in GATES.items():
        calls = calls_of(flow, named)
        assert [len(rows) for _, rows in calls] == [4, 2]
        for path in ("blocks.1.ff.2", "final", "inp"):
            X = inputs_by_hand(flow, loras, gates, path, calls)
            found = of_kind(statistics.modules[f"transformer.{path}"], named)
            torch.testing.assert_close(found, X.mT @ X / len(X), rtol=1e-4, atol=1e-5)


def test_light_moments_are_those_of_the_full_ones_inside_a_basis_shared_by_all_kinds():
    settings = CalibrationSettings(samples=16, width=3, compose=1.5)
    statistics, flow, loras = run(settings)
    for named, gates in GATES.items():
        calls = calls_of(flow, named)
        assert len(calls) == 1 + 16  # the first one finds the basis
        for path in ("blocks.1.ff.2", "final"):
            X = inputs_by_hand(flow, loras, gates, path, calls[1:]).double()
            C = X.mT @ X / len(X)
            moments = statistics.modules[f"transformer.{path}"]
            space = moments.space(torch.eye(len(C), dtype=torch.float64))
            inside = space.Q @ C @ space.Q.T
            rest = (C.trace() - inside.trace()) / (len(C) - 3)
            expected = torch.block_diag(inside, rest.view(1, 1)).float()
            assert (of_kind(moments, named) - expected).norm() < 5e-3 * expected.norm()  # the basis is float16
            assert inside.trace() > 3 / len(C) * C.trace()  # more than directions have on average


def test_narrow_inputs_are_measured_in_full_and_no_wide_one_is_left_out():
    narrow, wide = "transformer.final", "transformer.blocks.0.ff.2"  # 8 and 16 wide
    light = run(CalibrationSettings(samples=1, width=4))[0]
    assert not light.modules[narrow].light
    assert light.modules[wide].light
    thorough = run(CalibrationSettings(mode="thorough", samples=1, width=4, widest=8))[0]
    assert not thorough.modules[narrow].light
    assert thorough.modules[wide].basis is not None
    assert (
        set(light.modules)
        == set(thorough.modules)
        == {f"transformer.{name}" for name in lora(Transformer(), 1).modules}
    )


def test_two_loras_take_at_most_forty_passes_each():
    _, flow, _ = run(CalibrationSettings(width=4))
    assert len(flow.calls) + 1 <= 80  # one more finds the shared inputs
    assert len(flow.calls) >= 70
    for adapters, kinds in ((1, 2), (2, 4), (3, 8), (4, 12)):
        first, measured = CalibrationSettings().samples_per_kind(adapters, kinds)
        assert 40 * adapters - kinds <= 1 + kinds * (first + measured) <= 40 * adapters


def test_latents_are_noised_zeros_at_times_spread_over_the_schedule():
    _, flow, _ = run(CalibrationSettings(mode="thorough", samples=8))
    scale = sorted(float(x.square().mean().sqrt()) for x, _ in calls_of(flow, (0,)))  # t times standard normal noise
    for i, value in enumerate(scale):
        assert 0.5 * (0.05 + 0.95 * i / 8) < value < 1.5 * (0.05 + 0.95 * (i + 1) / 8)


def test_the_seed_decides_everything():
    for settings in (CalibrationSettings(samples=3, width=4), CalibrationSettings(mode="thorough", samples=3)):
        first, again = run(settings)[0], run(settings)[0]
        other = run(settings.model_copy(update={"seed": 1}))[0]
        for name in first.modules:
            tensors = (list(found.modules[name].tensors()) for found in (first, again, other))
            for C, same, different in zip(*tensors, strict=True):
                assert torch.equal(C, same)
                assert not torch.equal(C, different) or name == "transformer.ctx"  # which reads only the prompt


def test_every_prompt_of_a_kind_is_used_before_one_is_repeated():
    _, flow, _ = run(CalibrationSettings(mode="thorough", samples=4))
    shown = [i for _, rows in flow.calls for i in rows]
    assert shown.count(3) == shown.count(4) == 2  # both name no concept


def test_every_pass_is_reported_and_measuring_can_be_cancelled():
    reports: list[tuple[int, int, str]] = []
    settings = CalibrationSettings(samples=10, batch=4, width=4)
    run(settings, progress=lambda *report: reports.append(report))
    assert [what for *_, what in reports] == 4 * ["finding directions"] + 12 * ["measuring"]
    assert [done for done, *_ in reports] == list(range(1, 17))
    assert {total for _, total, _ in reports} == {16}

    def cancel(done: int, total: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    model = Transformer()
    with pytest.raises(KeyboardInterrupt), attach(model, Mixture((lora(model, 1), lora(model, 2)))) as attachment:
        measure_statistics(
            attachment, Flow(model), PROMPTS, {"x": "final"}, CalibrationSettings(samples=1), progress=cancel
        )
    assert untouched(model)


def test_layers_that_read_one_tensor_share_their_second_moments():
    statistics, *_ = run(CalibrationSettings(samples=2))
    q, k, v = (statistics.modules[f"transformer.blocks.0.attn.to_{x}"] for x in "qkv")
    assert q is k is v
    others = [moments for name, moments in statistics.modules.items() if not name.endswith(("to_k", "to_v"))]
    assert len({id(moments) for moments in others}) == len(others)


@pytest.mark.parametrize("mode", ["light", "thorough"])
def test_measuring_some_layers_at_a_time_gives_the_same(monkeypatch, mode):
    settings = CalibrationSettings(mode=mode, samples=3, batch=2, width=4)
    whole, flow, _ = run(settings)
    monkeypatch.setattr(measure, "MAX_MOMENT_BYTES", 4 * 2 * 8 * 8)  # two layers of width 8
    parts, again, _ = run(settings)
    assert len(again.calls) > 4 * len(flow.calls)
    assert list(parts.modules) == list(whole.modules)
    for name, moments in whole.modules.items():
        for C, same in zip(moments.tensors(), parts.modules[name].tensors(), strict=True):
            assert torch.equal(C, same)


def test_layers_that_the_model_does_not_use_are_left_out():
    model = Transformer()
    loras = (lora(model, 1), lora(model, 2))
    model.spare = torch.nn.Linear(4, 4)
    settings = CalibrationSettings(samples=1)
    with attach(model, Mixture(loras)) as attachment:
        found = measure_statistics(attachment, Flow(model), PROMPTS, {"s": "spare", "f": "final"}, settings)
        assert list(found.modules) == ["f"]
        with pytest.raises(MergeError, match=r"None of the layers[\s\S]*1 that it does not use"):
            measure_statistics(attachment, Flow(model), PROMPTS, {"s": "spare"}, settings)


def test_metadata_holds_settings_and_prompts():
    settings = CalibrationSettings(samples=1)
    statistics = run(settings, adapters=["aa", "bb"], strengths=[0.8, 1.0])[0]
    assert (statistics.adapters, statistics.strengths) == (("aa", "bb"), (0.8, 1.0))
    metadata = {name: json.loads(text) for name, text in statistics.metadata.items()}
    assert metadata == {
        "settings": settings.model_dump(),
        "prompts": ["a", "b", "a b", "c", ""],
    }


def test_a_lora_no_prompt_names_alone_is_refused():
    with pytest.raises(MergeError, match="names LoRA number 2 alone"):
        run(CalibrationSettings(samples=1), [Prompt("a", (0,)), Prompt("a b", (0, 1))])


def test_values_that_are_not_finite_are_refused():
    model = Transformer()
    broken = Flow(model)
    broken.texts[0] = float("nan")
    with (
        attach(model, Mixture((lora(model, 1), lora(model, 2)))) as attachment,
        pytest.raises(MergeError, match="not finite"),
    ):
        measure_statistics(attachment, broken, PROMPTS, {"x": "final"}, CalibrationSettings(samples=1))
