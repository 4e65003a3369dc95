"""Automatic regions: attention to the words of each LoRA becomes maps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.attach import Attachment, attach
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.regions.automatic import AttentionSums, found_maps, token_shares
from legomole.core.mole.regions.layouts import SequenceLayout
from legomole.core.mole.regions.picture import Part, Picture
from torch import Tensor, nn

from ..mixtures import lora
from ..models import FEATURES
from .models import ByPosition, latent_and_text
from .test_factors import Reader

pytestmark = pytest.mark.usefixtures("no_gradients")

PICTURE, TEXT_FIRST = Picture(2, 1, 2, 4), SequenceLayout(order="text first")
HALVES = torch.tensor([[5.0, 5, -5, -5]] * 2)


def queries_and_keys(length: int = 3) -> tuple[Tensor, Tensor]:
    """Positions of the left half attend to token 1, those of the right half to token 2, by e^10 times as much."""
    query = torch.zeros(2, 1, 8, 4)
    query[..., [0, 1, 4, 5], 1] = query[..., [2, 3, 6, 7], 2] = 20
    key = torch.zeros(2, 1, length, 4)
    key[..., 1, 1] = key[..., 2, 2] = 1
    return query, key


def attended(
    query: Tensor, key: Tensor, layout: SequenceLayout = TEXT_FIRST, *, mask: Tensor | None = None, before: Any = None
) -> Tensor | None:
    shares = torch.zeros(1, 3, 2)
    shares[0, 1, 0] = shares[0, 2, 1] = 1
    sums = AttentionSums(PICTURE, (1, 1, 1), layout, [1], shares, [3, 3], before)
    sums.read(query, key, None, mask)
    return sums.total


def test_cross_attention_is_read() -> None:
    """The logarithms are 0 and -10, less their mean; a second attention is added."""
    total = attended(*queries_and_keys())
    assert total.shape == (1, 2, 2, 4)
    torch.testing.assert_close(total[0], torch.stack([HALVES, -HALVES]), atol=1e-3, rtol=0)
    torch.testing.assert_close(attended(*queries_and_keys(), before=total), 2 * total)


@pytest.mark.parametrize("shape", [(2, 1, 8, 3), (8, 3)])
def test_the_attention_mask_counts(shape: tuple[int, ...]) -> None:
    """An additive mask that takes 4 from the upper row's products with token 1; and a word that is hidden from all."""
    query, key = queries_and_keys()
    mask = torch.zeros(shape)
    mask[..., :4, 1] = -4
    total = attended(query, key, mask=mask)
    # of the products' logarithms: upper row 0 (e^6 : 1) and -14, clamped at 1e-6; lower row 0 and -10
    low = math.log(1e-6)
    expected = torch.tensor([[0.0, 0, low, low], [0, 0, -10, -10]])
    torch.testing.assert_close(total[0, 0], expected - expected.mean(), atol=3e-3, rtol=0)
    hidden = torch.ones(shape, dtype=torch.bool)
    hidden[..., 2] = False
    assert torch.equal(attended(query, key, mask=hidden), torch.zeros(1, 2, 2, 4))


def test_heads_that_share_keys_are_read() -> None:
    query, key = queries_and_keys()
    torch.testing.assert_close(attended(query.repeat(1, 2, 1, 1), key), attended(query, key))


def test_texts_of_different_lengths_without_padding() -> None:
    """The second sample's text has two tokens of three, so that its picture begins one position earlier."""
    query, key = queries_and_keys()
    layout = SequenceLayout(order="text first", without_padding=True)
    sequence = torch.cat([key[:, :, 1:], query, key[:, :, :1]], 2)
    shares = torch.zeros(1, 3, 2)
    shares[0, 0, 0] = shares[0, 1, 1] = 1
    sums = AttentionSums(PICTURE, (1, 1, 1), layout, [1], shares, [3, 2], None)
    sums.read(sequence, sequence, None)
    torch.testing.assert_close(sums.total, attended(query, key))


