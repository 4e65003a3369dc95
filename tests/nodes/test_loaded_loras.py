"""Loading LoRAs without a model imports diffusers only for LoRAs whose names must be translated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import legomole
import pytest
import torch
from legomole.core.layers.align import align
from legomole.nodes import loaded_loras
from safetensors.torch import save_file

ROOT = Path(legomole.__file__).parent

SCRIPT = """
import sys
from pathlib import Path
from legomole.nodes.graph_lora import GraphLora
from legomole.nodes.loaded_loras import file_key_map, read_files
assert file_key_map() is not None
read_files([GraphLora(Path(path), path) for path in sys.argv[1:]])
assert "diffusers" not in sys.modules
"""


def test_loras_with_equal_names_do_not_import_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for path in paths:
        factors = {"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(3, 2)}
        save_file({f"diffusion_model.{key}": tensor for key, tensor in factors.items()}, path)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, paths)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr


def test_without_diffusers_there_is_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded_loras, "find_spec", lambda name: None)
    assert loaded_loras.file_key_map() is None


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_a_diffusers_that_cannot_be_imported_maps_nothing(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(loaded_loras, "find_spec", lambda name: object())
    monkeypatch.setattr(loaded_loras.importlib, "import_module", fail)
    key_map = loaded_loras.file_key_map()
    assert key_map is not None
    assert key_map([]) == {}
    assert align([], key_map=key_map) == []
