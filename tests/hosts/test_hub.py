"""Names of the Hugging Face Hub, looked up in a cache made by the test; no network."""

from __future__ import annotations

from pathlib import Path

import pytest

hub = pytest.importorskip("huggingface_hub")

import torch  # noqa: E402
from legomole.cli import app  # noqa: E402
from legomole.core.adapter import Adapter  # noqa: E402
from legomole.core.errors import FormatError  # noqa: E402
from legomole.core.formats import load, save  # noqa: E402
from legomole.core.lowrank import LowRank  # noqa: E402
from legomole.core.recipes.read import read_recipe  # noqa: E402
from legomole.core.recipes.recipe import Input, Recipe, RecipeError  # noqa: E402
from legomole.core.recipes.run import run  # noqa: E402
from legomole.hosts.hub import cached_folder  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

COMMIT, OLDER = "1" * 40, "2" * 40


def lora(value: float) -> Adapter:
    return Adapter({"model.x": LowRank(torch.full((2, 3), value), torch.ones(4, 2))})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """me/tone has two commits, the branch main and the tag v1; its README was not downloaded."""
    root = tmp_path / "cache"
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(root))
    folder = root / "models--me--tone"
    for commit, name, value in ((COMMIT, "main", 1.0), (OLDER, "v1", 2.0)):
        (folder / "snapshots").mkdir(parents=True, exist_ok=True)
        save(lora(value), folder / "snapshots" / commit, format="peft")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    monkeypatch.chdir(tmp_path)
    return root


@pytest.mark.parametrize(
    ("name", "value"), [("me/tone", 1.0), ("me/tone@main", 1.0), ("me/tone@v1", 2.0), (f"me/tone@{OLDER}", 2.0)]
)
def test_names_and_revisions(name: str, value: float, cache: Path) -> None:
    assert load(cached_folder(name)).modules["model.x"].A[0, 0] == value


@pytest.mark.parametrize("name", ["me/none", "me/tone@none", "me/to--ne.."])
def test_missing_names(name: str, cache: Path) -> None:
    with pytest.raises(FormatError, match=r"no adapter of this name[\s\S]*hf download me/"):
        cached_folder(name)


@pytest.mark.parametrize("start", ["", "../../../"])
def test_no_revision_leads_out_of_the_cache(start: str, cache: Path, tmp_path: Path) -> None:
    """huggingface_hub opens a file named like the revision to find the adapter's folder."""
    save(lora(5.0), tmp_path / "elsewhere", format="peft")
    (tmp_path / "ref").write_text(str(tmp_path / "elsewhere"))
    with pytest.raises(FormatError, match="no branch, tag or commit"):
        cached_folder(f"me/tone@{start}ref" if start else f"me/tone@{tmp_path / 'ref'}")


def test_the_command_line_accepts_names_and_repeats_them(cache: Path, tmp_path: Path) -> None:
    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    invoke("merge", "me/tone:0.5", "hf://me/tone@v1", "--method", "concat", "-o", "merged")
    delta = 0.5 * lora(1.0).modules["model.x"].delta() + lora(2.0).modules["model.x"].delta()
    torch.testing.assert_close(load("merged").modules["model.x"].delta(), delta)
    assert [entry.path for entry in read_recipe(Path("merged")).inputs] == ["hf://me/tone", "hf://me/tone@v1"]
    invoke("merge", "--config", "merged", "-o", "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("merged", name).read_bytes() == Path("again", name).read_bytes()
    assert "model.x" in invoke("inspect", "me/tone@v1", "--modules")
    invoke("convert", "me/tone@v1", "-o", "copy")
    invoke("compress", "me/tone", "--rank", "1", "-o", "small")
    assert load("small").modules["model.x"].rank == 1


def test_paths_take_precedence_over_names(cache: Path, tmp_path: Path) -> None:
    """An existing folder of that name is used; a missing one in an existing folder is an error about a path."""
    (tmp_path / "me").mkdir()
    save(lora(5.0), tmp_path / "me" / "tone", format="peft")
    result = CliRunner().invoke(app, ["merge", "me/tone", "--method", "concat", "-o", "merged"])
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(load("merged").modules["model.x"].delta(), lora(5.0).modules["model.x"].delta())
    result = CliRunner().invoke(app, ["merge", "me/other", "-o", "merged2"])
    assert result.exit_code == 3
    assert "There is no such file." in result.output
    result = CliRunner().invoke(app, ["merge", "you/other", "-o", "merged2"])
    assert result.exit_code == 3
    assert "hf download you/other" in result.output.replace("\n", " ")


def test_without_a_host_the_engine_raises() -> None:
    with pytest.raises(RecipeError, match="command line only"):
        run(Recipe(method="concat", inputs=[Input(path="hf://me/tone")]))