def test_joint_attention_is_read() -> None:
    """In the order of the architecture, with the picture padded to 3 and with a reference behind it."""
    query, key = queries_and_keys()
    expected = attended(query, key)
    for parts, layout in (
        ((key, query), TEXT_FIRST),
        ((key, query, query), TEXT_FIRST),
        ((query, query[:, :, :1], key), SequenceLayout(order="picture first", padded_to=3)),
    ):
        joint = torch.cat(parts, 2)
        torch.testing.assert_close(attended(joint, joint, layout), expected)


def test_other_attention_is_not_read() -> None:
    """Self-attention of the picture; another batch."""
    query, key = queries_and_keys()
    assert attended(query, query) is None
    assert attended(query[:1], key[:1]) is None


def test_maps_by_hand() -> None:
    """Two LoRAs, 3 x 6 positions smoothed over 3 x 3 of them, sharpness 1; what both attend to more does not count."""
    total = torch.zeros(1, 2, 3, 6)
    total[0, 0, :, :3] = 6
    total[0] += torch.arange(18.0).view(3, 6)
    maps = found_maps(total, torch.ones(1, 2, dtype=torch.bool), 1.0)
    row = torch.tensor([6.0, 6, 4, 2, 0, 0]) - 3  # less the mean over positions
    z = row / 2  # less the mean of both LoRAs
    expected = torch.sigmoid(2 * z / z.square().mean().sqrt())
    torch.testing.assert_close(maps[0, 0], expected.expand(3, 6))
    torch.testing.assert_close(maps[0, 1], 1 - maps[0, 0])


def test_attention_that_tells_no_lora_apart_divides_nothing() -> None:
    same = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(1, 2, 1, 1)
    assert torch.equal(found_maps(same, torch.ones(1, 2, dtype=torch.bool)), torch.full((1, 2, 4, 4), 0.5))


def test_maps_share_the_picture_among_the_loras_that_the_prompt_names() -> None:
    total = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    total[0, 0, :, :2] += 3
    total[0, 1, :, 2:] += 3
    named = torch.tensor([[True, True, False], [False, True, False]])
    maps = found_maps(total, named)
    assert maps[0, 0, :, 0].min() > 0.95
    assert maps[0, 1, :, 3].min() > 0.95
    torch.testing.assert_close(maps[0, :2].sum(0), torch.ones(4, 4))
    assert torch.equal(maps[0, 2], torch.ones(4, 4))  # not named: it competes with none
    assert torch.equal(maps[1], torch.ones(3, 4, 4))  # named alone


def test_token_shares_follow_the_words() -> None:
    logits = torch.tensor([[[-9.0, 9], [9, -9], [9, -9], [9, 9]]])
    shares = token_shares(logits, torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(shares[0], torch.tensor([[0.0, 1], [0.5, 0], [0.5, 0], [0, 0]]), atol=1e-3, rtol=0)


def experts(model: nn.Module) -> Mixture:
    detector = ConceptDetector(8 * torch.eye(2, FEATURES), torch.full((2,), -10.0), [["heart"], ["ember"]])
    adapters = [lora(model, seed, names=["conv_in", "conv_out"]) for seed in (1, 2)]
    gates = GateSet(2, GateSettings(reads="text"), detector=detector)
    return Mixture(adapters, gates, regions="automatic")


def text_that_names_both() -> Tensor:
    text = torch.zeros(2, 3, FEATURES)
    text[:, 0, 0] = text[:, 1, 1] = text[:, 2, 5] = 3
    return text


def divided_by(mixture: Mixture, maps: Sequence[Tensor | None], x: Tensor, text: Tensor) -> Tensor:
    """The model's output with these maps from the start."""
    model = ByPosition()
    with attach(model, Mixture(mixture.experts, regions=list(maps))):
        return model(x, encoder_hidden_states=text)


def test_each_step_uses_the_maps_of_the_steps_before_it() -> None:
    """After the first quarter the last maps stay; all passes of a step have the same maps; a new run begins without."""
    model, reader = ByPosition(), Reader(at=0.0)
    x, _ = latent_and_text()
    text = text_that_names_both()
    mixture = experts(model)
    with attach(model, Mixture(mixture.experts)):
        everywhere = model(x, encoder_hidden_states=text)
    with attach(model, mixture, sampling=reader) as attachment:
        for _ in range(2):  # two passes of the first step
            torch.testing.assert_close(model(x, encoder_hidden_states=text), everywhere)
        reader.at = 0.1
        second = model(x, encoder_hidden_states=text)
        maps = maps_of(attachment)
        assert not torch.allclose(second, everywhere)
        torch.testing.assert_close(second, divided_by(mixture, maps, x, text))
        torch.testing.assert_close(
            model(x.flip(-1), encoder_hidden_states=text), divided_by(mixture, maps, x.flip(-1), text)
        )
        reader.at = 0.5
        model(x, encoder_hidden_states=text)
        kept = maps_of(attachment)
        reader.at = 0.9
        model(x.flip(-1), encoder_hidden_states=text)
        assert all(map_ is later for map_, later in zip(kept, maps_of(attachment), strict=True))
        assert any(not torch.equal(map_, later) for map_, later in zip(maps, kept, strict=True))
        reader.at = 0.0
        torch.testing.assert_close(model(x, encoder_hidden_states=text), everywhere)


def test_a_run_that_begins_late_is_read_for_two_steps() -> None:
    model, reader = ByPosition(), Reader(at=0.6)
    x, _ = latent_and_text()
    text = text_that_names_both()
    with attach(model, experts(model), sampling=reader) as attachment:
        seen: list[tuple[Tensor | None, ...]] = []
        for at in (0.6, 0.7, 0.8, 0.9):
            reader.at = at
            model(x * at, encoder_hidden_states=text)
            seen.append(maps_of(attachment))
    assert seen[0] == (None, None)
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(seen[1:])]
    assert same == [False, True]


