"""Gates learn from a language model's own loss. `test_accelerate` has two processes do it together."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import legomole
from legomole.core.errors import FormatError, MergeError
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.trained import TrainedGates
from legomole.core.train import FitSettings, TrainingResult
from legomole.hosts.transformers.mixing import experts, load_gates, mixed
from legomole.hosts.transformers.training import train_gates
from torch import Tensor

from ...core.mole.mixtures import untouched
from ...test_docs import blocks
from .tiny_language import MODELS, bert, generate, lora, merged, opened

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the library's own


def prompts_of(kind: int, count: int, seed: int = 0) -> list[Tensor]:
    """Prompts of four tokens; the first tells the kind."""
    g = torch.Generator().manual_seed(10 * seed + kind)
    rest = torch.randint(10, 40, (count, 3), generator=g)
    return [torch.cat([torch.tensor([1 + kind]), row]) for row in rest]


def examples_of(model: Any, adapters: Any, count: int = 6) -> list[list[tuple[Tensor, Tensor]]]:
    """Per LoRA, what the model says under it alone to prompts of its kind: what the LoRA is for."""
    found = []
    for i, adapter in enumerate(adapters):
        alone, own = merged(model, [adapter], (1,)), prompts_of(i, count)
        answers = generate(alone, {"input_ids": torch.stack(own)}, 5)
        found.append(list(zip(own, answers, strict=True)))
    return found


def prepared(kind: str = "llama", reads: str = "hidden", **chosen: Any) -> tuple[Any, Mixture, list[Any]]:
    model = MODELS[kind]()
    pair = lora(model, 1, 4, 0.5), lora(model, 2, 4, 0.5)
    settings = GateSettings(reads=reads, **chosen)  # type: ignore[arg-type]
    return model, Mixture(pair, GateSet(2, settings)), examples_of(model, pair)


FEW = FitSettings(steps=30, batch=6, warmup=0, learning_rate=0.05)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The page's small base model, and its two LoRAs, which learnt to count up and down."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("counting")
    page: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", (FutureWarning, DeprecationWarning))
        patch.chdir(folder)
        exec(blocks("llm_mole.md", "python")[0], page)
    page["model"] = page["base"]().eval()
    page["loras"] = experts(page["model"], [legomole.load(folder / name) for name in ("up", "down")])
    return page


@pytest.mark.parametrize(
    ("reads", "activation", "granularity", "apart"),
    [
        ("hidden", "sigmoid", "layer", 0.5),
        ("experts", "softmax-null", "network", 0.2),
        ("token", "softmax", "layer", 0.1),
    ],
)
def test_training_lowers_the_loss_and_opens_the_right_gate(
    counting: dict[str, Any], reads: str, activation: str, granularity: str, apart: float
) -> None:
    model, tasks, tokenizer = counting["model"], counting["tasks"], counting["Tokenizer"]()
    settings = GateSettings(reads=reads, activation=activation, granularity=granularity)  # type: ignore[arg-type]
    mix = Mixture(tuple(counting["loras"]), GateSet(2, settings))
    before = {name: p.clone() for name, p in model.named_parameters()}
    fitting = FitSettings(steps=60, batch=10, learning_rate=0.05)
    done = train_gates(model, mix, [tasks("+")[::2], tasks("-")[::2]], tokenizer, fitting)
    losses = done.fit.losses
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    assert untouched(model)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    for i, sign in enumerate("+-"):  # prompts that were not trained on
        ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt, _ in tasks(sign)[1::2]])
        values = opened(model, Mixture(mix.experts, done.gates.gates), input_ids=ids)
        mean = torch.stack([value.mean(0) for value in values.values()]).mean(0)
        assert mean[i] > mean[1 - i] + apart, (sign, mean)


def test_texts_of_no_lora_keep_to_the_base_model(counting: dict[str, Any]) -> None:
    """The Kullback-Leibler divergence from it falls; what the LoRAs are for is learnt beside it."""
    model, tasks, tokenizer = counting["model"], counting["tasks"], counting["Tokenizer"]()
    mix = Mixture(tuple(counting["loras"]), GateSet(2, GateSettings(reads="hidden")))
    others = [(a + b + c, "55") for a, b, c in ("123", "876", "404", "919", "252", "630")]
    fitting = FitSettings(steps=60, batch=10, learning_rate=0.05)
    done = train_gates(model, mix, [tasks("+")[::2], tasks("-")[::2]], tokenizer, fitting, others=others)
    assert done.gates.training["texts"] == [5, 5, 6]
    assert sum(done.fit.losses[-5:]) < 0.7 * sum(done.fit.losses[:5])
    ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt, _ in others])
    away = []
    with torch.no_grad():
        base = model(ids).logits[:, -1].log_softmax(-1)
        for gates in (mix.gates, done.gates.gates):
            with mixed(model, Mixture(mix.experts, gates)):
                found = model(ids).logits[:, -1].log_softmax(-1)
            away.append(float((base.exp() * (base - found)).sum(-1).mean()))
    assert away[1] < 0.7 * away[0]


def test_the_same_seed_gives_the_same_gates() -> None:
    model, mix, examples = prepared()
    settings = FEW.model_copy(update={"steps": 4, "balance": 0.1})
    one, same = (train_gates(model, mix, examples, settings=settings) for _ in range(2))
    other = train_gates(model, mix, examples, settings=settings.model_copy(update={"seed": 1}))
    plain = train_gates(model, mix, examples, settings=settings.model_copy(update={"balance": 0.0}))
    assert equal(one, same)
    assert not equal(one, other)
    assert not equal(one, plain)


def equal(one: TrainingResult, other: TrainingResult) -> bool:
    pairs = zip(one.gates.gates.parameters(), other.gates.gates.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_training_that_was_cancelled_goes_on(tmp_path: Path) -> None:
    model, mix, examples = prepared()
    settings = FEW.model_copy(update={"steps": 6})
    whole = train_gates(model, mix, examples, settings=settings)

    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if done == 3:
            raise Stop

    kept: list[TrainingResult] = []
    with pytest.raises(Stop):
        train_gates(model, mix, examples, settings=settings, folder=tmp_path, progress=stop, keep=kept.append)
    assert untouched(model)
    assert kept[0].gates.training["stopped"] == "interrupted after 3 of 6 steps"
    with pytest.raises(FormatError, match="another training"):
        train_gates(model, mix, [examples[1], examples[0]], settings=settings, folder=tmp_path)
    gone_on = train_gates(model, mix, examples, settings=settings, folder=tmp_path)
    assert equal(gone_on, whole)
    assert gone_on.fit.losses == whole.fit.losses
    assert list(tmp_path.iterdir()) == []


def test_gates_from_a_file(tmp_path: Path) -> None:
    model, mix, examples = prepared()
    done = train_gates(model, mix, examples, settings=FEW.model_copy(update={"steps": 3}))
    done.gates.save(tmp_path / "gates.safetensors")
    found = load_gates(model, tmp_path / "gates.safetensors", mix.experts[::-1])
    assert TrainedGates.load(tmp_path / "gates.safetensors").base == "LlamaForCausalLM"
    (ids, _), *_ = examples[0]
    with mixed(model, Mixture(mix.experts, done.gates.gates)):
        expected = generate(model, {"input_ids": ids[None]})
    with mixed(model, Mixture(mix.experts[::-1], found)):
        assert torch.equal(generate(model, {"input_ids": ids[None]}), expected)
    with pytest.raises(MergeError, match="other LoRAs"):
        load_gates(model, tmp_path / "gates.safetensors", [lora(model, 7)])
    with pytest.raises(MergeError, match="another kind of model"):
        load_gates(MODELS["gpt2"](), tmp_path / "gates.safetensors", mix.experts)


@pytest.mark.parametrize("reads", ["hidden", "token"])
def test_checkpointing_changes_nothing(reads: str) -> None:
    model, mix, examples = prepared(reads=reads)
    settings = FEW.model_copy(update={"steps": 3})
    plain = train_gates(model, mix, examples, settings=settings)
    model.gradient_checkpointing_enable()
    runs: list[int] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    again = train_gates(model, mix, examples, settings=settings)
    handle.remove()
    assert len(runs) == 2 + 2 * 3  # calibration in two batches; forward and again in each step
    torch.testing.assert_close(again.fit.losses, plain.fit.losses, rtol=1e-4, atol=1e-5)


def test_the_model_is_as_it_was() -> None:
    model, mix, examples = prepared()
    model.train()
    model.lm_head.weight.requires_grad_(True)
    train_gates(model, mix, examples, settings=FEW.model_copy(update={"steps": 1}))
    assert model.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


class Tokenizer:
    """Letters as tokens, 1 at the beginning."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) - 87 for letter in text]}


