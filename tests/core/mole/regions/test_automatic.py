"""Automatic regions: attention to the words of each LoRA becomes maps."""

from __future__ import annotations

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
from legomole.core.mole.regions.picture import Picture
from torch import Tensor, nn

from ..mixtures import lora
from ..models import FEATURES
from .models import ByPosition, latent_and_text
from .test_factors import Reader

pytestmark = pytest.mark.usefixtures("no_gradients")

PICTURE, TEXT_FIRST = Picture(2, 1, 2, 4), SequenceLayout(order="text first")


def queries_and_keys(length: int = 3) -> tuple[Tensor, Tensor]:
    """Positions of the left half attend to token 1, those of the right half to token 2."""
    query = torch.zeros(2, 1, 8, 4)
    query[..., [0, 1, 4, 5], 1] = query[..., [2, 3, 6, 7], 2] = 20
    key = torch.zeros(2, 1, length, 4)
    key[..., 1, 1] = key[..., 2, 2] = 1
    return query, key


def attended(query: Tensor, key: Tensor, layout: SequenceLayout = TEXT_FIRST) -> Tensor | None:
    shares = torch.zeros(1, 3, 2)
    shares[0, 1, 0] = shares[0, 2, 1] = 1
    sums = AttentionSums(PICTURE, (1, 1, 1), layout, [1], shares, None)
    sums.read(query, key, None)
    return sums.total


def test_cross_attention_is_read() -> None:
    total = attended(*queries_and_keys())
    assert total.shape == (1, 2, 2, 4)
    torch.testing.assert_close(total[0, 0], torch.tensor([[2.0, 2, 0, 0]] * 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(total[0, 1], torch.tensor([[0.0, 0, 2, 2]] * 2), atol=1e-3, rtol=0)


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
    """A run that began elsewhere, or attention by another function."""
    model = ByPosition()
    x, _ = latent_and_text()
    with (
        attach(model, experts(model), sampling=Reader(at=0.9)),
        pytest.raises(MergeError, match="could not read the attention"),
    ):
        model(x, encoder_hidden_states=text_that_names_both())


def test_a_host_is_needed() -> None:
    model = ByPosition()
    with pytest.raises(MergeError, match="need a host that counts them"):
        attach(model, experts(model))
