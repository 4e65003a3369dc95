"""XY Compare in a real graph: every cell equals the image of an ordinary graph, errors come before any sampling."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from .graph import Graph, Link
from .server import Prompt, Run, Server

pytestmark = pytest.mark.comfy


@pytest.fixture
def pair(files: dict[str, str]) -> Callable[[Graph], list[Link]]:
    """Load LoRA nodes of the two Flux LoRAs."""
    return lambda graph: [graph.load(files["flux_kohya"], 0.9), graph.load(files["flux_split"])]


def saved(graph: Graph, compared: Link) -> Prompt:
    """Add nodes that save the cells and show the report."""
    graph.add("SaveImage", images=[compared[0], 1], filename_prefix="test/cell")
    return graph.nodes | {"text": {"class_type": "PreviewAny", "inputs": {"source": [compared[0], 2]}}}


def pictures(comfy: Server, run: Run, node: str = "SaveImage0", folder: str = "output") -> list[np.ndarray]:
    paths = [comfy.base / folder / e["subfolder"] / e["filename"] for e in run.outputs[node]["images"]]
    return [np.asarray(Image.open(path), dtype=np.int16) for path in paths]


def compared(comfy: Server, graph: Graph, *loras: Link, **settings: object) -> tuple[list[np.ndarray], str]:
    """Return the images of the cells and the report."""
    run = comfy.run(saved(graph, graph.compare(*loras, **settings)))
    return pictures(comfy, run), run.outputs["text"]["text"][0]


def test_every_method_gives_the_image_of_its_own_graph(comfy: Server, pair: Callable) -> None:
    """The plain model, three merges through Apply LoRA, and MoLE Mix, bit for bit."""
    graph = Graph()
    cells, report = compared(comfy, graph, *pair(graph), method="concat")  # the axis overrides it
    one = Graph()
    loras = pair(one)
    merges = [one.merge("concat", *loras), one.merge("svd", *loras, rank="1x"), one.lego(*loras)]
    nodes = [one.picture(), *(one.picture(*one.apply(merge)) for merge in merges)]
    mix = one.mix(*loras, clip=one.clip)
    nodes.append(one.picture(mix, [mix[0], 1]))
    run = comfy.run(one.nodes)
    expected = [pictures(comfy, run, node)[0] for node in nodes]
    assert len(cells) == 5
    for cell, picture in zip(cells, expected, strict=True):
        assert np.array_equal(cell, picture)
    assert len({picture.tobytes() for picture in expected[:4]}) == 4  # MoLE with even gates is the sum
    assert report.startswith("5 cells, 5 sampled in ")
    assert "row 1, column 2: concat, seed 7" in report
    assert re.search(r"column 3: svd, rank 1x, seed 7: [\d.]+ s; merged in [\d.]+ s, rank \d+, [\d.]+% of", report)


@pytest.mark.slow
def test_two_axes_with_text_encoder_parts(comfy: Server, files: dict[str, str]) -> None:
    """Strengths by prompts, also in the text encoder: rows and columns in order, and one merge per strength."""
    graph = Graph("sd15")
    cells, report = compared(
        comfy,
        graph,
        graph.load(files["sd15_kohya"], 0.5, 0.8),
        x_axis="prompt",
        x_values="a cat\na dog, running",
        y_axis="strength",
        y_values="0, 2",
        method="concat",
    )
    one = Graph("sd15")
    strong = one.merge("concat", one.load(files["sd15_kohya"], 1.0, 1.6))
    nodes = [one.picture(prompt=text) for text in ("a cat", "a dog, running")]
    nodes += [one.picture(*one.apply(strong), prompt=text) for text in ("a cat", "a dog, running")]
    run = comfy.run(one.nodes)
    for cell, node in zip(cells, nodes, strict=True):
        assert np.array_equal(cell, pictures(comfy, run, node)[0])
    assert report.count("merged in") == 1
    assert 'row 1, column 2: none, seed 7, "a dog, running"' in report
    assert 'row 2, column 1: concat, strength x 2, seed 7, "a cat"' in report


@pytest.mark.slow
def test_strength_of_one_lora_and_trained_gates(comfy: Server, pair: Callable) -> None:
    """`strength 2` at 0 is the first LoRA alone; mole uses gates as MoLE Mix does."""
    graph = Graph()
    loras = pair(graph)
    gates = graph.train(*loras)
    cells, report = compared(
        comfy,
        graph,
        *loras,
        gates=gates,
        y_axis="strength 2",
        y_values="0, 1",
        x_values="concat, mole, none",
    )
    one = Graph()
    loras = pair(one)
    mix = one.mix(*loras, gates=one.train(*loras), clip=one.clip)
    nodes = [
        one.picture(*one.apply(one.merge("concat", loras[0], one.load(*silent(one, loras[1]))))),
        one.picture(mix, [mix[0], 1]),
    ]
    run = comfy.run(one.nodes)
    assert np.array_equal(cells[0], pictures(comfy, run, nodes[0])[0])
    assert np.array_equal(cells[4], pictures(comfy, run, nodes[1])[0])
    assert np.array_equal(cells[2], cells[5])
    assert "row 2, column 3: the same as row 1, column 3" in report
    assert report.startswith("6 cells, 5 sampled in ")
    assert "trained gates" in report


def silent(graph: Graph, lora: Link) -> tuple[str, float, float]:
    return graph.nodes[lora[0]]["inputs"]["lora_name"], 0.0, 0.0


@pytest.mark.slow
def test_calibrated_cells_are_the_calibrated_merges(comfy: Server, pair: Callable) -> None:
    graph = Graph()
    loras = pair(graph)
    statistics = graph.calibrate(*loras)
    cells, _ = compared(comfy, graph, *loras, statistics=statistics, x_values="lego, lego calibrated, calibrated")
    for merge in (
        graph.lego(*loras),
        graph.merge("calibrated", *loras, rank="1x", lam=0.3, mu=3.0, joint_scale=1.2),
    ):
        graph.nodes[merge[0]]["inputs"]["statistics"] = statistics
        graph.picture(*graph.apply(merge))
    run = comfy.run(graph.nodes)
    assert np.array_equal(cells[1], pictures(comfy, run, "SaveImage1")[0])
    assert np.array_equal(cells[2], pictures(comfy, run, "SaveImage2")[0])
    assert not np.array_equal(cells[0], cells[1])


def test_a_sweep_measures_ranks_and_samples_the_best(comfy: Server, pair: Callable) -> None:
    """Neither statistics nor values are needed. The best cell is the image of that merge; the ranking is a page."""
    graph = Graph()
    loras = pair(graph)
    cells, report = compared(comfy, graph, *loras, x_axis="sweep", words="ember\nheart", rank="2")
    assert len(cells) == 6
    assert report.startswith("6 cells, 6 sampled in ")
    assert "sweep: 14 merges by predicted loss" in report
    page = Path(re.search(r"Page with the sweep: (.+)", report)[1])
    assert "<td class=name>concat</td><td>1.2</td><td>0.000</td>" in page.read_text()
    best = re.search(r"row 1, column 1: (\w+), strength x ([\d.]+), seed 7", report)
    assert best[1] == "concat"
    one = Graph()
    loras = pair(one)
    for lora in loras:
        values = one.nodes[lora[0]]["inputs"]
        values |= {key: values[key] * float(best[2]) for key in ("strength_model", "strength_clip")}
    node = one.picture(*one.apply(one.merge("concat", *loras)))
    assert np.array_equal(cells[0], pictures(comfy, comfy.run(one.nodes), node)[0])


def test_a_sweep_without_words_says_so(comfy: Server, pair: Callable) -> None:
    graph = Graph()
    graph.compare(*pair(graph), x_axis="sweep")
    refused_unsampled(comfy, graph, "A sweep needs statistics of the model", "no words call for")


def test_caps_are_those_of_the_merge(comfy: Server, pair: Callable) -> None:
    graph = Graph()
    cells, report = compared(comfy, graph, *pair(graph), method="concat", x_axis="cap", x_values="0, 1")
    assert "column 2: concat, cap 1, seed 7" in report
    one = Graph()
    merge = one.merge("concat", *pair(one))
    one.nodes[merge[0]]["inputs"]["cap"] = 1.0
    node = one.picture(*one.apply(merge))
    assert np.array_equal(cells[1], pictures(comfy, comfy.run(one.nodes), node)[0])
    assert not np.array_equal(cells[0], cells[1])


def test_the_node_shows_a_labelled_sheet_and_counts_all_steps(comfy: Server, pair: Callable) -> None:
    """Two images of a cell are side by side; the progress bar counts the steps of all cells."""
    graph = Graph()
    settings = {"x_axis": "seed", "x_values": "1, 2, 3", "steps": 3}
    latent = graph.add("EmptySD3LatentImage", width=64, height=32, batch_size=2)
    run = comfy.run(saved(graph, graph.compare(*pair(graph), **settings, latent_image=latent)))
    (shown,) = pictures(comfy, run, "LegoMoLE_XYCompare0", "temp")
    assert shown.shape[1] > 3 * 2 * 64 * 2  # enlarged, because two images of 64 pixels are smaller than a cell
    cells = pictures(comfy, run)
    assert [cell.shape for cell in cells] == [(32, 64, 3)] * 6
    assert not np.array_equal(cells[0], cells[2])
    values = [data["value"] for data in run.of("progress") if data["max"] == 9]
    assert values[-1] == 9
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"x_values": "lego, magic"}, ("There is no such method.", "x axis", "magic", "none, lego, concat")),
        ({"x_axis": "rank", "x_values": "8, much"}, ("This is not a rank.", "x axis", "'much'")),
        ({"rank": "0"}, ("This is not a rank.", "rank")),
        ({"x_axis": "strength 3", "x_values": "1"}, ("a LoRA that is not there", "2 LoRAs", "strength 3")),
        ({"x_axis": "strength", "x_values": "1, loud"}, ("This is not a strength.", "loud")),
        ({"x_axis": "seed", "x_values": "1, -2"}, ("This is not a seed.", "-2")),
        ({"x_values": " , "}, ("The x axis has no values.",)),
        ({"y_axis": "method", "y_values": "lego"}, ("Both axes change the same setting: method.",)),
        ({"x_values": "none, calibrated"}, ("The method calibrated needs statistics.",)),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_wrong_values_are_reported_before_anything_is_sampled(
    comfy: Server, pair: Callable, settings: dict, words: tuple[str, ...]
) -> None:
    graph = Graph()
    graph.compare(*pair(graph), **settings)
    refused_unsampled(comfy, graph, *words)


def refused_unsampled(comfy: Server, graph: Graph, *words: str) -> None:
    run = comfy.wait(comfy.queue(graph.nodes))
    assert run.error is not None
    for word in words:
        assert word in run.error
    assert not [data for data in run.of("progress") if data["max"] == 2 * 5]


def test_misfits_are_reported_before_anything_is_sampled(comfy: Server, files: dict, pair: Callable) -> None:
    graph = Graph()
    graph.compare(x_values="none, mole")
    refused_unsampled(comfy, graph, "No LoRA is connected, and mole needs at least one.")
    graph = Graph()
    graph.compare(graph.load(files["sd15_kohya"]))
    refused_unsampled(comfy, graph, "This LoRA changes no layer of the diffusion model that can be mixed.")
    graph = Graph()
    gates = graph.train(*pair(graph), reads="hidden", steps=1)
    graph.compare(graph.load(files["flux_kohya_2"]), gates=gates)
    refused_unsampled(comfy, graph, "The gates were trained with other LoRAs.")


def test_cancelling_leaves_the_model_unchanged(comfy: Server, sample: Callable, pair: Callable) -> None:
    plain = Graph()
    node = plain.picture(prompt="a tree")
    before = sample(plain, node)
    graph = Graph()
    graph.compare(*pair(graph), x_values="mole, lego, concat", steps=400)
    prompt_id = comfy.queue(graph.nodes)
    comfy.wait_for("progress", lambda data: data["prompt_id"] == prompt_id and data["max"] == 1200)
    comfy.post("/interrupt", {})
    run = comfy.wait(prompt_id)
    assert run.of("execution_interrupted")
    assert max(data["value"] for data in run.of("progress") if data["max"] == 1200) < 1200
    other = Graph()
    sample(other, other.picture(prompt="a tree and a house"))  # so that the next image is not from the cache
    after = sample(plain, node)
    assert torch.equal(before[1], after[1])
    assert np.array_equal(before[0], after[0])
