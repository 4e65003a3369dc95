"""Concept detector: scores of single tokens, their smooth maximum, padding, and masks in models' arguments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as rules
from hypothesis import strategies as st
from legomole.core.errors import MergeError
from legomole.core.mole.concepts import ConceptDetector, smooth_maximum, text_mask
from torch import Tensor

from .mixtures import random_detector

F = 16
seeds = st.integers(0, 10_000)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states(count: int, seed: int = 0) -> Tensor:
    """Random states ``(1, count, F)`` of tokens that are no concept of `two_concepts`."""
    x = torch.randn(1, count, F, generator=generator(seed))
    x[..., :2] = 0
    return x


def two_concepts() -> ConceptDetector:
    """Concept 0 is the first feature, concept 1 the second; a token that is a concept scores 4 * 4 - 6 = 10."""
    weight = torch.zeros(2, F)
    weight[0, 0] = weight[1, 1] = 4.0
    return ConceptDetector(weight, torch.full((2,), -6.0), [["ember"], ["heart"]])


EMBER, HEART = torch.eye(F)[0], torch.eye(F)[1]  # a unit vector of 16 features has the root mean square 1/4


class TestSmoothMaximum:
    def test_by_hand(self):
        # temperature 1/2: weights e^2, e^0 -> (e^2 * 1 + 0) / (e^2 + 1); with -3 instead of 0: e^2, e^-6
        logits = torch.tensor([[1.0, 0.0], [1.0, -3.0]])
        found = smooth_maximum(logits, torch.ones(2, 2, dtype=torch.bool))
        e2, e6 = math.exp(2), math.exp(-6)
        assert found.tolist() == pytest.approx([e2 / (e2 + 1), (e2 - 3 * e6) / (e2 + e6)])

    def test_only_valid_entries_count(self):
        logits = torch.tensor([[5.0, 1.0, 0.0]])
        found = smooth_maximum(logits, torch.tensor([[False, True, True]]))
        assert float(found) == pytest.approx(math.exp(2) / (math.exp(2) + 1))
        assert float(smooth_maximum(logits, torch.tensor([[False, True, False]]))) == 1.0

    def test_without_valid_entries_it_is_very_negative(self):
        found = smooth_maximum(torch.full((2, 3), 5.0), torch.zeros(2, 3, dtype=torch.bool))
        assert bool((found < -1e30).all())
        assert bool(found.isfinite().all())

    def test_invalid_entries_that_are_not_finite_do_no_harm(self):
        logits = torch.tensor([[2.0, float("nan"), float("inf")]])
        assert smooth_maximum(logits, torch.tensor([[True, False, False]])).tolist() == [2.0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_very_negative_entries(self, dtype):
        for offset in (-40.0, -70.0, -100.0, -1000.0):
            found = smooth_maximum(
                torch.tensor([[offset, offset - 40]], dtype=dtype), torch.ones(1, 2, dtype=torch.bool)
            )
            assert float(found) == pytest.approx(offset)

    @given(st.lists(st.floats(-25, 25), min_size=1, max_size=40))
    @rules(max_examples=60, deadline=None)
    def test_it_lies_between_the_maximum_and_the_maximum_minus_half_the_log_of_the_count(self, logits):
        """The mean under softmax(x / T) is ``T logsumexp(x / T) - T H`` with entropy ``0 <= H <= log n``."""
        x = torch.tensor([logits], dtype=torch.float64)
        found = float(smooth_maximum(x, torch.ones_like(x, dtype=torch.bool)))
        assert max(logits) - 0.5 * math.log(len(logits)) - 1e-9 <= found <= max(logits) + 1e-9

    @given(st.floats(-20, 20), st.integers(1, 300))
    @rules(max_examples=30, deadline=None)
    def test_equal_entries_count_as_one(self, value, count):
        """So repeated end tokens score as one of them does."""
        x = torch.full((1, count), value, dtype=torch.float64)
        assert float(smooth_maximum(x, torch.ones_like(x, dtype=torch.bool))) == pytest.approx(value)


class TestPresence:
    def test_by_hand(self):
        # tokens (3, 4) and (4, -3), root mean square s = sqrt(12.5): scores (7 / s, 1 / s) and (6 / s, 8 / s)
        detector = ConceptDetector(torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([-1.0, 0.5]), [["a"], ["b"]])
        s = math.sqrt(12.5)
        expected: list[float] = []
        for one, other in (((3 + 4) / s - 1, (4 - 3) / s - 1), (6 / s + 0.5, 8 / s + 0.5)):
            a, b = math.exp(2 * one), math.exp(2 * other)
            expected.append(1 / (1 + math.exp(-(a * one + b * other) / (a + b))))
        found = detector(torch.tensor([[[3.0, 4.0], [4.0, -3.0]]]))
        assert found.shape == (1, 2)
        assert found[0].tolist() == pytest.approx(expected)

    def test_a_named_concept_is_present_and_another_is_absent(self):
        text = torch.cat([states(5), EMBER.expand(1, 1, F), states(3, 1)], 1)
        assert two_concepts()(text)[0].tolist() == pytest.approx([1, 0], abs=0.01)
        assert two_concepts()(states(9))[0].tolist() == pytest.approx([0, 0], abs=0.01)

    @given(seeds, st.integers(0, 600), st.integers(0, 600), st.floats(0.01, 100))
    @rules(max_examples=50, deadline=None)
    def test_other_tokens_never_close_a_gate(self, seed, before, after, size):
        """However many stand around the concept, and however large their states are."""
        bare = EMBER.expand(1, 1, F)
        text = torch.cat([size * states(before, seed), bare, size * states(after, seed + 1)], 1)
        alone, found = two_concepts()(bare)[0], two_concepts()(text)[0]
        assert float(found[0]) > 0.999 * float(alone[0])
        assert float(found[1]) < 0.01

    @given(seeds, st.integers(1, 30))
    @rules(max_examples=30, deadline=None)
    def test_of_random_detectors_any_tokens_lower_a_score_by_half_the_log_of_their_number_at_most(self, seed, count):
        detector = random_detector(3, F, seed)
        one = torch.randn(1, 1, F, generator=generator(seed))
        text = torch.cat([one, torch.randn(1, count, F, generator=generator(seed + 1))], 1)
        alone, found = (torch.logit(detector(x).double(), eps=1e-9)[0] for x in (one, text))
        assert bool((found > alone - 0.5 * math.log(1 + count) - 1e-3).all())

    @given(seeds, st.permutations(range(9)))
    @rules(max_examples=30, deadline=None)
    def test_the_order_of_the_tokens_does_not_matter(self, seed, order):
        text = torch.randn(2, 9, F, generator=generator(seed))
        detector = random_detector(3, F)
        assert torch.allclose(detector(text[:, order]), detector(text), atol=1e-6)

    @given(seeds, st.lists(st.floats(0.05, 20), min_size=9, max_size=9))
    @rules(max_examples=30, deadline=None)
    def test_prompt_weights_do_not_matter(self, seed, weights):
        text = torch.randn(2, 9, F, generator=generator(seed))
        detector = random_detector(3, F)
        assert torch.allclose(detector(torch.tensor(weights)[:, None] * text), detector(text), atol=1e-5)

    def test_where_a_concept_stands_does_not_matter(self):
        """At the first, a middle and the last position, and in the second chunk of 77 tokens."""
        for length in (77, 154):
            for place in (0, length // 2, length - 1):
                text = states(length)
                text[0, place] = HEART
                assert two_concepts()(text)[0].tolist() == pytest.approx([0, 1], abs=0.01)

    def test_an_expert_without_weights_is_always_present(self):
        detector = ConceptDetector(torch.zeros(1, F), torch.tensor([30.0]), [[]])
        assert float(detector(states(4))) == 1.0


class TestPadding:
    @given(seeds, st.lists(st.integers(1, 9), min_size=2, max_size=4), st.sampled_from(["zeros", "mask"]))
    @rules(max_examples=40, deadline=None)
    def test_a_batch_of_texts_of_different_lengths_equals_each_alone(self, seed, lengths, kind):
        detector = random_detector(3, F)
        texts = [torch.randn(1, length, F, generator=generator(seed + i)) for i, length in enumerate(lengths)]
        longest = max(lengths)
        fill = torch.zeros if kind == "zeros" else torch.ones
        batch = torch.cat([torch.cat([text, 9 * fill(1, longest - text.shape[1], F)], 1) for text in texts])
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None] if kind == "mask" else None
        alone = torch.cat([detector(text) for text in texts])
        assert torch.allclose(detector(batch, mask), alone, atol=1e-6)

    def test_the_mask_may_leave_out_the_first_tokens_too(self):
        """Language models are often padded on the left."""
        detector, text = random_detector(2, F), states(5)
        mask = torch.tensor([[False, False, True, True, True]])
        assert torch.allclose(detector(text, mask), detector(text[:, 2:]), atol=1e-6)

    def test_a_text_without_tokens_names_nothing(self):
        detector = random_detector(2, F)
        for text, mask in ((torch.zeros(1, 4, F), None), (states(4), torch.zeros(1, 4, dtype=torch.bool))):
            assert detector(text, mask)[0].tolist() == pytest.approx([0, 0], abs=1e-9)

    def test_repeated_end_tokens_that_no_mask_leaves_out_move_a_score_towards_their_own_at_most(self):
        end, text = states(1, 5), states(4)
        detector = random_detector(3, F)
        few, many = (detector(torch.cat([text, end.expand(1, n, F)], 1)) for n in (1, 70))
        scores = torch.logit(detector(end).double())
        assert bool((torch.logit(many.double()) >= torch.minimum(torch.logit(few.double()), scores) - 1e-4).all())


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_widened_first(self, dtype):
        detector = random_detector(3, F)
        text = torch.randn(2, 9, F, generator=generator(0)).to(dtype)
        assert detector(text).dtype == torch.float32
        assert torch.equal(detector(text), detector(text.float()))

    def test_the_largest_values_of_float16_do_not_overflow(self):
        text = torch.full((1, 3, F), 60_000.0, dtype=torch.float16)
        assert torch.allclose(random_detector(2, F)(text), random_detector(2, F)(torch.ones(1, 3, F)), atol=1e-5)

    def test_float64_is_computed_in_float64(self):
        detector, text = random_detector(3, F), torch.randn(2, 9, F, generator=generator(0))
        found = detector(text.double())
        assert found.dtype == torch.float32
        assert torch.allclose(found, detector(text), atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_cast_module_still_computes_in_float32(self, dtype):
        detector = random_detector(3, F)
        text = torch.randn(2, 9, F, generator=generator(0))
        assert torch.allclose(random_detector(3, F).to(dtype)(text), detector(text), atol=0.02)


class TestModule:
    def test_shapes_are_checked(self):
        w, b = torch.zeros(2, F), torch.zeros(2)
        for bad in ((w[0], b, [["a"], ["b"]]), (w, b[:1], [["a"], ["b"]]), (w, b, [["a"]])):
            with pytest.raises(MergeError, match="a weight, a bias and words for every LoRA"):
                ConceptDetector(*bad)

    def test_another_text_encoder(self):
        with pytest.raises(MergeError, match=r"another width[\s\S]*16 features[\s\S]*found: +8[\s\S]*text encoders"):
            two_concepts()(torch.zeros(1, 3, 8))

    def test_select(self):
        detector = random_detector(3, F, words=[["a"], [], ["c", "d"]])
        left, text = detector.select([2, 0]), torch.randn(2, 9, F, generator=generator(0))
        assert left.words == (("c", "d"), ("a",))
        assert torch.equal(left(text), detector(text)[:, [2, 0]])
        left.weight.zero_()
        assert bool(detector.weight.any(1).all())  # a copy

    def test_it_has_no_parameters(self):
        """It is fitted once; gate training does not change it."""
        assert list(two_concepts().parameters()) == []
        assert set(two_concepts().state_dict()) == {"weight", "bias"}
        assert two_concepts().features == F


class TestTextMask:
    text = torch.zeros(2, 3, F)
    rows = torch.tensor([[True, True, False], [True, False, False]])

    @pytest.mark.parametrize(
        "name", ["attention_mask", "encoder_attention_mask", "encoder_hidden_states_mask", "text_embedding_mask"]
    )
    def test_of_ones_and_zeros_of_booleans_and_added_to_logits(self, name):
        for mask in (
            self.rows, self.rows.long(), self.rows.half(),
            torch.where(self.rows, 0.0, -10_000.0), torch.where(self.rows, 0.0, torch.finfo(torch.float32).min),
        ):  # fmt: skip
            found = text_mask({name: mask, "timestep": torch.ones(2, 3)}, self.text)
            assert found is not None
            assert found.tolist() == self.rows.tolist()

    def test_of_another_length_or_shape_or_none_at_all(self):
        for mask in (None, torch.ones(2, 5), torch.ones(2, 1, 1, 3), torch.ones(3), [[1, 1, 0]]):
            assert text_mask({"attention_mask": mask}, self.text) is None
        assert text_mask({}, self.text) is None

    def test_the_one_that_fits_the_text_is_taken(self):
        """Some models take a mask of their image tokens as well."""
        arguments = {"attention_mask": torch.ones(2, 64), "encoder_attention_mask": self.rows.long()}
        found = text_mask(arguments, self.text)
        assert found is not None
        assert found.tolist() == self.rows.tolist()
