"""A few seconds of each command of ``python -m benchmarks.reliability``, in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and limits of resources")


def python(code: str) -> Any:
    """Run code in a separate process; return its output, parsed as JSON."""
    env = os.environ | {"PYTHONSAFEPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@POSIX
def test_fuzzed_inputs_are_read_or_refused() -> None:
    """Read 40 fixed cases. Then an error that is not ours must be counted as a defect, and a success as such."""
    found = python(
        "import json\n"
        "from benchmarks.reliability import fuzz, readers\n"
        "tally, other = fuzz.Tally(), fuzz.Tally()\n"
        "fuzz.read_cases(11, 0, 40, 1e9, tally)\n"
        "readers.readings = lambda case, number: [('a', lambda: 1 / 0), ('b', lambda: 1)]\n"
        "fuzz.read_cases(0, 0, 3, 1e9, other)\n"
        "print(json.dumps([tally.cases, tally.defects, tally.kinds, tally.outcomes, other.defects, other.outcomes]))"
    )
    cases, defects, kinds, outcomes, known, known_outcomes = found
    assert (cases, defects) == (40, [])
    assert set(kinds) >= {"lora", "folder", "gates", "statistics", "recipe"}
    assert outcomes["ok"] > 30
    assert outcomes["refused"] > 30
    assert len(known) == 3
    assert all("a: ZeroDivisionError" in defect for defect in known)
    assert known_outcomes == {"ok": 3}


@POSIX
def test_killed_at_every_stage_and_faults_of_the_machine() -> None:
    """The old or the new folder must be there. Without an atomic exchange there are moments with neither, a defect."""
    exchanged, in_turn, faults = python(
        "import json\n"
        "from benchmarks.reliability import faults, kills\n"
        "from legomole.core.formats import files\n"
        "def stages():\n"
        "    results, job = kills.KillResults(), kills.jobs()[2]\n"
        "    results.outputs[job.name] = kills.Counter()\n"
        "    kills._measure(job)\n"
        "    stage = 0\n"
        "    while kills._killed(job, results, at_call=stage): stage += 1\n"
        "    return [stage, results.outputs[job.name], results.defects]\n"
        "exchanged = stages()\n"
        "files.swap_folders = lambda new, old: False\n"
        "in_turn = stages()\n"
        "faults._FAULTS = [row for row in faults._FAULTS if 'three' not in row[0]]\n"
        "print(json.dumps([exchanged, in_turn, faults.faults()]))"
    )
    stages, found, defects = exchanged
    assert defects == []
    assert found["old"] + found["new"] == stages > 5
    assert min(found.values()) > 0
    assert any("neither" in defect for defect in in_turn[2])
    assert len(faults) == 8
    assert all(line.endswith((": ok", ": ended by SIGBUS")) for line in faults), faults
