"""Statistics: second moments of layer inputs, by kind of prompt, against models merged by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.attach import attach
from legomole.core.mole.mixture import Mixture
from legomole.core.train import Prompt, measure
from legomole.core.train.measure import CalibrationSettings, measure_statistics
from torch import Tensor

from ..mole.mixtures import lora, merged, untouched
from ..mole.models import FEATURES, Transformer

PROMPTS = [Prompt("a", (0,)), Prompt("b", (1,)), Prompt("a b", (0, 1)), Prompt("c", ()), Prompt("", ())]


class Flow:
    """A flow model of tokens: images are sampled in one step from noise."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.calls = model, []
        self.texts = torch.randn(len(PROMPTS), 3, FEATURES, generator=torch.Generator().manual_seed(9))

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        noise = torch.randn(len(prompts), 5, 4, generator=torch.Generator().manual_seed(seed))
        return noise - self.model(noise, self.texts[list(prompts)])

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


def test_second_moments_equal_those_of_models_merged_by_hand():
    settings = CalibrationSettings(samples=6, noised=2, batch=4, compose=1.5)
    statistics, flow, loras = run(settings)
    gates = {(): (0, 0), (0,): (1, 0), (1,): (0, 1), (0, 1): (1.5, 1.5)}
    for named, g in gates.items():
        shown = [(x, rows) for x, rows in flow.calls if {PROMPTS[i].named for i in rows} == {named}]
        assert sum(len(rows) for _, rows in shown) == 12  # 6 images, each noised twice
        by_hand = merged(Transformer(), loras, g)
        for path in ("blocks.1.ff.2", "final", "inp"):
            observed = []
            handle = by_hand.get_submodule(path).register_forward_pre_hook(
                lambda _, args, s=observed: s.append(args[0])
            )
            for x, rows in shown:
                by_hand(x, flow.texts[list(rows)])
            handle.remove()
            X = torch.cat([x.flatten(0, -2) for x in observed])
            moments = statistics.modules[f"transformer.{path}"]
            found = moments.own[named[0]] if len(named) == 1 else moments.joint[named] if named else moments.base
            torch.testing.assert_close(found, X.mT @ X / len(X), rtol=1e-4, atol=1e-5)


def test_the_seed_decides_everything():
    settings = CalibrationSettings(samples=3, noised=1)
    first, again = run(settings)[0], run(settings)[0]
    other = run(CalibrationSettings(samples=3, noised=1, seed=1))[0]
    for name in first.modules:
        tensors = (list(found.modules[name].tensors()) for found in (first, again, other))
        for C, same, different in zip(*tensors, strict=True):
            assert torch.equal(C, same)
            assert not torch.equal(C, different) or name == "transformer.ctx"  # which reads only the prompt


def test_every_prompt_of_a_kind_is_used_before_one_is_repeated():
    _, flow, _ = run(CalibrationSettings(samples=4, noised=1))
    shown = [i for _, rows in flow.calls for i in rows]
    assert shown.count(3) == shown.count(4) == 2  # both name no concept


def test_every_batch_is_reported_and_measuring_can_be_cancelled():
    reports: list[tuple[int, int, str]] = []
    run(CalibrationSettings(samples=5, noised=2, batch=4), progress=lambda *report: reports.append(report))
    # per kind: 4 and 1 sampled, then each of them passed twice
    one = [(4, "sampling"), (1, "sampling"), (4, "measuring"), (4, "measuring"), (1, "measuring"), (1, "measuring")]
    assert [what for *_, what in reports] == 4 * [what for _, what in one]
    assert [done for done, *_ in reports] == torch.tensor(4 * [n for n, _ in one]).cumsum(0).tolist()
    assert {total for _, total, _ in reports} == {reports[-1][0]} == {60}

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
    statistics, *_ = run(CalibrationSettings(samples=2, noised=1))
    q, k, v = (statistics.modules[f"transformer.blocks.0.attn.to_{x}"] for x in "qkv")
    assert q is k is v
    others = [moments for name, moments in statistics.modules.items() if not name.endswith(("to_k", "to_v"))]
    assert len({id(moments) for moments in others}) == len(others)


def test_measuring_some_layers_at_a_time_gives_the_same(monkeypatch):
    settings = CalibrationSettings(samples=3, noised=2, batch=2)
    whole, flow, _ = run(settings)
    monkeypatch.setattr(measure, "MAX_MOMENT_BYTES", 4 * 2 * 8 * 8)  # two layers of width 8
    parts, again, _ = run(settings)
    assert len(again.calls) > 4 * len(flow.calls)
    assert list(parts.modules) == list(whole.modules)
    for name, moments in whole.modules.items():
        for C, same in zip(moments.tensors(), parts.modules[name].tensors(), strict=True):
            assert torch.equal(C, same)


def test_layers_that_are_too_wide_or_not_used_are_left_out():
    narrow = CalibrationSettings(samples=1, noised=1, widest=8)  # the second layers of the feed-forwards have width 16
    statistics, _, loras = run(narrow)
    assert set(loras[0].modules) - {name.removeprefix("transformer.") for name in statistics.modules} == {
        "blocks.0.ff.2",
        "blocks.1.ff.2",
    }
    model = Transformer()
    loras = (lora(model, 1), lora(model, 2))
    model.spare = torch.nn.Linear(4, 4)
    with attach(model, Mixture(loras)) as attachment:
        found = measure_statistics(attachment, Flow(model), PROMPTS, {"s": "spare", "f": "final"}, narrow)
        assert list(found.modules) == ["f"]
        with pytest.raises(MergeError, match=r"None of the layers[\s\S]*1 that it does not use, 0 with wider"):
            measure_statistics(attachment, Flow(model), PROMPTS, {"s": "spare"}, narrow)


def test_metadata_holds_settings_and_prompts():
    settings = CalibrationSettings(samples=1, noised=1)
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
