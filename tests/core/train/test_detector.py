"""Concept detectors fitted on conditionings of all kinds of text encoders, judged on prompts that are not fitted."""

from __future__ import annotations

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.train import EncodedPrompt, FittedDetector, PromptEncoder, fit_detector
from legomole.core.train.detector import _logistic_regression
from torch import Tensor

from .text_encoders import ENCODERS, T5, WIDTH, Clip, LanguageModel, Unknown, in_context

CONCEPTS = [["ember style", "burning"], ["heart"]]
TAGS = (
    "wearing a white dress", "standing in a garden", "full moon", "looking at the viewer", "by a famous artist",
    "oil on canvas", "muted palette", "early morning", "thick brush strokes", "fog", "hand drawn", "seen from above",
    "wide shot", "ornate frame", "warm tones", "grain", "very old photograph", "dust", "reflections in water",
    "long exposure", "portrait orientation", "minimal",
)  # fmt: skip
# words that a prompt puts around the concepts -> what it names
NAMED = {
    "a heart in ember style": (1, 1),
    "ember style heart": (1, 1),
    "HEART": (0, 1),
    "a mug, burning": (1, 0),
    "(heart:1.2) BREAK on a table": (0, 1),
    "on the wall of an empty room there hangs a large painting in ember style, next to a door": (1, 0),
    "a mug on a table": (0, 0),
    "two owls, one of them asleep": (0, 0),
    "": (0, 0),
}
NEAR_MISSES = (
    "in the style of an old master", "an office in modernist style", "a church in romanesque style", "dying ember",
    "art deco style furniture", "a glowing ember in the ash", "the style section", "romanesque style church",
)  # fmt: skip


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> PromptEncoder:
    return ENCODERS[request.param]


@pytest.fixture(scope="module")
def fitted(encoder: PromptEncoder) -> FittedDetector:
    return fit_detector(CONCEPTS, encoder)


def presence(detector: ConceptDetector, encoder: PromptEncoder, prompt: str) -> list[float]:
    row = encoder.encode(prompt)
    return detector(row.states[None], None if row.mask is None else row.mask[None])[0].tolist()


