"""The memory bound stated in the README, at the size of real SDXL LoRAs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speed" / "memory.py"


@pytest.mark.slow
def test_an_sdxl_pair_merges_within_input_and_output_and_1_gb():
    """The script exits with 1 if the peak is more than 1000 MB above the size of the files."""
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lego, 722 layers" in done.stdout
