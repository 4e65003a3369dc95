"""The process: exit codes, JSON output, help without torch, progress bars."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import legomole
import pytest
from legomole.cli import console
from rich.console import Console
from rich.text import Text

from .command import NAMES, done, process, run, squeezed


def test_cancelling_exits_with_130(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("legomole.core.formats.load", interrupt)
    monkeypatch.setattr("legomole.core.recipes.run.load", interrupt)
    result = run("merge", "a.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 130
    assert "Nothing was written" in result.stderr
    assert not Path("out.safetensors").exists()


def test_a_bug_is_called_one_and_exits_with_1(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("legomole.core.recipes.run.merge", fail)
    result = run("merge", "a.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 1
    assert "ZeroDivisionError: oops" in result.stderr
    assert "bug in legomole" in squeezed(result.stderr)
    assert json.loads(run("merge", "a.safetensors", "-o", "out.safetensors", "--json").stdout)["exit_code"] == 1


def test_json_is_all_there_is_on_standard_output(folder):
    finished = process("merge", "a.safetensors", "b.safetensors", "--json", "-o", "out.safetensors")
    assert finished.returncode == 0, finished.stderr
    data = json.loads(finished.stdout)
    assert data["output"] == "out.safetensors"
    assert {module["name"] for module in data["report"]["modules"]} == set(NAMES)
    assert finished.stderr == ""


def test_version_and_module_entry():
    assert process("--version").stdout == f"legomole {legomole.__version__}\n"


@pytest.mark.parametrize("command", [[], ["merge"], ["inspect"], ["convert"], ["compress"], ["demo"]])
def test_help_loads_no_torch(command):
    code = (
        "import sys\nfrom legomole.cli import app\n"
        f"try: app({[*command, '--help']!r}, prog_name='legomole')\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "Usage: legomole" in shown.stdout
    if command:
        assert "--json" in shown.stdout


def test_help_shows_examples_and_exit_codes():
    assert "legomole merge --config" in squeezed(done("merge", "--help"))
    assert "Exit codes: 0 done" in squeezed(done("--help"))


def test_bars_come_one_after_the_other_and_say_what_time_is_left(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(console, "err", lambda: Console(file=stream, force_terminal=True, width=100))
    with console.progress_bars("reading", "merging", quiet=False) as (reading, merging):
        reading(1, 2, "a")
        reading(2, 2, "b")
        merging(5, 40, "layer")
    text = Text.from_ansi(stream.getvalue()).plain
    assert text.index("reading") < text.index("merging")
    assert re.search(r"merging .* 5/40 .* left", text)
