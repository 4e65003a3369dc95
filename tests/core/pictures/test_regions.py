"""Masks of regions, by hand and as properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from legomole.core.pictures.regions import box_region, scaled_size, shown_region, with_soft_edges

share = st.floats(0, 1, width=32)


def test_a_box_that_covers_pixels_in_part_has_their_share() -> None:
    """From 1.5 to 3 of four columns, from 0 to 1 of two rows."""
    expected = torch.tensor([[0, 0.5, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(box_region((2, 4), 0.375, 0, 0.375, 0.5), expected[None])


@given(share, share, share, share)
def test_a_box_has_the_area_of_its_part_in_the_picture(x: float, y: float, width: float, height: float) -> None:
    area = max(0, min(x + width, 1) - x) * max(0, min(y + height, 1) - y)
    assert float(box_region((32, 48), x, y, width, height).mean()) == pytest.approx(area, abs=1e-6)


@given(st.floats(0, 0.5), st.sampled_from([None, (64, 256), (300, 100)]))
def test_soft_edges_of_a_region_and_its_complement_add_up_to_1(feather: float, shape: tuple[int, int] | None) -> None:
    mask = torch.rand(2, 40, 60, generator=torch.Generator().manual_seed(1))
    both = with_soft_edges(mask, feather, shape) + with_soft_edges(1 - mask, feather, shape)
    torch.testing.assert_close(both, torch.ones_like(both))


def test_a_soft_edge_is_as_wide_as_asked_for_and_fades_nowhere_else() -> None:
    """The left half of 100 x 200 pixels, an edge of 0.4 of 100 pixels around column 100."""
    soft = with_soft_edges(box_region((100, 200), 0, 0, 0.5, 1), 0.4)[0]
    assert torch.equal(soft, soft[:1].expand_as(soft))
    row = soft[0]
    assert torch.equal(row[:79], torch.ones(79))
    assert torch.equal(row[121:], torch.zeros(79))
    assert bool((row[80:120].diff() < 0).all())
    assert float(row[99] + row[100]) == pytest.approx(1)


def test_feather_is_a_share_of_the_picture_whatever_the_aspect_of_the_mask() -> None:
    """A square mask of a picture twice as wide as high: half as many columns."""
    half = box_region((200, 200), 0, 0, 0.5, 1)
    soft = with_soft_edges(half, 0.4, (100, 200))[0, 0]
    assert int(((soft > 0) & (soft < 1)).sum()) == 40
    assert torch.equal(with_soft_edges(half, 0), half)


def test_a_shown_region_is_tinted_inside_and_darker_outside() -> None:
    images = torch.full((1, 4, 8, 3), 0.8)
    shown = shown_region(images, box_region((4, 8), 0, 0, 0.5, 1), (255, 0, 0))
    torch.testing.assert_close(shown[0, 0, 0], torch.tensor([0.91, 0.36, 0.36]))
    torch.testing.assert_close(shown[0, 0, 7], torch.full((3,), 0.52))


@pytest.mark.parametrize(("images", "masks", "shown"), [(1, 3, 3), (4, 2, 4), (3, 1, 3)])
def test_one_of_several_masks_per_image(images: int, masks: int, shown: int) -> None:
    pictures = torch.linspace(0, 1, images)[:, None, None, None].expand(-1, 4, 4, 3)
    regions = torch.linspace(0, 1, masks)[:, None, None].expand(-1, 2, 2)
    result = shown_region(pictures, regions)
    assert result.shape == (shown, 4, 4, 3)
    for i in range(shown):
        expected = shown_region(pictures[i % images][None], regions[i % masks][None])
        torch.testing.assert_close(result[i], expected[0])


def test_scaled_size_keeps_the_aspect() -> None:
    assert scaled_size((1024, 768), 512) == (512, 384)
    assert scaled_size((8, 16), 512) == (256, 512)
    assert scaled_size((1, 4096), 512) == (1, 512)
