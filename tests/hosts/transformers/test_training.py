"""Gate training on causal language models. `test_accelerate` runs it in two processes."""

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
from .tiny_language import MODELS, bert, gate_values, generate, lora, merged

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # transformers' own


def prompts_of(kind: int, count: int, seed: int = 0) -> list[Tensor]:
    """Prompts of four tokens, the first of which marks the kind."""
    g = torch.Generator().manual_seed(10 * seed + kind)
    rest = torch.randint(10, 40, (count, 3), generator=g)
    return [torch.cat([torch.tensor([1 + kind]), row]) for row in rest]


def examples_of(model: Any, adapters: Any, count: int = 6) -> list[list[tuple[Tensor, Tensor]]]:
    """Per LoRA, prompts of its kind with the answers that the model generates under this LoRA alone."""
    examples = []
    for i, adapter in enumerate(adapters):
        prompts = prompts_of(i, count)
        answers = generate(merged(model, [adapter], (1,)), {"input_ids": torch.stack(prompts)}, 5)
        examples.append(list(zip(prompts, answers, strict=True)))
    return examples


def prepared(kind: str = "llama", reads: str = "hidden", **chosen: Any) -> tuple[Any, Mixture, list[Any]]:
    model = MODELS[kind]()
    pair = lora(model, 1, 4, 0.5), lora(model, 2, 4, 0.5)
    settings = GateSettings(reads=reads, **chosen)  # type: ignore[arg-type]
    return model, Mixture(pair, GateSet(2, settings)), examples_of(model, pair)


FEW = FitSettings(steps=30, batch=6, warmup=0, learning_rate=0.05)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The small base model of docs/llm_mole.md and its two LoRAs, trained to count up and down."""
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
    result = train_gates(model, mix, [tasks("+")[::2], tasks("-")[::2]], tokenizer, fitting)
    losses = result.fit.losses
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    assert untouched(model)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    for i, sign in enumerate("+-"):  # prompts that were not trained on
        ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt, _ in tasks(sign)[1::2]])
        values = gate_values(model, Mixture(mix.experts, result.gates.gates), input_ids=ids)
        mean = torch.stack([value.mean(0) for value in values.values()]).mean(0)
        assert mean[i] > mean[1 - i] + apart, (sign, mean)


def test_other_texts_preserve_the_base_models_predictions(counting: dict[str, Any]) -> None:
    """The Kullback-Leibler divergence from the base model falls while the LoRAs' tasks are learnt."""
    model, tasks, tokenizer = counting["model"], counting["tasks"], counting["Tokenizer"]()
    mix = Mixture(tuple(counting["loras"]), GateSet(2, GateSettings(reads="hidden")))
    others = [(a + b + c, "55") for a, b, c in ("123", "876", "404", "919", "252", "630")]
    fitting = FitSettings(steps=60, batch=10, learning_rate=0.05)
    result = train_gates(model, mix, [tasks("+")[::2], tasks("-")[::2]], tokenizer, fitting, others=others)
    assert result.gates.training["texts"] == [5, 5, 6]
    assert sum(result.fit.losses[-5:]) < 0.7 * sum(result.fit.losses[:5])
    ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt, _ in others])
    divergences = []
    with torch.no_grad():
        base = model(ids).logits[:, -1].log_softmax(-1)
        for gates in (mix.gates, result.gates.gates):
            with mixed(model, Mixture(mix.experts, gates)):
                found = model(ids).logits[:, -1].log_softmax(-1)
            divergences.append(float((base.exp() * (base - found)).sum(-1).mean()))
    assert divergences[1] < 0.7 * divergences[0]


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


def test_a_cancelled_training_resumes(tmp_path: Path) -> None:
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
    resumed = train_gates(model, mix, examples, settings=settings, folder=tmp_path)
    assert equal(resumed, whole)
    assert resumed.fit.losses == whole.fit.losses
    assert list(tmp_path.iterdir()) == []


def test_gates_from_a_file(tmp_path: Path) -> None:
    model, mix, examples = prepared()
    result = train_gates(model, mix, examples, settings=FEW.model_copy(update={"steps": 3}))
    result.gates.save(tmp_path / "gates.safetensors")
    found = load_gates(model, tmp_path / "gates.safetensors", mix.experts[::-1])
    assert TrainedGates.load(tmp_path / "gates.safetensors").base == "LlamaForCausalLM"
    (ids, _), *_ = examples[0]
    with mixed(model, Mixture(mix.experts, result.gates.gates)):
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


def test_the_model_is_restored() -> None:
    model, mix, examples = prepared()
    model.train()
    model.lm_head.weight.requires_grad_(True)
    train_gates(model, mix, examples, settings=FEW.model_copy(update={"steps": 1}))
    assert model.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


class Tokenizer:
    """A tokenizer with letters as tokens, and token 1 at the beginning."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) - 87 for letter in text]}


def test_strings_equal_token_ids() -> None:
    model, mix, _ = prepared()
    words = [[("abc", "xyz"), ("bcd", "yza")], [("uvw", "nop")]]
    ids = [[tuple(Tokenizer()(w, i == 0)["input_ids"] for i, w in enumerate(pair)) for pair in own] for own in words]
    settings = FEW.model_copy(update={"steps": 3})
    one = train_gates(model, mix, words, Tokenizer(), settings, others=[("klm", "bcd")])
    same = train_gates(model, mix, ids, None, settings, others=[(torch.tensor([1, 20, 21, 22]), [11, 12, 13])])
    assert equal(one, same)
    assert one.gates.training["texts"] == [2, 1, 1]


def test_refused_inputs() -> None:
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
    with pytest.raises(MergeError, match=r"next-token predictions[\s\S]*BertForSequenceClassification"):
        train_gates(encoder, Mixture((lora(encoder, 1), lora(encoder, 2)), mix.gates), examples)
