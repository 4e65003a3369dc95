"""The regions benchmark: scenes, passes per region, judging, rows that resume."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("peft")

if str(ROOT) not in sys.path:  # benchmarks are not in the package; last, so that nothing is shadowed
    sys.path.append(str(ROOT))

from legomole.nano.model import predict  # noqa: E402
from legomole.nano.sampling import noise  # noqa: E402
from legomole.nano.words import SUBJECTS, WORDINGS  # noqa: E402

from benchmarks.nano.render import BASE_STYLES, BASE_SUBJECTS, NEW_SUBJECTS  # noqa: E402
from benchmarks.regions import evaluate, judge, methods, report, scenes, scoring, train  # noqa: E402
from benchmarks.regions.scenes import Scene  # noqa: E402
from benchmarks.regions.store import RegionStore  # noqa: E402

PAIR = ("heart", "fish")


@pytest.fixture(scope="module")
def store() -> RegionStore:
    return RegionStore()


def test_each_half_of_a_scene_shows_its_subject(store):
    shown = [Scene(k, a, b) for k in ("flat", "neon") for a, b in itertools.pairwise(SUBJECTS)]
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(np.stack([scene.render(rng) for scene in shown])).permute(0, 3, 1, 2) / 127.5 - 1
    assert pictures.shape == (30, 3, 64, 128)
    verdict = scoring.judged(store, pictures)
    assert verdict.right(shown).float().mean() > 0.9
    swapped = [Scene(scene.style, scene.right, scene.left) for scene in shown]
    assert verdict.subject_right(swapped).float().mean() < 0.05


def test_an_empty_half_is_nothing_and_a_blend_a_mixture(store):
    data = judge.squares(store_of_nano(), 1, 5)
    found = judge.accuracy(store.oracle, data)
    assert min(found["subject"], found["none"]) > 0.9
    assert found["mixture"] > 0.7
    empty = torch.from_numpy(Scene("dots", left="moon").render(np.random.default_rng(1))).permute(2, 0, 1)[None]
    assert scoring.judged(store, empty / 127.5 - 1).subjects.tolist() == [[SUBJECTS.index("moon"), judge.NONE]]


def store_of_nano():
    from legomole.nano.store import Store

    return Store()


def test_captions_fit_and_name_places():
    both = Scene("flat", "arrow", "house").captions()
    assert both[0] == "an arrow on the left, a house on the right, flat style"
    assert len(both) == len(WORDINGS) + 2
    assert all(caption.index("arrow") < caption.index("house") for caption in both)
    assert Scene("flat", right="house").captions()[0] == "a house on the right, flat style"
    assert not any("left" in c or "right" in c for c in Scene("flat", left="house", silent=True).captions())
    scenes.encoder(short=True)([c for s in (Scene("blueprint", "mushroom", "mushroom"), Scene("flat", "moon")) for c in
                                s.captions()])  # raises if one is too long  # fmt: skip


def test_a_subject_anywhere_is_one_shape_across_the_middle():
    """Both halves show parts of the same pose: a shape at the middle touches the seam from both sides alike."""
    for seed in range(20):
        picture = Scene("flat", anywhere="square").render(np.random.default_rng(seed)).astype(int)
        inside = (picture[..., 1] < 120).sum(0)  # height of the shape in each column
        if inside[62] and inside[65]:
            assert abs(inside[63] - inside[64]) <= 4
            return
    pytest.fail("no picture crosses the middle")


def test_training_scenes_hold_every_pair_and_no_new_subject():
    shown = scenes.base_scenes(1)
    assert {(s.left, s.right) for s in shown if s.left and s.right} == set(
        itertools.product(BASE_SUBJECTS, BASE_SUBJECTS)
    )
    assert not {s.left for s in shown} & set(NEW_SUBJECTS)
    assert {s.style for s in shown} == set(BASE_STYLES)


# ---- methods


def request(store, count: int = 2) -> methods.Request:
    return methods.Request(evaluate.both_scenes(PAIR, count, 0), scenes.encoder())


def one_pass(model, asked: methods.Request) -> torch.Tensor:
    n = len(asked.scenes)
    with torch.no_grad():
        return predict(
            model,
            noise(2 * n, 3, width=scenes.WIDTH),
            torch.full((2 * n,), 0.6),
            *asked.encoder([*asked.texts, *[""] * n]),
        )


def test_hooks_blend_one_pass_per_region(store):
    """By hand: inside each half the prediction is that of the model with its LoRA and the half's prompt."""
    asked, loras = request(store), methods.load_pair(store, scenes.encoder(), PAIR, 0)
    with methods.METHODS["hooks"](loras, asked) as model:
        blended = one_pass(model, asked)
    for side, (adapter, columns) in enumerate(zip(loras.adapters, (slice(0, 8), slice(8, 16)), strict=True)):
        halves = tuple(scene.half(scenes.SIDES[side]) for scene in asked.scenes)
        with methods.merged_in(store.transformer, adapter, methods.STRENGTH) as merged:
            alone = one_pass(merged, methods.Request(halves, asked.encoder))
        torch.testing.assert_close(blended[..., columns], alone[..., columns], rtol=1e-4, atol=1e-4)


