"""Base models: loaded from safetensors only, without running their code; damaged files raise a clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from legomole.core.errors import FormatError
from legomole.hosts.diffusers.training import load_pipeline
from legomole.hosts.transformers.training import load_model

from .diffusers.tiny_pipelines import build
from .transformers.tiny_language import llama, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # within the libraries


def language(folder: Path) -> Path:
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def pipeline(folder: Path) -> Path:
    build("SD 1.5").save_pretrained(folder)
    return folder / "unet"


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "language model": (language, load_model),
    "pipeline": (pipeline, load_pipeline),
}
EACH = pytest.mark.parametrize("kind", KINDS)


@EACH
def test_pickles_are_not_opened(kind: str, tmp_path: Path) -> None:
    """Not even with torch's weights_only, which could load these."""
    from safetensors.torch import load_file

    write, load = KINDS[kind]
    (weights,) = write(tmp_path).glob("*.safetensors")
    load(tmp_path)  # valid before the change
    torch.save(load_file(weights), weights.parent / f"{weights.stem.replace('model', 'pytorch_model')}.bin")
    if kind == "pipeline":
        torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(FormatError, match="cannot be loaded"):
        load(tmp_path)


@EACH
@pytest.mark.parametrize("damage", ["cut off", "no header", "configuration"])
def test_damaged_files(kind: str, damage: str, tmp_path: Path) -> None:
    write, load = KINDS[kind]
    folder = write(tmp_path)
    (weights,) = folder.glob("*.safetensors")
    raw = weights.read_bytes()
    if damage == "configuration":
        (folder / "config.json").write_text('{"a":' * 10_000 + "1" + "}" * 10_000)
    else:
        weights.write_bytes(raw[:-100] if damage == "cut off" else b"\xff" * 50)
    with pytest.raises(FormatError, match=r"cannot be loaded[\s\S]*Error: "):
        load(tmp_path)


def test_an_invalid_tokenizer(tmp_path: Path) -> None:
    (language(tmp_path) / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="The language model cannot be loaded"):
        load_model(tmp_path)


def test_code_beside_a_language_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the user is not asked on the terminal whether to run it."""
    path = language(tmp_path) / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    path.write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Mine: pass\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    with pytest.raises(FormatError, match="custom code"):
        load_model(tmp_path)
    assert (asked, (tmp_path / "owned").exists()) == ([], False)


def test_code_beside_a_pipeline_is_not_run(tmp_path: Path) -> None:
    pipeline(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"_class_name": ["mine", "Mine"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(FormatError, match="cannot be loaded"):
        load_pipeline(tmp_path)
    assert not (tmp_path / "owned").exists()