class TestNewPrompts:
    @pytest.mark.parametrize("prompt", NAMED)
    def test_a_concept_is_found_if_and_only_if_it_is_named(self, fitted, encoder, prompt: str):
        for found, named in zip(presence(fitted.detector, encoder, prompt), NAMED[prompt], strict=True):
            assert found > 0.9 if named else found < 0.3

    @pytest.mark.parametrize("extra", [4, 10, 20])
    @pytest.mark.parametrize("place", ["first", "middle", "last"])
    def test_words_around_it_do_not_count(self, fitted, encoder, extra: int, place: str):
        tags = TAGS[:extra]
        split = {"first": 0, "middle": extra // 2, "last": extra}[place]
        for core in ("a heart in ember style", "a mug on a table"):
            text = ", ".join([*tags[:split], core, *tags[split:]])
            bare, found = (presence(fitted.detector, encoder, prompt) for prompt in (core, text))
            for one, other, named in zip(found, bare, NAMED[core], strict=True):
                assert one > 0.9 * other if named else one < 0.3

    def test_concepts_far_apart(self, fitted, encoder):
        text = ", ".join(["burning", *TAGS[:12], "a heart"])
        assert min(presence(fitted.detector, encoder, text)) > 0.9

    def test_words_that_share_a_part_with_a_concept_are_no_hits(self, fitted, encoder):
        for text in ("heartbeat of the city", "hearts and minds", "burningly", "a sunburn"):
            assert max(presence(fitted.detector, encoder, text)) < 0.3, text

    def test_single_words_of_a_phrase_score_low(self, fitted, encoder):
        """Random encoders know nothing of words outside of the fit; the mean over several is what can be asked for."""
        found = [presence(fitted.detector, encoder, text)[0] for text in NEAR_MISSES]
        located = not isinstance(encoder, Unknown)  # else all words of a prompt count as its concept
        assert sum(found) / len(found) < (0.35 if located else 0.8), found

    def test_there_are_no_notes(self, fitted):
        assert fitted.notes == ()


class TestLongPrompts:
    @pytest.mark.parametrize("encoder", [Clip(), T5(512), LanguageModel()], ids=["CLIP", "T5", "language model"])
    @pytest.mark.parametrize("before", [60, 80, 180])
    def test_a_concept_beyond_77_tokens(self, encoder: PromptEncoder, before: int):
        text = " ".join((" ".join(TAGS) + " ").split() * 4).split()[:before]
        detector = fit_detector(CONCEPTS, encoder).detector
        none = presence(detector, encoder, " ".join(text))
        one = presence(detector, encoder, " ".join([*text, "heart"]))
        assert max(none) < 0.3
        assert one[0] < 0.3
        assert one[1] > 0.9

    def test_a_concept_that_the_text_encoder_cuts_off_is_not_found(self):
        encoder = ENCODERS["CLIP, one chunk"]
        detector = fit_detector(CONCEPTS, encoder).detector
        assert presence(detector, encoder, "mug " * 80 + "heart")[1] < 0.3


class TestFit:
    def test_it_is_deterministic(self):
        one, other = (fit_detector(CONCEPTS, Clip()).detector for _ in range(2))
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)
        assert one.weight.dtype == torch.float32
        assert one.words == (("ember style", "burning"), ("heart",))

    def test_an_expert_without_words_is_always_present(self):
        fitted = fit_detector([["heart"], [], ["  "]], Clip())
        assert fitted.detector.words == (("heart",), (), ())
        for prompt in ("a heart", "a mug", ""):
            assert presence(fitted.detector, Clip(), prompt)[1:] == [1.0, 1.0]
        assert fitted.notes == ()

    def test_its_other_concepts_are_the_same_as_without_it(self):
        alone, beside = fit_detector([["heart"]], Clip()).detector, fit_detector([[], ["heart"]], Clip()).detector
        assert torch.equal(beside.weight[1], alone.weight[0])

    def test_words_are_found_whatever_their_case_and_the_space_around_them(self):
        one, other = fit_detector([[" Heart "]], Clip()).detector, fit_detector([["Heart"]], Clip()).detector
        assert other.words == one.words == (("Heart",),)
        assert torch.equal(one.weight, other.weight)
        assert presence(one, Clip(), "a heart")[0] > 0.9

    def test_many_words_of_one_concept(self):
        names = [f"name{chr(97 + i)}" for i in range(25)]
        detector = fit_detector([names, ["heart"]], Clip()).detector
        for name in names:
            assert presence(detector, Clip(), f"a {name} on a table")[0] > 0.7

    def test_further_prompts_are_fitted_too(self):
        encoder = _Recording()
        fit_detector([["heart"]], encoder, ["a mug shaped like a pump", "a heart"])
        assert "a mug shaped like a pump" in encoder.prompts
        assert encoder.prompts.count("a heart") == 1

    def test_progress_is_reported_and_may_cancel(self):
        encoder, reports = _Recording(), list[tuple[int, int, str]]()
        fit_detector([["heart"]], encoder, progress=lambda *report: reports.append(report))
        count = len(encoder.prompts)
        assert reports == [(i + 1, count, "encoding prompts") for i in range(count)]

        def stop(done: int, total: int, what: str) -> None:
            raise KeyboardInterrupt

        encoder = _Recording()
        with pytest.raises(KeyboardInterrupt):
            fit_detector([["heart"]], encoder, progress=stop)
        assert len(encoder.prompts) == 1


