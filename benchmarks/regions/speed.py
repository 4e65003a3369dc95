"""Cost of regions per sampling step in a real ComfyUI: `python benchmarks/regions/speed.py [ROUNDS]`.

Times a step with guidance on a small model (one level of SD 1.5 with random weights, 576 positions) with two LoRAs of
rank 16 on all matrices of its blocks: MoLE Mix without regions, with two hard and with two soft masks, and ComfyUI's
own way, two masked pairs of conditioning, each with a LoRA hook. Methods take turns, in another order each round, and
ratios are taken within a round, so that other load on the machine affects all alike. Needs a ComfyUI, as the tests in
tests/comfy do.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from legomole.tests.comfy import server, tiny

ROOT = Path(__file__).parents[2]
RATIOS = (
    ("hard masks", "gates"),
    ("soft masks", "gates"),
    ("hard masks", "stock hooks"),
    ("soft masks", "stock hooks"),
    ("gates", "base model"),
)


def main(rounds: int) -> None:
    found = server.find()
    if isinstance(found, str):
        raise SystemExit(found)
    folder, python = found
    with tempfile.TemporaryDirectory() as base:
        server.lay_out(Path(base), ROOT)
        tiny.write_models(Path(base))
        script = Path(__file__).with_name("speed_comfy.py")
        command = [python, script, folder, base, str(rounds)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "comfy")}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    for model, seconds in json.loads(output.splitlines()[-1]).items():
        print(f"{model}: {', '.join(f'{name} {statistics.median(values):.3f} s' for name, values in seconds.items())}")
        for method, other in RATIOS:
            ratios = [a / b for a, b in zip(seconds[method], seconds[other], strict=True)]
            print(f"  {method} / {other}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
