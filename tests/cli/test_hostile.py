"""Strangers' texts on the terminal: shown as they are, never obeyed; and recipes that stay in their folder."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pytest
import torch
from legomole.cli import app
from legomole.cli.console import clean, progress_bar
from legomole.core.formats import load, save
from legomole.core.mole.trained import TrainedGates
from legomole.core.recipes.read import read_recipe
from legomole.core.recipes.recipe import RecipeError
from legomole.core.recipes.text import recipe_from_data, recipe_from_text
from legomole.nano.store import FOLDER
from safetensors.torch import save_file
from typer.testing import CliRunner

from .. import lora_files as files

TITLE = "\x1b]0;owned\x07"  # renames the window of a terminal
MARKUP = "[/] [bold]x[/bold] [link=file:///etc/passwd]y[/link]"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    return tmp_path


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def lora(name: str, layer: str = "lora_unet_x", **metadata: str) -> Path:
    state = {f"{layer}.lora_down.weight": torch.ones(2, 3), f"{layer}.lora_up.weight": torch.ones(4, 2)}
    return files.write(Path(name), state, metadata)


def test_clean() -> None:
    assert clean("é \U0001f600 a\nb") == "é \U0001f600 a\nb"
    assert clean(f"{TITLE}\x9b\u202e\udc80\0") == "\\x1b]0;owned\\x07\\x9b\\u202e\\udc80\\x00"


def test_metadata_and_names_are_shown_not_obeyed() -> None:
    path = lora("x.safetensors", f"lora_unet_{TITLE}[x]", ss_base_model_version=f"sd {MARKUP}", title=TITLE + MARKUP)
    lora("y.safetensors")
    for arguments in ([], ["--modules"], ["--json"]):
        text = run("inspect", str(path), *arguments)
        assert "\x1b" not in text
        assert "\x07" not in text
    shown = run("inspect", str(path))
    assert f"sd {MARKUP}" in shown
    assert "\\x1b]0;owned\\x07[/]" in shown
    error = run("merge", str(path), "y.safetensors", "--method", "concat", "-o", "z.safetensors", code=3)
    problem = "no layer in common" if find_spec("diffusers") else "layer names must be translated"
    assert problem in " ".join(error.replace("│", " ").split())
    assert "\x1b]" not in error
    report = run("merge", str(path), "--method", "concat", "-o", "z.safetensors")
    assert "\x1b]" not in report


def test_a_report_shows_names_and_does_not_obey_them() -> None:
    script = "<script>alert(1)</script>"
    path = lora(f"{script.replace('/', '|')}.safetensors", f"lora_unet_{TITLE}{script}", ss_base_model_version=script)
    for name in ("r.html", "r.png"):
        assert "\x1b" not in run("inspect", str(path), "--plot", name)
    text = Path("r.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_file_called_like_markup() -> None:
    name = "[bold]a[x].safetensors"
    lora(name)
    assert name in run("inspect", name)
    lora("b.safetensors")
    assert "+1.000" in run("inspect", name, "b.safetensors")


def test_a_progress_bar_shows_names_and_does_not_obey_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal then
    with progress_bar("training", quiet=False, show_step=True) as progress:
        progress(1, 2, TITLE + MARKUP)
    shown = capsys.readouterr().err
    assert "\\x1b]0;owned\\x07[/] [bold]x[/bold]" in shown
    assert "\x1b]0;" not in shown


def test_json_holds_no_control_characters() -> None:
    lora("x.safetensors", note="\x9b31m\x7f")
    text = run("inspect", "x.safetensors", "--json")
    assert "\x9b" not in text
    assert json.loads(text)["files"][0]["metadata"]["note"] == "\x9b31m\x7f"


@pytest.mark.parametrize("made", ["{", "[" * 10_000, '{"recipe": 5}', "null"])
def test_a_broken_record_of_a_merge_is_bad_input(made: str) -> None:
    lora("x.safetensors", legomole=made)
    for arguments in ([], ["--json"], ["--recipe"]):
        result = CliRunner().invoke(app, ["inspect", "x.safetensors", *arguments])
        assert result.exit_code in (0, 3), result.output
        assert "bug in legomole" not in result.output


@pytest.mark.parametrize(
    "training", ["[]", '{"losses": 5}', '{"losses": ["x", "y"]}', '{"settings": {"steps": 1}}', '{"concepts": [1, 2]}']
)
def test_a_broken_record_of_a_training_is_bad_input(training: str) -> None:
    tensors, header = TrainedGates.load(FOLDER / "gates.safetensors").to_tensors()
    save_file(tensors, "g.safetensors", header | {"training": training})
    for arguments in ([], ["--json"]):
        result = CliRunner().invoke(app, ["inspect", "g.safetensors", *arguments])
        assert result.exit_code in (0, 3), result.output
        assert result.exit_code == 0 or "record of the training" in result.output


# ---- recipes


def test_yaml_makes_no_objects_and_no_references(folder: Path) -> None:
    for text in (
        "method: !!python/object/apply:os.system ['touch owned']\ninputs: []",
        "inputs: !!python/name:os.system\nmethod: lego",
        "method: lego\ninputs: &a [*a]",
        "a: &a [x, x]\nb: &b [*a, *a]\nmethod: lego\ninputs: [{path: x}]\nsettings: {rank: *b}",
    ):
        with pytest.raises(RecipeError, match="not valid YAML"):
            recipe_from_text(text, "yaml")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "value",
    ["2026-13-45", "!!int x", "!!float x", "!!bool maybe", "!!timestamp x", "9" * 5000, "[" * 3000, "{a: " * 3000, "\t",
     "[" * 30 + "]" * 30],
)  # fmt: skip
def test_yaml_of_nonsense(value: str) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        recipe_from_text(f"method: lego\ninputs: [{{path: x}}]\nnormalize: {value}", "yaml", "r.yaml")


@pytest.mark.parametrize("kind", ["yaml", "toml"])
@pytest.mark.parametrize("key", ["normalize", "dtype", "rank"])
def test_numbers_too_long_to_print(kind: Literal["yaml", "toml"], key: str) -> None:
    """Written in base 16 they are read, but could not be shown in the error."""
    number = "0x" + "f" * 5000
    if kind == "toml":
        text = 'method = "lego"\n' + (f"[settings]\nrank = {number}\n" if key == "rank" else f"{key} = {number}\n")
        text += '[[inputs]]\npath = "x"\n'
    else:
        text = "method: lego\ninputs: [{path: x}]\n"
        text += f"settings: {{rank: {number}}}" if key == "rank" else f"{key}: {number}"
    with pytest.raises(RecipeError, match="Exceeds the limit"):
        recipe_from_text(text, kind, "r")


@pytest.mark.parametrize("value", ["[" * 3000, "9" * 5000, "2026-13-45", "{a=" * 3000])
def test_toml_of_nonsense(value: str) -> None:
    with pytest.raises(RecipeError, match=r"r\.toml"):
        recipe_from_text(f"normalize = {value}", "toml", "r.toml")


def test_recipes_that_are_too_long_or_too_deep(folder: Path) -> None:
    with pytest.raises(RecipeError, match="too long"):
        recipe_from_text("#" * (1 << 20), "yaml")
    (folder / "r.yaml").write_bytes(b"#" * (4 << 20))
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(folder / "r.yaml")
    deep: object = 1
    for _ in range(20):
        deep = {"a": deep}
    with pytest.raises(RecipeError, match="nested too deeply"):
        recipe_from_data({"method": "lego", "inputs": [{"path": "x"}], "settings": deep})


@pytest.mark.parametrize(
    "path",
    [
        "../a.safetensors",
        "/etc/a.safetensors",
        "sub/a.safetensors",
        "\\\\host\\share\\a",
        "C:\\a",
        "C:a",
        "..",
        "",
        "a\0b",
    ],
)
@pytest.mark.parametrize("place", ["input", "statistics"])
def test_a_recipe_inside_a_file_names_no_other_folder(path: str, place: str, folder: Path) -> None:
    """Opening a path from an untrusted file may reach another machine, with the user's password."""
    recipe = {"method": "lego", "inputs": [{"path": "a.safetensors"}], "settings": {"rank": 2}}
    if place == "input":
        recipe["inputs"] = [{"path": path}]
    else:
        recipe["settings"] = {"statistics": path}
    lora("x.safetensors", legomole=json.dumps({"recipe": recipe}))
    error = run("merge", "--config", "x.safetensors", "-o", "y.safetensors", code=3)
    assert "names files in other folders" in error
    shown = json.loads(run("inspect", "x.safetensors", "--recipe", "--json"))
    assert [entry["path"] for entry in shown["inputs"]] == [entry["path"] for entry in recipe["inputs"]]
    assert read_recipe(folder / "x.safetensors", allow_any_path=True).inputs


def test_what_legomole_writes_can_be_repeated_as_before(folder: Path) -> None:
    (folder / "sub").mkdir()
    lora("sub/a.safetensors")
    run("merge", "sub/a.safetensors", "--method", "concat", "-o", "sub/b.safetensors")
    run("merge", "--config", "sub/b.safetensors", "-o", "sub/c.safetensors")
    assert (folder / "sub/b.safetensors").read_bytes() == (folder / "sub/c.safetensors").read_bytes()


def test_no_revision_leads_out_of_the_cache() -> None:
    assert "no adapter of this name" in run("merge", "hf://a/b@../../x", "-o", "y.safetensors", code=3)


def test_half_a_character_cannot_be_written(folder: Path) -> None:
    adapter = load(lora("x.safetensors"))
    object.__setattr__(adapter, "metadata", {"a": "\ud800"})
    with pytest.raises(OSError, match=r"not Unicode[\s\S]*y\.safetensors"):
        save(adapter, folder / "y")
    assert not (folder / "y.safetensors").exists()
