"""The LLM benchmark: tasks, the upper half of a model, merges of other papers, strengths, tables; on a tiny model."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.core.merge.methods.calibrated import calibrate_units
from legomole.core.merge.pool import Pool
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from torch import Tensor

from ..core.merge.pools import best, close, deltas, make_pool, product, random_pool

ROOT = Path(__file__).parents[2]
pytest.importorskip("peft")

if str(ROOT) not in sys.path:  # benchmarks are not in the package; last, so that nothing is shadowed
    sys.path.append(str(ROOT))

from benchmarks.common import ResultLog, merged_in  # noqa: E402
from benchmarks.llm import __main__ as main  # noqa: E402
from benchmarks.llm import core_space, data, evaluate, model, peers, pico, report, routing, separate, train, world  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

_WORDS = [f"word{i}" for i in range(40)]
_SIZE = world.Size(test=6, dev=4, swept=3, held_out=3, texts=2)


def _vocabulary() -> list[str]:
    parts = [*_WORDS, "Answer", ":", "?", ",", ".", "(", ")"]
    for task in (*data.TASKS, *data.HELD_OUT):
        parts += task.instruction.replace("?", " ?").replace(",", " ,").replace(":", " :").split()
        parts += [word for label in task.labels for word in label.split()]
    return ["[UNK]", *dict.fromkeys(parts)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_vocabulary())}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of random words, as the repositories store them."""
    root, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    names = [
        *(task.folder for task in (*data.TASKS, *data.HELD_OUT)),
        "CL_Benchmark/SuperNI/task1290_xsum_summarization",
    ]
    labels = {task.folder: task.labels for task in (*data.TASKS, *data.HELD_OUT)}
    for name in names:
        rows = [
            {"input": " ".join(draw.choices(_WORDS, k=draw.randint(2, 60) + 96 * ("xsum" in name))), "output": answer}
            for answer in labels.get(name, ("",)) for _ in range(24)
        ]  # fmt: skip
        path = root / "clone" / name
        if name.endswith(".json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"examples": [{"input": r["input"], "target": r["output"]} for r in rows]}))
        else:
            path.mkdir(parents=True)
            (path / "labels.json").write_text("[]")
            (path / "train.json").write_text(json.dumps({"Instances": rows}))
            (path / "test.json").write_text(json.dumps({"Instances": rows[:2]}))
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(_vocabulary()), hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny(pretrained: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> world.World:
    return world.World(pretrained, folder, tmp_path_factory.mktemp("states"), _SIZE, lambda _: None, torch.float32)


# ---- tasks


def test_splits_are_disjoint_balanced_and_short(folder: Path, tokenizer: Any):
    task = data.TASKS[0]
    examples = data.read(folder, task, tokenizer, tested=6, dev=4)
    splits = examples.test, examples.dev, examples.train
    assert [len(part) for part in splits[:2]] == [6, 4]
    every = [example.ids for part in splits for example in part]
    assert len(set(every)) == len(every)
    assert [sum(example.label for example in part) for part in splits[:2]] == [3, 2]
    assert max(map(len, every)) <= data.LONGEST
    assert [tokenizer.decode([token]) for token in examples.first] == ["Good", "Bad"]
    instruction = every[0][: examples.shared]
    assert all(ids[: examples.shared] == instruction for ids in every)
    assert examples == data.read(folder, task, tokenizer, tested=6, dev=4)


def test_long_texts_are_cut_or_left_out(folder: Path, tokenizer: Any):
    cut = next(task for task in data.TASKS if task.cut)
    examples = data.read(folder, cut, tokenizer, tested=6, dev=4)
    assert len(examples.test) + len(examples.dev) + len(examples.train) == 24 * len(cut.labels)
    assert max(len(example.ids) for example in examples.train) == cut.cut
    end = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    assert all(list(example.ids[-len(end) :]) == end for example in examples.test)
    whole = data.read(folder, data.TASKS[0], tokenizer, tested=6, dev=4)
    assert len(whole.train) < 24 * 2 - 10


def test_labels_must_differ_in_their_first_token(folder: Path, tokenizer: Any):
    task = data.Task("x", data.TASKS[0].folder, "Rate", ("very bad", "very good"))
    with pytest.raises(ValueError, match="begin with the same token"):
        data.read(folder, task, tokenizer, 6, 4)


def test_a_missing_clone_is_named(tmp_path: Path, tokenizer: Any):
    with pytest.raises(FileNotFoundError, match="clone circle-hit/SAPT"):
        data.read(tmp_path, data.TASKS[0], tokenizer, 6, 4)


# ---- the upper half


def test_the_upper_half_gives_the_logits_of_the_whole_model(tiny: world.World, pretrained: Path, folder: Path):
    whole, tokenizer = model.load_pretrained(pretrained, torch.float32)
    prompts = [example.ids for example in data.read(folder, data.TASKS[0], tokenizer, 6, 4).test[:5]]
    rows = [example.ids for example in tiny.task("sst2").test[:5]]
    with torch.no_grad():
        expected = torch.stack([whole(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts])
        found = model.last_logits(tiny.model, rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_shared_instruction_changes_no_logits(tiny: world.World):
    examples = tiny.task("sst2")
    rows, shared = [example.ids for example in examples.test], examples.shared
    with torch.inference_mode():
        expected = model.last_logits(tiny.model, rows)
        prefix = world._prefix(tiny.model, rows[0][:shared])
        found = world._continued(tiny.model, [row[shared:] for row in rows], prefix)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_states_of_other_prompts_are_refused(tiny: world.World, tmp_path: Path):
    tiny._upper.rows([(1, 2)], tmp_path / "states.pt")
    with pytest.raises(ValueError, match="delete it"):
        tiny._upper.rows([(1, 2, 3)], tmp_path / "states.pt")


# ---- merges of other papers, against their formulas on dense matrices


def dense(pool: Pool, m: int = 0) -> list[Tensor]:
    return list(deltas(pool)[m])


def test_pico_turns_common_columns_down():
    pool = random_pool([2, 3], seed=3)
    units = [torch.linalg.svd(matrix, full_matrices=False) for matrix in dense(pool)]
    B = [U[:, :r] * S[:r].sqrt() for (U, S, _), r in zip(units, pool.ranks, strict=True)]
    A = [S[:r].sqrt()[:, None] * Vh[:r] for (_, S, Vh), r in zip(units, pool.ranks, strict=True)]
    U, S, _ = torch.linalg.svd(torch.cat(B, 1), full_matrices=False)
    alpha = 1 / (1 + S.square() / S.square().sum())
    change = torch.eye(len(U), dtype=U.dtype) + U * (alpha - 1) @ U.mT
    merged = sum(change @ b @ a for b, a in zip(B, A, strict=True))
    merged = merged * torch.stack([matrix.norm() for matrix in dense(pool)]).mean() / merged.norm()
    torch.testing.assert_close(product(pico.Pico(Rank(5))(pool))[0], merged, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(pico.Pico(Rank(2))(pool))[0], best(merged, 2), rtol=1e-4, atol=1e-5)


def separated(pool: Pool, base: float) -> Tensor:
    """``B diag(c) R A (M, d_out, d_in)``."""
    return pool.B.double() * pool.c[:, None, :] @ separate.separate(pool, base) @ pool.A.double()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.floats(0.1, 10), st.integers(0, 1000))
def test_it_is_the_calibrated_merge_with_statistics_from_the_weights(ranks: list[int], base: float, seed: int):
    scales = [0.5 + i for i in range(len(ranks))]
    pool = random_pool(ranks, scales=scales, weights=[(-1.0) ** i * 0.7 for i in range(len(ranks))], seed=seed)
    unweighted = deltas(random_pool(ranks, scales=scales, seed=seed))
    moments = unweighted.mT @ unweighted
    moments /= moments.diagonal(dim1=2, dim2=3).mean(2)[:, :, None, None]
    statistics = Statistics(
        {
            name: ModuleStatistics(dict(enumerate(moments[m])), base=torch.eye(12, dtype=torch.float64))
            for m, name in enumerate(pool.names)
        }
    )
    expected, _ = calibrate_units(pool, statistics, lam=base)
    assert close(separated(pool, base), deltas(expected).sum(1), 1e-4)


def test_orthogonal_adapters_only_lose_what_the_base_model_asks_for():
    # C_1 = diag(2, 0), C_2 = diag(0, 2), base 1: each delta is kept by (2 + tau) / (3 + tau), tau = 0.003
    pool = make_pool([torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])], [torch.ones(1, 1, 1)] * 2)
    kept = 2.003 / 3.003
    assert torch.allclose(separated(pool, 1.0), torch.tensor([[[2 * kept, kept]]], dtype=torch.float64))


def test_an_adapter_of_zeros_changes_nothing():
    pool = make_pool([torch.tensor([[[2.0, 0.0]]]), torch.zeros(1, 1, 2)], [torch.ones(1, 1, 1)] * 2)
    alone = 2.003 / 3.003
    assert torch.allclose(separated(pool, 1.0), torch.tensor([[[2 * alone, 0.0]]], dtype=torch.float64))


class Sum(core_space.CoreSpace):
    def merge(self, cores: Any) -> Tensor:
        return sum(cores[1:], cores[0])


def test_core_space_loses_nothing():
    pool = random_pool([2, 3], seed=1)
    assert torch.allclose(product(Sum(Rank(5))(pool))[0], sum(dense(pool)), atol=1e-5)
    assert torch.allclose(product(Sum(Rank(2))(pool))[0], best(sum(dense(pool)), 2), atol=1e-5)


def test_task_singular_vectors_are_made_orthogonal():
    pool = random_pool([2, 2], seed=2)
    kept = [torch.linalg.svd(matrix, full_matrices=False) for matrix in dense(pool)]
    nearest = [torch.linalg.svd(torch.cat(part, 1), full_matrices=False) for part in (
        [U[:, :2] for U, _, _ in kept], [Vh[:2].mT for _, _, Vh in kept])]  # fmt: skip
    U, V = (left @ right for left, _, right in nearest)
    expected = (U * torch.cat([S[:2] for _, S, _ in kept])) @ V.mT
    torch.testing.assert_close(product(core_space.TSV(Rank(4))(pool))[0], expected, rtol=1e-4, atol=1e-5)


def test_isotropic_singular_values_are_the_mean():
    pool = random_pool([2, 2], seed=4)
    S = torch.linalg.svdvals(sum(dense(pool)))
    found = torch.linalg.svdvals(product(core_space.Iso(Rank(3))(pool))[0])[:3]
    assert torch.allclose(found, S[:4].mean().expand(3), rtol=1e-4)


def test_a_compressed_merge_of_equal_adapters_is_one_of_them():
    pool = random_pool([2], seed=5)
    both = Pool(pool.names, type(pool.factors)(torch.cat([pool.A] * 2, 1), torch.cat([pool.B] * 2, 2)),
                torch.cat([pool.scale] * 2, 1), torch.cat([pool.weights] * 2, 1), (2, 2), (0, 1))  # fmt: skip
    found = product(core_space.CompressThenMerge(Rank(2), density=1.0)(both))[0]
    assert torch.allclose(found, dense(pool)[0], atol=1e-5)


# ---- running


@pytest.fixture(scope="module")
def bench(tiny: world.World, tmp_path_factory: pytest.TempPathFactory) -> evaluate.Bench:
    work = tmp_path_factory.mktemp("work")

    def adapter(task: str, seed: int) -> Path:
        return train.adapter(tiny.model, tiny.task(task), seed, work / f"{task}-{seed}", _TRAINING, lambda _: None)

    return evaluate.Bench(tiny, adapter, ResultLog(work / "log.jsonl"), lambda _: None)


_TRAINING = train.Training(steps=4, batch=4, lr=0.05)
PAIR = ("sst2", "sentiment140")


def logits(found: world.World, used: Any = None) -> Tensor:
    with torch.no_grad():
        return model.last_logits(used or found.model, [example.ids for example in found.task("sst2").test])


@pytest.mark.parametrize("name", evaluate.ROWS)
def test_every_method_changes_the_model_and_restores_it(
    bench: evaluate.Bench, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(routing, "_EXAMPLES", 3)
    monkeypatch.setattr(routing, "_STEPS", 3)
    monkeypatch.setattr(peers, "_STEPS", 3)
    adapters = bench.adapters(PAIR, 1)
    assert {len(part.A) for part in adapters.adapters[0].modules.values()} == {8}
    assert len(adapters.adapters[1].modules) < len(adapters.adapters[0].modules)  # queries and values only
    before = logits(adapters.world)
    with bench.methods[name].use(adapters, 1.0) as used:
        changed = (logits(adapters.world, used) - before).abs().max()
    assert torch.isfinite(changed)
    assert (changed > 1e-5) == (name != "base")
    assert torch.equal(logits(adapters.world), before)


def test_peft_merges_as_we_do(bench: evaluate.Bench):
    adapters = bench.adapters(PAIR, 1)
    logits_of: dict[str, Tensor] = {}
    for name in ("svd", "peft svd", "ties", "peft ties"):
        with bench.methods[name].use(adapters, 1.0):
            logits_of[name] = logits(adapters.world)
    torch.testing.assert_close(logits_of["peft svd"], logits_of["svd"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits_of["peft ties"], logits_of["ties"], rtol=1e-3, atol=1e-4)


def test_robust_merge_sums_the_largest_entries_of_each_factor(bench: evaluate.Bench):
    first = LowRank(torch.tensor([[4.0, 0, 0, 0, 1]]), torch.tensor([[10.0], [0], [0], [0], [1]]))
    second = LowRank(torch.tensor([[0, 0, 0, 2.0, 2], [1.0, 0, 0, 0, 6]]),
                     torch.tensor([[0, 5], [0, 0], [0, 0], [7.0, 0], [1, 0]]), alpha=4.0)  # fmt: skip
    adapters = replace(bench.adapters(PAIR, 1), adapters=(Adapter({"x": first}), Adapter({"x": second})))
    merged = peers.robust_merge(adapters).modules["x"]
    # all entries of the first are kept, and of the second all but 1 in the second row of A, so that its s is 7/6
    torch.testing.assert_close(merged.A, torch.tensor([[4.0, 0, 0, 2, 3], [0, 0, 0, 0, 6]]))
    rows = [[5.0, 10], [0, 0], [0, 0], [7, 0], [1.5, 0]]
    torch.testing.assert_close(merged.B, torch.tensor(rows))


def test_xlora_adds_a_single_adapter_in_full(bench: evaluate.Bench, monkeypatch: pytest.MonkeyPatch):
    """A softmax over one expert is 1."""
    monkeypatch.setattr(peers, "_STEPS", 1)
    adapters = bench.adapters(("sst2",), 1)
    with merged_in(adapters.world.model, adapters.adapters[0], 1.0):
        alone = logits(adapters.world)
    with bench.methods["xlora"].use(adapters, 1.0) as used:
        torch.testing.assert_close(logits(adapters.world, used), alone, rtol=1e-3, atol=1e-4)


def test_an_adapter_alone_is_the_only_expert_that_arrow_can_choose(bench: evaluate.Bench):
    adapters = bench.adapters(("sst2",), 1)
    with merged_in(adapters.world.model, adapters.adapters[0], 1.0):
        alone = logits(adapters.world)
    with routing.arrow().use(adapters, 1.0):
        torch.testing.assert_close(logits(adapters.world), alone, rtol=1e-3, atol=1e-4)
    with routing.routed(routing._logo).use(adapters, 1.0):
        torch.testing.assert_close(logits(adapters.world), alone, rtol=1e-3, atol=1e-4)


def test_the_classifier_finds_the_task_of_a_prompt(bench: evaluate.Bench):
    adapters = bench.adapters(PAIR, 1)
    choose = routing._classifier(adapters)
    ids, mask = model.padded([bench.world.task(task).test[0].ids for task in PAIR] + [bench.world.neutral[0]])
    assert choose(ids, mask).tolist() == [[1, 0], [0, 1], [0, 0]]


def test_a_run_resumes_and_its_rows_are_published(tiny: world.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = ResultLog(tmp_path / "log.jsonl")
    arguments = (tiny, tmp_path, log, [2], ["base", "sum"], [1, 2], _TRAINING, -1.0)
    main.measure(*arguments)
    rows = report.rows(log)
    assert [(row.method, row.seed) for row in rows] == [(m, s) for m in ("alone", "base", "sum") for s in (1, 2)]
    assert all(row.n == 2 and list(row.accuracies) == ["sst2", "emotion"] for row in rows)
    assert [row.normalised for row in rows[:2]] == [1.0, 1.0]
    assert [row.base for row in rows[2:4]] == [1.0, 1.0]
    monkeypatch.setattr(evaluate, "mean", lambda _: pytest.fail("a result was measured again"))
    main.measure(*arguments)
    out = tmp_path / "missing" / "out"
    report.publish(log, out)
    published = json.loads((out / "results.json").read_text())["rows"]
    assert {"method", "n", "seed", "rank", "strength", "normalised", "worst", "held_out", "base", "needs_data"} <= set(
        published[0]
    )
    assert "| sum | 100% |" in (out / "table.md").read_text()
    assert (out / "normalised_and_held_out.png").stat().st_size > 1000


def test_strengths_climb_to_the_best(bench: evaluate.Bench, monkeypatch: pytest.MonkeyPatch):
    merit = dict(zip(evaluate.STRENGTHS, (0.1, 0.4, 0.6, 0.5, 0.3, 0.2, 0.1), strict=True))
    tried: list[float] = []

    def dev(_: evaluate.Bench, method: str, tasks: Any, seed: int, strength: float) -> float:
        tried.append(strength)
        return merit[strength]

    monkeypatch.setattr(evaluate.Bench, "dev", dev)
    assert bench.strength("sum", PAIR) == 0.45
    assert set(tried) == {0.3, 0.45, 0.65}
    merit |= {1.0: 0.6, 1.4: 0.7, 0.45: 0.2}
    assert bench.strength("sum", PAIR) == 1.4
    assert bench.strength("base", PAIR) == 1.0


def test_tasks_that_gain_too_little_are_passed_over(bench: evaluate.Bench, monkeypatch: pytest.MonkeyPatch):
    gains = {"sst2": 0.3, "emotion": 0.05, "qqp": 0.1}
    monkeypatch.setattr(evaluate.Bench, "gain", lambda _, task: {"base": 0.5, "alone": 0.5 + gains.get(task, 0.2)})
    assert main.learnt(bench, 3, 0.1) == ["sst2", "qqp", "sentiment140"]