class TestPadding:
    def test_the_number_of_repeated_end_tokens_does_not_matter(self):
        """Of equal tokens at the end the first, a middle and the last one are learnt from."""
        short, long = (fit_detector(CONCEPTS, T5(length)).detector for length in (160, 1000))
        assert torch.allclose(short.weight, long.weight, rtol=1e-3, atol=1e-3)
        assert torch.allclose(short.bias, long.bias, rtol=1e-3, atol=1e-3)

    def test_positions_that_the_mask_leaves_out_do_not_matter(self):
        plain = fit_detector(CONCEPTS, LanguageModel()).detector
        for padding in (0.0, -7.0, float("nan")):
            padded = fit_detector(CONCEPTS, LanguageModel(16, padding)).detector
            assert torch.equal(padded.weight, plain.weight)
            assert torch.equal(padded.bias, plain.bias)

    def test_zeros_are_padding_without_a_mask(self):
        class Zeros(LanguageModel):
            def encode(self, prompt: str) -> EncodedPrompt:
                row = super().encode(prompt)
                return EncodedPrompt(row.states, None, row.offsets)

        plain, zeros = fit_detector(CONCEPTS, LanguageModel()).detector, fit_detector(CONCEPTS, Zeros(16)).detector
        assert torch.equal(zeros.weight, plain.weight)


class TestNotes:
    def test_words_that_the_text_encoder_does_not_tell_from_others(self):
        class Constant(Clip):
            def encode(self, prompt: str) -> EncodedPrompt:
                row = super().encode(prompt)
                return EncodedPrompt(torch.ones_like(row.states), None, row.offsets)

        assert fit_detector([["heart"]], Clip()).notes == ()
        (note,) = fit_detector([["heart", "love"], []], Constant()).notes
        assert "the text encoders hardly tell 'heart' or 'love' from other words: found in" in note
        assert "of the prompts that name it and in" in note


class TestErrors:
    def test_no_words_at_all(self):
        for concepts in ([], [[], []], [[" "], []]):
            with pytest.raises(MergeError, match=r"No LoRA has words[\s\S]*ember style"):
                fit_detector(concepts, Clip())

    def test_words_that_the_text_encoders_never_get(self):
        class Cut(Clip):
            """Its conditioning ends before the first word."""

            def encode(self, prompt: str) -> EncodedPrompt:
                return EncodedPrompt(in_context(self.ids(prompt), WIDTH)[:1], None, {"l": 0})

        with pytest.raises(MergeError, match=r"never get the words of a LoRA[\s\S]*'heart' or 'love'"):
            fit_detector([["heart", "love"]], Cut())


class TestLogisticRegression:
    def test_equals_scikit_learns_on_single_tokens(self):
        linear_model = pytest.importorskip("sklearn.linear_model")
        g = torch.Generator().manual_seed(0)
        positive, negative = torch.randn(30, 6, generator=g).double() + 0.8, torch.randn(90, 6, generator=g).double()
        weight, bias = _logistic_regression(positive, [1] * 30, negative)
        x, y = torch.cat([positive, negative]).numpy(), [1] * 30 + [0] * 90
        # ours: half the mean of either kind + 1e-3 / 2 |w|^2; theirs: the sum of s_i loss_i + |w|^2 / 2
        weights = [1 / (2 * 30 * 1e-3)] * 30 + [1 / (2 * 90 * 1e-3)] * 90
        oracle = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x, y, sample_weight=weights)
        assert weight.tolist() == pytest.approx(oracle.coef_[0].tolist(), abs=1e-3)
        assert float(bias) == pytest.approx(float(oracle.intercept_[0]), abs=1e-3)

    def test_of_each_occurrence_the_token_counts_that_is_recognised_best(self):
        """Each occurrence has one token of the concept and others that negatives have too."""
        g = torch.Generator().manual_seed(0)
        common = torch.randn(20, 8, generator=g).double()
        concept = torch.eye(8)[0].double() * 6
        rows: list[Tensor] = []
        sizes = [1 + i % 4 for i in range(24)]
        for i, size in enumerate(sizes):
            rows += [concept, *(common[(i + j) % 20] for j in range(size - 1))]
        weight, bias = _logistic_regression(torch.stack(rows), sizes, common)
        assert float(concept @ weight + bias) > 3
        assert float((common @ weight + bias).max()) < -2


class _Recording(Clip):
    """Remembers which prompts it encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[str] = []

    def encode(self, prompt: str) -> EncodedPrompt:
        self.prompts.append(prompt)
        return super().encode(prompt)
