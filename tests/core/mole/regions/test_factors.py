"""Factors of units: levels, batches, parts of a picture, steps, and positions that are not of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.attach import attach
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.regions.factors import RegionFactors
from legomole.core.mole.regions.maps import checked_maps
from legomole.core.mole.regions.picture import Part, Picture
from legomole.core.mole.stack import ExpertSlice, Stack
from torch import Tensor, nn

from ..mixtures import lora, merged
from ..models import Transformer, UNet, inputs
from .models import ByPosition, latent_and_text, left

pytestmark = pytest.mark.usefixtures("no_gradients")


class Reader:
    """A host at a place and step that a test chooses."""

    def __init__(self, parts: Sequence[Part] | None = None, at: float = 0.0) -> None:
        self.at, self.places = at, parts

    def parts(self, arguments: Any, picture: Picture) -> Sequence[Part] | None:
        return self.places

    def reached(self, fraction: float, args: Any, arguments: Any) -> bool:
        return self.at >= fraction

    def step(self, args: Any, arguments: Any) -> int:
        return round(100 * self.at)

    def watch_attention(self, arguments: Any, read: Any) -> None:
        return None


class Flux(nn.Module):
    """Only the name of a known architecture."""

    patch_size = 2


def stack(kernel: tuple[int, ...] = ()) -> Stack:
    """Experts 0 (rank 1) and 1 (rank 2)."""
    layer = nn.Conv2d(3, 4, 1) if kernel else nn.Linear(3, 4)
    adapters = [lora(nn.Sequential(layer), seed, rank) for seed, rank in ((1, 1), (2, 2))]
    return Stack([ExpertSlice(i, a.modules["0"], 0, 4) for i, a in enumerate(adapters)], 4, kernel)


def factors(
    model: nn.Module, maps: Sequence[Tensor | None], latent: Tensor, *, text: Tensor | None = None
) -> RegionFactors:
    """In a pass with this latent and text."""
    labels = ["a", "b"][: len(maps)]
    regions = RegionFactors(model, checked_maps(maps, labels), [(0.0, 1.0)] * len(maps), labels)
    regions.begin_pass(text, (latent,), {})
    return regions


@pytest.mark.parametrize(("shape", "z"), [((2, 2), (1, 3, 2, 2)), ((2, 2), (1, 4, 3)), ((4, 4), (1, 3, 4, 4))])
def test_levels_of_a_u_net_are_means(shape: tuple[int, int], z: tuple[int, ...]) -> None:
    """A map of 4 x 4 at the latent of 4 x 4 and at half of it, of a convolution and of a sequence."""
    map_ = torch.arange(16.0).view(4, 4) / 15
    convolution = len(z) == 4
    found = factors(nn.Module(), [map_, None], torch.zeros(1, 2, 4, 4)).unit_factors(
        "layer", stack((1, 1)) if convolution else stack(), torch.zeros(z)
    )
    expected = nn.functional.avg_pool2d(map_[None], 4 // shape[0])[0] if shape == (2, 2) else map_
    rows = found if convolution else found.mT.unflatten(2, shape)
    torch.testing.assert_close(rows[0, 0], expected)
    assert torch.equal(rows[0, 1:], torch.ones(2, *shape))


def test_text_of_joint_attention_vectors_and_references() -> None:
    """Text: the mean, or the largest value for a LoRA that the text names. Vectors and references: the mean."""
    regions = factors(
        Flux(), [left(4, 8), torch.full((1, 1), 0.25)], torch.zeros(1, 4, 4, 8), text=torch.zeros(1, 3, 2)
    )
    regions.named = torch.tensor([[True, False]])
    named = regions.unit_factors("txt_in", stack(), torch.zeros(1, 3, 3))
    assert named.flatten().tolist() == [1, 0.25, 0.25]
    vector = regions.unit_factors("double_blocks.0.img_mod.lin", stack(), torch.zeros(1, 3))
    assert vector.flatten().tolist() == [0.5, 0.25, 0.25]
    joint = regions.unit_factors("single_blocks.0.linear1", stack(), torch.zeros(1, 3 + 8 + 2, 3))
    assert joint[0, :, 0].tolist() == [1] * 3 + [1, 1, 0, 0] * 2 + [0.5] * 2
    assert torch.equal(joint[0, :, 1:], torch.full((13, 2), 0.25))


def test_another_prompt_of_the_same_length_has_its_own_factors() -> None:
    """The pass of the negative prompt has the same latent and as many tokens."""
    maps, text = [left(4, 8), torch.full((1, 1), 0.25)], torch.zeros(1, 3, 2)
    regions = factors(Flux(), maps, torch.zeros(1, 4, 4, 8), text=text)
    for named, expected in (((True, False), (1, 0.25)), ((False, True), (0.5, 0.25)), ((False, False), (0.5, 0.25))):
        regions.begin_pass(text, (torch.zeros(1, 4, 4, 8),), {})
        regions.named = torch.tensor([named])
        joint = regions.unit_factors("single_blocks.0.linear1", stack(), torch.zeros(1, 3 + 8, 3))
        assert joint[0, :3, 0].tolist() == [expected[0]] * 3
        assert joint[0, :3, 1].tolist() == [expected[1]] * 3


def test_every_picture_of_a_batch_has_its_map_in_every_prompt() -> None:
    """Guidance doubles the batch: the maps of both pictures repeat."""
    model = ByPosition()
    x, text = latent_and_text(4)
    adapter = lora(model, 1)
    maps = torch.stack([left(), 1 - left()])
    with attach(model, Mixture([adapter], regions=[maps])):
        mixed = model(x, encoder_hidden_states=text)
    for row in range(4):
        with attach(model, Mixture([adapter], regions=[maps[row % 2]])):
            alone = model(x[row : row + 1], encoder_hidden_states=text[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    with (
        attach(model, Mixture([adapter], regions=[torch.stack([left()] * 3) * 0.5])),
        pytest.raises(MergeError, match="another number of pictures"),
    ):
        model(x, encoder_hidden_states=text)


def test_a_part_of_the_picture_gets_its_part_of_the_map() -> None:
    model = ByPosition()
    x, text = latent_and_text(2, 4, 6)
    adapter, map_ = lora(model, 1), torch.arange(80.0).view(8, 10) / 79
    parts = [Part(0, 0, 8, 10), Part(4, 3, 8, 10)]
    with attach(model, Mixture([adapter], regions=[map_]), sampling=Reader(parts)):
        mixed = model(x, encoder_hidden_states=text)
    for row, part in enumerate(parts):
        cut = map_[part.top : part.top + 4, part.left : part.left + 6]
        with attach(model, Mixture([adapter], regions=[cut])):
            alone = model(x[row : row + 1], encoder_hidden_states=text[row : row + 1])
        # vectors get the mean of the part
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_experts_act_in_their_part_of_the_steps() -> None:
    """From the start on, until before the end."""
    model = ByPosition()
    x, text = latent_and_text()
    adapters = [lora(model, seed) for seed in (1, 2)]
    mixture = Mixture(adapters, steps=[(0, 0.5), (0.25, 1)])
    reader = Reader()
    with attach(model, mixture, sampling=reader):
        for at, acting in ((0.0, [1, 0]), (0.25, [1, 1]), (0.5, [0, 1]), (1.0, [0, 1])):
            reader.at = at
            expected = merged(model, adapters, acting)(x, encoder_hidden_states=text)
            torch.testing.assert_close(model(x, encoder_hidden_states=text), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(MergeError, match="need a host that counts them"):
        attach(model, mixture)


def test_steps_and_regions_together() -> None:
    model = ByPosition()
    x, text = latent_and_text()
    adapter, reader = lora(model, 1), Reader(at=0.7)
    base = model(x, encoder_hidden_states=text)
    with attach(model, Mixture([adapter], regions=[left()], steps=[(0, 0.5)]), sampling=reader):
        torch.testing.assert_close(model(x, encoder_hidden_states=text), base)
        reader.at = 0.2
        assert not torch.allclose(model(x, encoder_hidden_states=text), base)


@pytest.mark.parametrize("z", [(1, 7, 3), (1, 2, 2, 3, 3, 3), (3, 16, 3)])
def test_unknown_positions_are_an_error_that_names_the_layer(z: tuple[int, ...]) -> None:
    regions = factors(nn.Module(), [left()], torch.zeros(1, 2, 4, 4))
    with pytest.raises(MergeError, match=r"are not those of the picture.\n  module:   blocks.0.proj"):
        regions.unit_factors("blocks.0.proj", stack(), torch.zeros(z))


def test_a_convolution_of_other_proportions_is_an_error() -> None:
    regions = factors(nn.Module(), [left()], torch.zeros(1, 2, 16, 32))
    with pytest.raises(MergeError, match="are not those of the picture"):
        regions.unit_factors("conv", stack((1, 1)), torch.zeros(1, 3, 8, 8))


def test_a_model_without_a_picture_is_an_error() -> None:
    model = Transformer()
    x, text = inputs(model)
    with (
        attach(model, Mixture([lora(model, 1)], regions=[left()])),
        pytest.raises(MergeError, match="no picture that a region could be laid on"),
    ):
        model(x, text)


def test_a_u_net_with_blocks_of_convolutions() -> None:
    """A map of one half changes both halves of the output only as far as convolutions and attention reach."""
    model = UNet()
    x, text = inputs(model)
    with attach(model, Mixture([lora(model, 1, names=["conv_out"])], regions=[left(6, 6)])):
        mixed = model(x, text)
    full = merged(model, [lora(model, 1, names=["conv_out"])], [1.0])(x, text)
    torch.testing.assert_close(mixed, torch.where(left(6, 6) > 0, full, model(x, text)), atol=1e-6, rtol=1e-5)


def test_video_frames_have_their_own_maps() -> None:
    """Latent frames are fewer than the video's: means over time. Frames in a batch follow each other."""
    maps = torch.stack([torch.full((2, 2), value) for value in (0.0, 0.0, 1.0, 1.0)])
    regions = factors(nn.Module(), [maps], torch.zeros(1, 4, 2, 2, 2))
    sequence = regions.unit_factors("blocks.0.to_q", stack_of_one(), torch.zeros(1, 8, 1))
    assert sequence.flatten().tolist() == [0] * 4 + [1] * 4
    by_frame = regions.unit_factors("blocks.0.to_q", stack_of_one(), torch.zeros(2, 4, 1))
    assert by_frame[:, :, 0].tolist() == [[0] * 4, [1] * 4]


def stack_of_one() -> Stack:
    return Stack([ExpertSlice(0, lora(nn.Sequential(nn.Linear(3, 4)), 1, 1).modules["0"], 0, 4)], 4)


def test_recomputed_blocks_are_refused() -> None:
    model = ByPosition()
    with pytest.raises(MergeError, match="cannot be recomputed"):
        attach(model, Mixture([lora(model, 1)], regions=[left()]), checkpointing=True)
