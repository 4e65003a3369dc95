"""Outputs: never replaced by accident; exit code 4 and nothing left behind where they cannot be written."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import pytest
from legomole.core.formats import load

from .command import done, process, run, squeezed, write


def test_an_existing_output_is_kept_unless_overwrite_is_given():
    Path("out.safetensors").write_bytes(b"precious")
    result = run("merge", "a.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 4
    assert "exists already" in result.output
    assert Path("out.safetensors").read_bytes() == b"precious"
    done("merge", "a.safetensors", "-o", "out.safetensors", "--overwrite")
    assert load("out.safetensors").modules


@pytest.mark.parametrize("output", ["a.safetensors", "a", "./b.safetensors"])
def test_an_input_is_never_the_output(output):
    before = Path("a.safetensors").read_bytes()
    result = run("merge", "a.safetensors", "b.safetensors", "-o", output, "--overwrite")
    assert result.exit_code == 4
    assert "one of the inputs" in result.output
    assert Path("a.safetensors").read_bytes() == before


def test_a_missing_suffix_is_added():
    done("merge", "a.safetensors", "-o", "v1.5")
    assert Path("v1.5.safetensors").is_file()


def test_a_missing_output_folder_is_said_before_the_work():
    result = run("merge", "a.safetensors", "-o", "nowhere/out.safetensors")
    assert result.exit_code == 4
    assert "output folder does not exist" in squeezed(result.stderr)
    assert not Path("nowhere").exists()


def test_a_folder_is_no_file(folder):
    (folder / "there").mkdir()
    result = run("merge", "a.safetensors", "-o", "there/")
    assert result.exit_code == 4
    assert "The output is a folder" in squeezed(result.stderr)
    assert not Path("there.safetensors").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder not even root can write to")
def test_a_folder_that_cannot_be_written():
    result = run("merge", "a.safetensors", "-o", "/proc/out.safetensors")
    assert result.exit_code == 4, result.output
    assert "/proc/out.safetensors" in squeezed(result.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_full_disk_leaves_nothing_behind(folder, extra):
    """A limit on the size of files stops the writing half way, as a full disk does."""
    write(folder / "big.safetensors", 4, d_in=4000)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    before = {p.name for p in folder.iterdir()}
    done = process("merge", "big.safetensors", "-o", "out.safetensors", *extra, preexec_fn=limit)
    assert done.returncode == 4, done.stderr
    assert "out.safetensors" in (done.stdout if extra else done.stderr)
    assert "Traceback" not in done.stderr
    assert {p.name for p in folder.iterdir()} == before
