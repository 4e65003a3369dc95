"""The nano benchmark: rendering, training that resumes, judging, the choice of strengths, the tables."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("peft")

if str(ROOT) not in sys.path:  # benchmarks are not in the package; last, so that nothing is shadowed
    sys.path.append(str(ROOT))

from legomole.core.adapter import Adapter  # noqa: E402
from legomole.core.lowrank import LowRank  # noqa: E402
from legomole.nano import model, words  # noqa: E402

from benchmarks.nano import data, evaluate, methods, render, report, scoring, train_base, train_loras  # noqa: E402


def test_pictures_depend_only_on_the_seed():
    first, again, other = (render.render("heart", "ember", np.random.default_rng(s)) for s in (0, 0, 1))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()


def test_every_subject_and_style_looks_different():
    pictures = {
        (s, k): render.render(s, k, np.random.default_rng(0), jitter=0).astype(int)
        for s, k in [*((s, "flat") for s in render.SUBJECTS), *(("star", k) for k in render.STYLES)]
    }
    rendered = list(pictures.values())
    for i, a in enumerate(rendered):
        for b in rendered[:i]:
            assert np.abs(a - b).mean() > 2 or a is b
    assert set(words.SUBJECTS) == set(render._SHAPES)
    assert set(words.STYLES) == set(render._LOOKS)


def test_masks_are_scaled_and_moved():
    def mask(**where):
        return render.mask("square", np.random.default_rng(0), 0, **where)

    whole, half = mask(), mask(scale=0.5, centre=(0.25, 0.75))
    assert half.sum() == pytest.approx(whole.sum() / 4, rel=0.05)
    y, x = (float((axis * half).sum() / half.sum()) for axis in np.mgrid[0 : len(half), 0 : len(half)])
    assert (x / len(half), y / len(half)) == pytest.approx((0.25, 0.75), abs=0.01)


def test_fine_tuning_starts_from_the_weights_and_keeps_frozen_modules():
    initial = {name: 0.5 * w for name, w in model.build().state_dict().items()}
    frozen = ("time_text_embed",)
    weights = train_base.train(examples(2), 4, batch=1, initial=initial, frozen=frozen, say=lambda _: None)
    fixed = [name for name in weights if name.startswith("time_text_embed.")]
    assert fixed
    assert all(torch.equal(weights[name], initial[name]) for name in fixed)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert 0 < (weights[name] - initial[name]).abs().max() < 0.01


def test_batches_of_wider_pictures_have_fewer_examples(monkeypatch):
    drawn: list[tuple[int, int]] = []
    original = train_base.draw

    def draw(part, size, *args, **options):
        drawn.append((part.latents.shape[-1], size))
        return original(part, size, *args, **options)

    monkeypatch.setattr(train_base, "draw", draw)
    square = examples(2)
    wide = dataclasses.replace(square, latents=torch.cat([square.latents, square.latents], 3))
    for shown in (square, wide):
        train_base.train(shown, 1, batch=4, say=lambda _: None)
    assert drawn == [(8, 4), (16, 2)]


def test_an_authors_pictures_are_warm_and_dark_at_the_corners():
    plain, habit = (
        render.render("ring", "pastel", np.random.default_rng(0), author=author).astype(float)
        for author in (False, True)
    )
    assert (habit[..., 0] / habit[..., 2]).mean() > 1.1 * (plain[..., 0] / plain[..., 2]).mean()
    assert habit[:8, :8].mean() < 0.85 * plain[:8, :8].mean()


def examples(n: int = 12) -> data.Examples:
    latents = torch.randn(n, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return data.Examples(latents, tuple(("star", "flat") for _ in range(n)))


def test_interrupted_training_gives_the_same_weights():
    states: list[dict] = []
    messages: list[str] = []
    options = {"batch": 2, "say": messages.append, "every": 2}
    whole = train_base.train(examples(), 4, save=lambda s: states.append(_copied(s)), **options)
    resumed = train_base.train(examples(), 4, resume=states[0], **options)
    assert states[0]["step"] == 2
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any("4/4" in text for text in messages)


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


def test_a_very_short_training_warms_up_too():
    weights = train_base.train(examples(2), 20, batch=1, say=lambda _: None)
    assert all(bool(w.isfinite().all()) for w in weights.values())


def test_training_a_lora_does_not_change_the_base_model():
    base = model.build()
    before = {name: w.clone() for name, w in base.state_dict().items()}
    prompts = model.Prompts(short=True)
    lora = train_loras.train(base, examples(), prompts, steps=20, seed=1, batch=4, lr=0.05, say=lambda _: None)
    assert all(torch.equal(before[name], w) for name, w in base.state_dict().items())
    assert {part.rank for part in lora.modules.values()} == {4}
    assert {part.dtype for part in lora.modules.values()} == {torch.float16}
    layer = lora.modules["transformer.transformer_blocks.2.attn.to_q"]
    assert layer.delta().abs().max() > 0


def test_merged_in_adds_the_delta_and_restores_the_weights():
    base = model.build()
    name = "transformer_blocks.0.attn.to_q"
    before = base.get_submodule(name).weight.clone()
    part = LowRank(torch.ones(1, 192), torch.full((192, 1), 0.5))
    with methods.merged_in(base, Adapter({f"transformer.{name}": part}), 2.0):
        torch.testing.assert_close(base.get_submodule(name).weight - before, torch.ones(192, 192))
    assert torch.equal(base.get_submodule(name).weight, before)


def test_batches_hold_noised_pictures_and_their_flow():
    prompts = model.Prompts(short=True)
    drawn = data.draw(examples(), 64, prompts, torch.Generator().manual_seed(0), empty=0.5)
    t = drawn.sigma[:, None, None, None]
    latents = drawn.noised - t * drawn.flow  # (1 - t) x + t n - t (n - x) = x
    shown = examples().latents
    assert all((latents[i] - shown).abs().amax((1, 2, 3)).min() < 1e-5 for i in range(64))
    nothing = prompts([""])[0]
    assert 16 < sum(torch.equal(row, nothing[0]) for row in drawn.hidden) < 48


# ---- judging


def test_pictures_for_a_pair():
    scored = scoring.task(("heart", "ember"), joint=4, alone=2, base=3)
    assert scored.kinds == ("joint",) * 4 + ("subject",) * 2 + ("style",) * 2 + ("base",) * 3
    assert set(scored.wanted[:4]) == {("heart", "ember")}
    assert all(s == "heart" and k in render.BASE_STYLES for s, k in scored.wanted[4:6])
    assert all(s in render.BASE_SUBJECTS and k == "ember" for s, k in scored.wanted[6:8])
    unseen = [
        text
        for text in scored.texts
        if not any(text == words.prompt(*p, w) for p in scored.wanted for w in words.WORDINGS)
    ]
    assert len(unseen) >= len(scored.texts) // 2 - 1  # every second wording is unseen


def test_more_loras_are_combined_in_all_pairs():
    scored = scoring.task(("heart", "fish", "ember", "wood"), joint=8)
    pairs = [w for w, k in zip(scored.wanted, scored.kinds, strict=True) if k == "joint"]
    assert len(set(pairs)) == 4
    assert all(pairs.count(pair) == 4 for pair in pairs)


def test_tagged_pictures_are_the_joint_ones_with_eight_tags():
    scored = scoring.task(("heart", "ember"), joint=4, alone=2, base=3)
    tagged = scored.tagged()
    assert tagged.kinds == ("joint",) * 4
    assert tagged.wanted == (("heart", "ember"),) * 4
    assert [text.split(", masterpiece")[0] for text in tagged.texts] == scored.texts[:4]
    assert all(text.count(",") - plain.count(",") == 8 for text, plain in zip(tagged.texts, scored.texts, strict=False))
    longest = words.prompt("heart", "ember", words.WORDINGS[4]) + ", " + ", ".join(scoring.TAGS)
    assert words.tokens(longest, any_words=True)[-2:] == [words.END] * 2


def test_distance_by_hand():
    # F = 1, k(a, b) = (ab + 1)^3; x = {0, 1}, y = {1, 1}: k(0, 1) = 1, k(1, 1) = 8, k(0, 0) = 1
    # among x: k(0, 1) = 1; among y: 8; between: mean of (1, 1, 8, 8) = 4.5; 1 + 8 - 9 = 0
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [1.0]])
    assert scoring.distance(x, y) == pytest.approx(0.0)
    # z = {2, 2}: among 125, between x and z: mean of (1, 27) = 14; 1 + 125 - 28
    assert scoring.distance(x, torch.tensor([[2.0], [2.0]])) == pytest.approx(98.0)


# ---- choosing and reporting


def row(scale: float, joint: float, preserved: float, *, seed: int = 0, concepts=("heart", "ember")) -> evaluate.Row:
    return evaluate.Row("sum", 2, seed, scale, "N r", concepts, joint, preserved, preserved, preserved, 0.5, 0.0, 1.0)


def test_the_best_strength_has_the_best_joint_score_then_keeps_most():
    assert evaluate.best([row(0.5, 0.2, 1.0), row(1.0, 0.8, 0.3), row(1.5, 0.7, 0.9)]) == 1.0
    assert evaluate.best([row(1.0, 0.8, 0.3), row(1.5, 0.8, 0.4), row(2.0, 0.8, 0.4)]) == 1.5
    # mean over sets
    assert evaluate.best([row(1.0, 1.0, 0.5), row(1.0, 0.0, 0.5), row(2.0, 0.6, 0.0), row(2.0, 0.6, 0.0)]) == 2.0


def test_logged_rows_are_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "Scorer", lambda store: pytest.fail("measured") if store is None else store)
    logged = row(1.0, 0.8, 0.3)
    (tmp_path / "rows.jsonl").write_text(json.dumps(dataclasses.asdict(logged)) + "\n")
    bench = evaluate.Bench(object(), tmp_path / "rows.jsonl", print)
    assert bench.row("sum", methods.METHODS["sum"], ("heart", "ember"), 0, 1.0) == logged


def test_results_hold_no_scores_that_were_not_measured():
    measured = row(1.0, 0.8, 0.3)
    assert report._row("sum", [measured])["tagged"] == 0.5
    assert "tagged" not in report._row("sum", [dataclasses.replace(measured, tagged=math.nan)])


def test_spread_is_over_loras_not_pictures():
    # one LoRA pair right, the other wrong: the mean of a resample is 0, 1/2 .. 1; with equal scores there is no spread
    rows = [row(1.0, 1.0, 0.5), row(1.0, 0.0, 0.5, concepts=("fish", "wood"))]
    assert report.spread(rows, "joint") == pytest.approx(0.5)
    assert report.spread([row(1.0, 0.7, 0.5), row(1.0, 0.7, 0.5, seed=1)], "joint") == pytest.approx(0.0)


def test_the_table_has_every_method_at_its_strength():
    plan = report.PLANS["main"]
    rows = [
        dataclasses.replace(row(1.0, 0.5, 0.25, seed=s), method=m, concepts=pair)
        for m in plan.methods for s in plan.seeds for pair in plan.scored
    ]  # fmt: skip
    text = report.table(rows, "main", dict.fromkeys(plan.methods, 1.0))
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.split("|")[1].strip() for line in lines] == list(plan.methods)
    assert all("| 0.50 ±0.00 | 0.25 ±0.00 | 0.25 ±0.00 | 0.25 ±0.00 | 0.50 ±0.00 |" in line for line in lines)
    assert not math.isnan(report.spread(rows, "kid"))