def test_gates_leave_prompts_for_neither_to_the_base_model(store):
    loras = methods.load_pair(store, scenes.encoder(), PAIR, 0)
    asked = methods.Request(evaluate.base_scenes(2, 0), scenes.encoder())
    before = one_pass(store.transformer, asked)
    with methods.METHODS["gates"](loras, asked) as model:
        torch.testing.assert_close(one_pass(model, asked), before)
    with methods.METHODS["gates"](loras, request(store)) as model:
        named = one_pass(model, request(store))
    assert (named - one_pass(store.transformer, request(store))).abs().max() > 0.01


def test_masks_act_as_one_lora_where_the_other_is_masked_out(store):
    """With the same LoRA in both regions the masks cover the picture, as one LoRA with a map of ones."""
    asked = request(store)
    twice = methods.load_pair(store, scenes.encoder(), (PAIR[0], PAIR[0]), 0)
    with methods.METHODS["masks"](twice, asked) as model:
        masked = one_pass(model, asked)
    with methods.merged_in(store.transformer, twice.adapters[0], methods.STRENGTH) as merged:
        whole = one_pass(merged, asked)
    base = one_pass(store.transformer, asked)
    # text tokens get the LoRA of both regions, because the prompt names it: only the order of magnitude is the same
    assert (masked - whole).abs().mean() < 0.5 * (whole - base).abs().mean()


def test_every_method_can_sample(store):
    loras, asked = methods.load_pair(store, scenes.encoder(), PAIR, 0), request(store, 1)
    for name in ("masks", "automatic"):
        with methods.METHODS[name](loras, asked) as model:
            assert scoring.sampled(store, model, asked, 0).shape == (1, 3, 64, 128)


# ---- rows


def verdict(*subjects: tuple[str, str]) -> scoring.Verdict:
    names = [*SUBJECTS, "none", "mixture"]
    classes = torch.tensor([[names.index(name) for name in pair] for pair in subjects])
    return scoring.Verdict(classes, torch.zeros_like(classes))


def test_scores_by_hand():
    judged = verdict(("heart", "fish"), ("fish", "fish"), ("mixture", "none"), ("heart", "heart"))
    asked = [Scene("flat", *PAIR)] * 4
    assert judged.subject_right(asked).tolist() == [[True, True], [False, True], [False, False], [True, False]]
    assert evaluate.swapped(judged, PAIR).tolist() == [[False, False], [True, False], [False, False], [False, True]]


def row(method: str, pair: tuple[str, ...], seed: int, halves: float = 0.5) -> evaluate.Row:
    return evaluate.Row(method, pair, seed, 0.25, halves, 0.125, 0.25, 0.75, 1.0)


def bench_of(tmp_path: Path, rows: list[evaluate.Row]) -> evaluate.Bench:
    log = tmp_path / "rows.jsonl"
    log.write_text("".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in rows))
    return evaluate.Bench(RegionStore(tmp_path), log, pytest.fail)  # no weights: nothing can be measured


def all_rows() -> list[evaluate.Row]:
    pairs = [row(m, p, s) for m in methods.METHODS for p in evaluate.PAIRS for s in train.SEEDS]
    alone = [row(f"alone {side}", (c,), s, 0.8) for c in NEW_SUBJECTS for s in train.SEEDS for side in scenes.SIDES]
    return [*pairs, *alone, *(row("base", (), s) for s in train.SEEDS)]


def test_logged_rows_are_not_measured_again(tmp_path):
    bench = bench_of(tmp_path, all_rows())
    evaluate.run(bench)
    assert len(bench.rows) == len(all_rows())


def test_results_and_table(tmp_path):
    bench = bench_of(tmp_path, all_rows())
    report.publish(bench, dict.fromkeys(methods.METHODS, 0.02), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == len(methods.METHODS) * len(evaluate.PAIRS) * len(train.SEEDS)
    first = results["rows"][0]
    assert first == {"method": "sum", "pair": "heart+bolt", "seed": 0, "right_place": 0.25, "halves": 0.5,
                     "other": 0.125, "bleeding": 0.25, "base": 0.75, "relative": 0.625,
                     "seconds_per_step": 0.02}  # fmt: skip
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| sum")]
    assert lines == ["| sum | 0.25 ±0.00 | 0.50 ±0.00 | 0.62 | 0.12 ±0.00 | 0.25 ±0.00 | 0.75 ±0.00 | 20.0 | 1.00 |"]