def test_words_are_the_same_as_token_ids() -> None:
    model, mix, _ = prepared()
    words = [[("abc", "xyz"), ("bcd", "yza")], [("uvw", "nop")]]
    ids = [[tuple(Tokenizer()(w, i == 0)["input_ids"] for i, w in enumerate(pair)) for pair in own] for own in words]
    settings = FEW.model_copy(update={"steps": 3})
    one = train_gates(model, mix, words, Tokenizer(), settings, others=[("klm", "bcd")])
    same = train_gates(model, mix, ids, None, settings, others=[(torch.tensor([1, 20, 21, 22]), [11, 12, 13])])
    assert equal(one, same)
    assert one.gates.training["texts"] == [2, 1, 1]


def test_what_is_refused() -> None:
    model, mix, examples = prepared()
    with pytest.raises(MergeError, match=r"does not say where it ends[\s\S]*reads=\"token\""):
        train_gates(model, mix, [[torch.arange(5)], *examples[1:]])
    with pytest.raises(MergeError, match="need a tokenizer"):
        train_gates(model, mix, [[("a", "b")], *examples[1:]])
    with pytest.raises(MergeError, match=r"needs examples[\s\S]*2 lists"):
        train_gates(model, mix, examples[:1])
    with pytest.raises(MergeError, match="no text conditioning"):
        train_gates(model, Mixture(mix.experts), examples)
    encoder = bert()
    with pytest.raises(MergeError, match=r"next token[\s\S]*BertForSequenceClassification"):
        train_gates(encoder, Mixture((lora(encoder, 1), lora(encoder, 2)), mix.gates), examples)
