"""What a user installs: the files in the wheel, the version, the metadata ComfyUI's registry reads, the lint."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import legomole
import pytest
import torch
import yaml
from legomole.cli import app
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from safetensors.torch import save_file
from typer.testing import CliRunner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(legomole.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The package as a wheel would hold it (setuptools' build step alone: no network, no isolation, a second)."""
    out = tmp_path_factory.mktemp("built")
    code = "import setuptools; setuptools.setup()"
    steps = ["-q", "egg_info", "--egg-base", str(out), "build_py", "--build-lib", str(out)]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *steps], cwd=ROOT, check=True, capture_output=True)
    return out / "legomole"


def tracked(pattern: str) -> set[str]:
    """Files of the repository that match, relative to the root."""
    skip = {".venv", "tests", "build", "docs", "benchmarks", "__pycache__"}
    found = (p.relative_to(ROOT) for p in ROOT.glob(pattern) if p.is_file())
    return {p.as_posix() for p in found if not skip & set(p.parts) and not p.parts[0].startswith(".")}


def test_the_wheel_holds_every_module_and_what_the_page_needs(built):
    packed = {p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file()}
    wanted = tracked("*.py") | tracked("*/**/*.py") | tracked("web/**/*") | tracked("workflows/*")
    wanted |= tracked("locales/**/*") | tracked("nano/weights/**/*.safetensors")
    assert wanted - packed == set()
    assert "web/docs" in {str(Path(p).parent.as_posix()) for p in packed}
    assert any(p.startswith("workflows/") and p.endswith(".json") for p in packed)


def test_the_wheel_holds_nothing_else(built):
    tops = {p.relative_to(built).parts[0] for p in built.rglob("*") if p.is_file()}
    assert tops <= {
        "__init__.py",
        "__main__.py",
        "api.py",
        "cli",
        "core",
        "hosts",
        "nano",
        "nodes",
        "subgraphs",
        "web",
        "workflows",
        "locales",
    }


def test_the_installed_version_is_the_packages():
    assert metadata.version("legomole") == legomole.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", legomole.__version__)


def test_the_changelog_knows_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{legomole.__version__}]" in text
    assert "### Results change" in text


def test_comfyui_can_read_the_project():
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["PublisherId"]
    assert comfy["DisplayName"] == "LegoMoLE"
    assert legomole.WEB_DIRECTORY == "./web"
    assert (ROOT / "web").is_dir()


def test_the_documents_exist_and_link_to_files_that_exist():
    broken = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.name}: {target}")
    assert broken == []
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install = "pip install -c constraints.txt -e '.[dev]'"
    assert "pip install -c constraints.txt '.[diffusers]' && .venv/bin/legomole demo" in readme
    assert install in readme
    assert install in script.replace("--quiet ", "")
    assert ".venv/bin/pytest" in readme
    assert script.rstrip().endswith(".venv/bin/pytest")


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def readme_files(tmp_path, monkeypatch):
    """The files the README's examples speak of."""
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    for name, rank in {"style": 8, "subject": 8, "a": 4, "b": 4, "big": 32}.items():
        modules = {
            f"lora_unet_down_blocks_0_{layer}": LowRank(
                torch.randn(rank, 40, generator=g), torch.randn(48, rank, generator=g)
            )
            for layer in ("attn1_to_q", "attn2_to_q")
        }
        legomole.save(Adapter(modules), f"{name}.safetensors", format="kohya")
    for name in "ab":
        part = LowRank(torch.randn(8, 40, generator=g), torch.randn(48, 8, generator=g))
        legomole.save(Adapter({"model.layers.0.self_attn.q_proj": part}), f"adapter_{name}", format="peft")
    square = torch.randn(8, 8, generator=g)
    save_file({"lora_unet_x.lokr_w1": square, "lora_unet_x.lokr_w2": square.clone()}, "lokr.safetensors")


def test_the_readmes_commands_work_one_after_the_other(readme_files):
    lines = [line.partition("#")[0] for block in blocks("sh") for line in block.splitlines()]
    commands = [
        shlex.split(line)[1:]
        for line in lines
        if line.startswith("legomole ") and not {"train-gates", "--base"} & {*line.split()}
    ]
    assert len(commands) == 11
    for command in commands:
        arguments = command[: command.index(">")] if ">" in command else command
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        if ">" in command:
            Path(command[-1]).write_text(result.stdout, encoding="utf-8")


def test_the_readmes_python_works(readme_files):
    merging, _ = blocks("python")
    exec(merging, {})
    assert {part.rank for part in legomole.load("merged.safetensors").modules.values()} == {16}


def test_the_readme_mixes_as_the_page_does_that_is_carried_out():
    """The blocks that need a pipeline stand word for word in docs/mole.md, which has a test of its own."""
    page = (ROOT / "docs" / "mole.md").read_text(encoding="utf-8")
    _, mixing = blocks("python")
    (command,) = [line for block in blocks("sh") for line in block.splitlines() if "train-gates" in line]
    assert mixing in page
    assert command in page


def test_the_hooks_are_well_formed():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "pyright"]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_clean(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
