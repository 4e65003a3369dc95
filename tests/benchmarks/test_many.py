"""The benchmark of many adapters, at a size that takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "llm" / "many.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory from /proc")
def test_it_prints_a_row_for_every_method(tmp_path: Path) -> None:
    small = ("--adapters", "3", "--methods", "svd", "--blocks", "1", "--divide", "32", "--folder", str(tmp_path))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *small], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_, merged, naive = done.stdout.splitlines()
    assert first.startswith("7 layers, ")
    columns = [[cell.strip() for cell in row.strip("|").split("|")] for row in (merged, naive)]
    assert [(row[0], row[2]) for row in columns] == [("3", "svd"), ("3", "naive")]
    resident, own = (float(cell.removesuffix(" GB")) for cell in columns[0][3:5])
    assert resident > own > 0.05
    assert columns[1][6:] == ["1.00", "1.00"]
