"""What a sampling step tells of a pass: areas of conditioning, pictures of a batch, and steps; without ComfyUI."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.regions.picture import Part, Picture
from legomole.nodes.comfy.sampling_reader import ComfySamplingReader

MODEL = SimpleNamespace(model_sampling=SimpleNamespace(percent_to_sigma=lambda share: 10 * (1 - share)))


def begun(latent: tuple[int, ...], areas: dict[str, Any] | None = None, several: int = 1) -> ComfySamplingReader:
    """A reader at a step of a latent of this shape; areas by the id of their conditioning."""
    reader = ComfySamplingReader([torch.zeros(several, 2, 2), None], ["a", "b"])
    reader.begin_step(
        MODEL, [[{"uuid": key, "area": area} for key, area in (areas or {}).items()], None], torch.zeros(latent)
    )
    return reader


def called(*uuids: str) -> dict[str, Any]:
    return {"transformer_options": {"uuids": list(uuids)}}


def test_every_sample_of_an_area_has_its_place() -> None:
    """Two areas in one batch of three pictures; the order is that of the ids."""
    reader = begun((3, 4, 16, 8), {"left": (6, 4, 0, 0), "right": (6, 4, 2, 4), "all": None})
    parts = reader.parts(called("right", "left"), Picture(6, 1, 6, 4))
    assert parts == [Part(2, 4, 16, 8)] * 3 + [Part(0, 0, 16, 8)] * 3
    assert reader.parts(called("all"), Picture(3, 1, 16, 8)) is None


@pytest.mark.parametrize(
    ("latent", "area", "place"),
    [
        ((1, 4, 5, 16, 8), (2, 6, 4, 1, 2, 3), (2, 3)),  # frames, height, width, then where they begin
        ((1, 4, 5, 16, 8), (6, 4, 2, 3), (2, 3)),  # all frames
        ((1, 4, 16, 8), (6, 4, 9, 2, 3, 9), (2, 3)),  # of an area for videos ComfyUI takes the first dimensions
    ],
)
def test_areas_of_videos(latent: tuple[int, ...], area: tuple[int, ...], place: tuple[int, int]) -> None:
    assert begun(latent, {"x": area}).parts(called("x"), Picture(1, 5, 6, 4)) == [Part(*place, 16, 8)]


@pytest.mark.parametrize("arguments", [called("elsewhere"), called(), {}])
def test_a_part_that_is_no_area_is_refused(arguments: dict[str, Any]) -> None:
    reader = begun((1, 4, 16, 8), {"left": (16, 4, 0, 0)})
    with pytest.raises(MergeError, match="whose place is not known"):
        reader.parts(arguments, Picture(1, 1, 16, 4))


def test_several_masks_are_for_the_pictures_of_the_batch_not_for_its_prompts() -> None:
    begun((4, 4, 8, 8), several=4)
    with pytest.raises(MergeError, match="one mask, or 2, one per picture"):
        begun((2, 4, 8, 8), several=4)


def test_windows_of_frames_are_refused_only_for_masks_per_frame() -> None:
    window = Picture(1, 5, 16, 8)
    assert begun((1, 4, 9, 16, 8)).parts(called("x"), window) is None
    with pytest.raises(MergeError, match="context windows"):
        begun((1, 4, 9, 16, 8), several=9).parts(called("x"), window)


def test_steps_are_reached_at_their_noise_level() -> None:
    reader = begun((1, 4, 8, 8))
    at = lambda sigma: {"transformer_options": {"sigmas": torch.tensor([sigma])}}  # noqa: E731
    assert [reader.reached(0.4, (), at(sigma)) for sigma in (6.1, 6.0, 1.0)] == [False, True, True]
    assert reader.reached(0.0, (), {})
    assert not reader.reached(0.4, (), {})


def test_steps_are_counted_in_every_run() -> None:
    reader = begun((1, 4, 8, 8))
    first = reader.step((), {})
    reader.begin_step(MODEL, [], torch.zeros(1, 4, 8, 8))
    assert reader.step((), {}) == first + 1
    reader.begin_run()
    reader.begin_step(MODEL, [], torch.zeros(1, 4, 8, 8))
    assert reader.step((), {}) == first


@pytest.mark.parametrize(("shape", "seen"), [((5, 7), (5, 7)), ((2, 5, 7), (2, 1, 5, 7)), ((2, 3, 5, 7), (2, 3, 5, 7))])
@pytest.mark.parametrize("positional", [True, False])
def test_queries_keys_and_masks_of_attention_are_read(
    shape: tuple[int, ...], seen: tuple[int, ...], positional: bool
) -> None:
    """The tensors are split by head; the attention itself runs as before, also if it was replaced before."""
    query, key, mask = torch.rand(2, 5, 12), torch.rand(2, 7, 12), torch.rand(shape)
    read: list[Any] = []
    options: dict[str, Any] = {"optimized_attention_override": lambda function, *args, **more: ("outer", args, more)}
    before = dict(options)
    with ComfySamplingReader().watch_attention({"transformer_options": options}, lambda *parts: read.append(parts)):
        rest, more = ((mask,), {}) if positional else ((), {"mask": mask})
        result = options["optimized_attention_override"](None, query, key, key, 3, *rest, **more)
    assert options == before
    assert result == ("outer", (query, key, key, 3, *rest), more)
    ((q, k, scale, m),) = read
    assert torch.equal(q.transpose(1, 2).flatten(2), query)
    assert torch.equal(k.transpose(1, 2).flatten(2), key)
    assert (scale, tuple(m.shape)) == (None, seen)