def test_the_first_steps_are_read_and_the_rest_uses_the_maps() -> None:
    model, reader = ByPosition(), Reader(at=0.0)
    x, _ = latent_and_text()
    text = text_that_names_both()
    mixture = experts(model)
    plain = Mixture(mixture.experts)
    with attach(model, plain):
        everywhere = model(x, encoder_hidden_states=text)
    with attach(model, mixture, sampling=reader) as attachment:
        torch.testing.assert_close(model(x, encoder_hidden_states=text), everywhere)
        reader.at = 0.5
        divided = model(x, encoder_hidden_states=text)
        maps = torch.stack([m for m in maps_of(attachment) if m is not None], 1)
        reader.at = 0.0
        torch.testing.assert_close(model(x, encoder_hidden_states=text), everywhere)  # a new run
    assert maps.shape == (2, 2, 4, 6)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 4, 6))
    with attach(model, Mixture(mixture.experts, regions=list(maps.unbind(1)))):
        torch.testing.assert_close(model(x, encoder_hidden_states=text), divided)
    assert not torch.allclose(divided, everywhere)


def maps_of(attachment: Attachment) -> tuple[Tensor | None, ...]:
    regions: Any = attachment.regions
    return regions.maps


def test_words_are_needed() -> None:
    model = ByPosition()
    x, text = latent_and_text()
    mixture = Mixture(experts(model).experts, regions="automatic")
    with (
        attach(model, mixture, sampling=Reader()),
        pytest.raises(MergeError, match="follow the words of the LoRAs"),
    ):
        model(x, encoder_hidden_states=text)


def test_attention_that_cannot_be_read_is_an_error() -> None:
    """Such as attention by a function of the model's own; the error comes after the last step that is read."""

    class Blind(Reader):
        def watch_attention(self, arguments: Any, read: Any) -> Any:
            return nullcontext()

    model, reader = ByPosition(), Blind()
    x, _ = latent_and_text()
    with attach(model, experts(model), sampling=reader):
        for reader.at in (0.0, 0.2):
            model(x, encoder_hidden_states=text_that_names_both())
        reader.at = 0.4
        with pytest.raises(MergeError, match="could not read the attention"):
            model(x, encoder_hidden_states=text_that_names_both())


def test_a_prompt_for_an_area_is_an_error() -> None:
    model = ByPosition()
    x, _ = latent_and_text()
    with (
        attach(model, experts(model), sampling=Reader([Part(0, 0, 8, 12)] * 2)),
        pytest.raises(MergeError, match="follow a prompt for the whole picture"),
    ):
        model(x, encoder_hidden_states=text_that_names_both())


def test_a_host_is_needed() -> None:
    model = ByPosition()
    with pytest.raises(MergeError, match="need a host that counts them"):
        attach(model, experts(model))
