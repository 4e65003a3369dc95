"""Statistics measured on a language model, against inputs recorded by hand."""

from __future__ import annotations

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.lego import Lego
from legomole.core.train.measure import CalibrationSettings
from legomole.hosts.transformers.calibration import NEUTRAL_TEXTS, calibrate_language_model, instructed_texts

from . import tiny_language as tiny

THOROUGH = CalibrationSettings(mode="thorough")
TEXTS = [[torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 7, 8])], [torch.tensor([9, 10])]]
OTHERS = [torch.tensor([20, 21, 22])]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_moments_are_those_of_the_model_with_one_adapter(name):
    model = tiny.MODELS[name]()
    adapters = [tiny.lora(model, 1), tiny.lora(model, 2)]
    statistics = calibrate_language_model(model, adapters, TEXTS, settings=THOROUGH, others=OTHERS)
    assert set(statistics.modules) == {name for adapter in adapters for name in adapter.modules}
    layer = next(name for name in adapters[0].modules if "mlp" in name)
    gates = {0: [1.0, 0.0], 1: [0.0, 1.0], None: [0.0, 0.0]}
    for kind, texts in ((0, TEXTS[0]), (1, TEXTS[1]), (None, OTHERS)):
        by_hand = tiny.merged(model, adapters, gates[kind])
        recorded: list[torch.Tensor] = []
        by_hand.get_submodule(layer).register_forward_pre_hook(lambda _, args, r=recorded: r.append(args[0][0]))
        for ids in texts:
            by_hand(input_ids=ids[None])
        X = torch.cat(recorded)
        moments = statistics.modules[layer]
        C = moments.base if kind is None else moments.own[kind]
        torch.testing.assert_close(C, X.mT @ X / len(X), rtol=1e-3, atol=1e-4)
    assert not statistics.modules[layer].joint


def test_light_statistics_cover_every_layer_and_leave_the_model_alone():
    model = tiny.llama()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    adapters = [tiny.lora(model, 1), tiny.lora(model, 2)]
    reports: list[tuple[int, int, str]] = []
    statistics = calibrate_language_model(
        model,
        adapters,
        [["w1 w2 w3"], ["w4 w5"]],
        tiny.tokenizer(),
        CalibrationSettings(width=4),
        progress=lambda *report: reports.append(report),
    )
    assert all(moments.light for moments in statistics.modules.values())
    assert len(reports) + 1 <= 80
    report = merge(adapters, Lego(2, statistics=statistics)).report
    assert not report.notes
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_passes_stay_below_forty_per_adapter():
    model = tiny.llama()
    settings = CalibrationSettings(width=4)
    for n in (1, 2, 5):
        reports: list[int] = []
        adapters = [tiny.lora(model, seed) for seed in range(n)]
        texts = [["w1 w2"] * 50] * n
        calibrate_language_model(
            model, adapters, texts, tiny.tokenizer(), settings, progress=lambda done, *_, r=reports: r.append(done)
        )
        assert 20 * n < len(reports) + 1 <= 40 * n


def test_an_instruction_makes_several_texts():
    texts = instructed_texts(" Say whether it is true. ")
    assert len(set(texts)) == len(texts) == 8
    assert all(text.startswith("Say whether it is true.\n\n") for text in texts)
    assert NEUTRAL_TEXTS[0] in texts[0]


def test_wrong_input_is_refused():
    model = tiny.llama()
    adapters = [tiny.lora(model, 1), tiny.lora(model, 2)]
    with pytest.raises(MergeError, match="needs texts"):
        calibrate_language_model(model, adapters, [["w1"]], tiny.tokenizer())
    with pytest.raises(MergeError, match="needs texts"):
        calibrate_language_model(model, adapters, [["w1"], []], tiny.tokenizer())
    with pytest.raises(MergeError, match="need a tokenizer"):
        calibrate_language_model(model, adapters, [["w1"], ["w2"]])
