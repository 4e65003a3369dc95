"""LoRAs merged in ComfyUI without a model, repeated on the command line by ComfyUI's own Python: the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from .graph import Graph
from .server import Server

pytestmark = pytest.mark.comfy


# Runs commands, one per line, in one process: starting one for each would take most of the time.
_COMMANDS = """
import json, sys
from legomole.cli import app
from typer.testing import CliRunner
for line in sys.stdin:
    result = CliRunner().invoke(app, json.loads(line))
    print(json.dumps([result.exit_code, result.output]), flush=True)
"""


@pytest.fixture(scope="module")
def legomole_command(comfy: Server) -> Iterator[Callable[..., None]]:
    """Runs ``legomole`` with ComfyUI's own Python; the command must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(comfy.base / "custom_nodes"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [comfy.python, "-c", _COMMANDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(*arguments: object) -> None:
        print(json.dumps([*map(str, arguments)]), file=process.stdin, flush=True)
        code, output = json.loads(process.stdout.readline())
        assert code == 0, output

    yield run
    process.stdin.close()
    process.stdout.close()
    assert process.wait(60) == 0


@pytest.fixture
def repeat(comfy: Server, tmp_path: Path, legomole_command: Callable[..., None]) -> Callable[[Path], Path]:
    """Runs ``legomole merge --config`` on a saved file beside copies of its inputs."""

    def run(saved: Path) -> Path:
        copy, again = tmp_path / saved.name, tmp_path / "again.safetensors"
        shutil.copy(saved, copy)
        for entry in recorded(saved)["recipe"]["inputs"]:
            shutil.copy(comfy.loras / entry["path"], tmp_path)
        legomole_command("merge", "--config", copy, "-o", again)
        return again

    return run


def recorded(path: Path) -> dict[str, Any]:
    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()["legomole"])


def save(comfy: Server, graph: Graph, lora: list[Any], name: str, **settings: str) -> Path:
    graph.save(lora, f"repeat/{name}", **settings)
    comfy.run(graph.nodes)
    return comfy.loras / f"repeat/{name}_00001_.safetensors"


def test_a_merge_with_strengths_layer_rules_and_another_dtype(comfy: Server, files: dict, repeat: Callable) -> None:
    graph = Graph()
    loaded = [graph.load(files["flux_kohya"], 0.7, 0.2), graph.load(files["flux_kohya_2"], -1.3)]
    rules = "*double* = 0.3\n1: *double* = 0.7\n1: *qkv = 1.1"
    merged = graph.lego(*loaded, with_model=False, rank="4", module_weights=rules)
    saved = save(comfy, graph, merged, "lego", dtype="bf16")
    assert recorded(saved)["recipe"]["dtype"] == "bfloat16"
    assert repeat(saved).read_bytes() == saved.read_bytes()


def test_a_merge_in_names_that_comfyui_does_not_read(comfy: Server, files: dict, repeat: Callable) -> None:
    """The node says so, the file does not: other programs read them."""
    graph = Graph("sd15")
    merged = graph.lego(graph.load(files["sd15_diffusers"]), graph.load(files["sd15_diffusers"], 0.5), with_model=False)
    graph.add("PreviewAny", source=[merged[0], 1])
    graph.save(merged, "repeat/diffusers")
    report = comfy.run(graph.nodes).outputs["PreviewAny0"]["text"][0]
    saved = comfy.loras / "repeat/diffusers_00001_.safetensors"
    assert "stock loader does not read names" in report
    assert not any("stock loader" in note for note in recorded(saved)["report"]["notes"])
    assert repeat(saved).read_bytes() == saved.read_bytes()


def test_loras_with_a_convert_rank_each(comfy: Server, files: dict, repeat: Callable) -> None:
    graph = Graph()
    loaded = [graph.load(files["loha"], convert_rank=2), graph.load(files["flux_kohya"])]
    loaded.append(graph.load(files["lokr"], convert_rank=6))
    saved = save(comfy, graph, graph.merge("concat", *loaded, with_model=False), "converted", format="comfy")
    assert [entry.get("convert_rank") for entry in recorded(saved)["recipe"]["inputs"]] == [2, None, 6]
    assert repeat(saved).read_bytes() == saved.read_bytes()


def test_a_saved_merge_that_is_loaded_and_saved_in_another_form(comfy: Server, files: dict, repeat: Callable) -> None:
    graph, other = Graph(), Graph()
    merged = graph.merge("concat", graph.load(files["flux_kohya"]), graph.load(files["flux_kohya_2"]), with_model=False)
    first = save(comfy, graph, merged, "first")
    loaded = other.load(first.relative_to(comfy.loras).as_posix())
    saved = save(comfy, other, loaded, "second", format="comfy", dtype="bfloat16")
    assert recorded(saved)["recipe"]["conversions"] == [{"format": "comfy", "reader": "comfy", "dtype": "bfloat16"}]
    assert repeat(saved).read_bytes() == saved.read_bytes()


def test_a_merge_with_a_model_says_what_it_needs(comfy: Server, files: dict) -> None:
    graph = Graph()
    merged = graph.lego(graph.load(files["flux_kohya"]), graph.load(files["flux_split"]))
    notes = recorded(save(comfy, graph, merged, "model"))["report"]["notes"]
    assert any("cannot repeat" in note and "Flux model with CLIP" in note for note in notes)
