"""``python -m benchmarks.formats``: check all dialects of all families, and write the table in docs/files.md.

Needs a ComfyUI (``COMFYUI_PATH``, default ``~/comfy/ComfyUI``) with its Python (``COMFYUI_PYTHON``), and diffusers.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from legomole.core.layers.families import FAMILIES
from legomole.core.layers.families.table import Family

from .cases import Case, merge_all, read_by_comfyui, read_by_diffusers, spellings

DOCUMENT = Path("docs/files.md")
_TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=__doc__)
    parser.add_argument("families", nargs="*", help="names of families, default all")
    parser.add_argument("--quick", action="store_true", help="not every pair of dialects")
    options = parser.parse_args()
    families = [family for family in FAMILIES if not options.families or family.name in options.families]
    comfy = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
    python = Path(os.environ.get("COMFYUI_PYTHON", comfy / ".venv/bin/python")).expanduser()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = [case for family in families for case in merge_all(family, folder, every_pair=not options.quick)]
        wrong = read_back(cases, folder, comfy, python)
    for line in wrong:
        print(f"wrong: {line}")
    refused = [case for case in cases if case.refused]
    for case in refused:
        print(f"refused: {case.family}, {case.what}: {case.refused}")
    print(f"{len(cases)} cases, {len(refused)} refused, {len(wrong)} wrong")
    if len(families) == len(FAMILIES) and not options.quick:
        text = DOCUMENT.read_text()
        DOCUMENT.write_text(_TABLE.sub("\n" + "\n".join(table(families, cases, wrong, comfy)) + "\n\n", text))
        print(f"wrote {DOCUMENT}")
    sys.exit(bool(wrong))


def read_back(cases: Sequence[Case], folder: Path, comfy: Path, python: Path) -> list[str]:
    """Read all files of the cases with the programs that they are for. Returns descriptions of wrong cases."""
    done = [case for case in cases if not case.refused]
    return [
        *read_by_comfyui([case for case in done if case.reader == "comfy"], folder, comfy, python),
        *read_by_diffusers([case for case in done if case.reader == "diffusers"]),
    ]


def table(families: Iterable[Family], cases: Sequence[Case], wrong: Sequence[str], comfy: Path) -> list[str]:
    """Lines of the table: a family's dialects, and the outcomes of its merges and conversions."""
    comfyui = re.search(r'"(.+?)"', (comfy / "comfyui_version.py").read_text())
    lines = [
        f"Checked with ComfyUI {comfyui[1] if comfyui else '?'} and diffusers {version('diffusers')}. Each cell: the "
        "number of cases that were exact, and of those refused with an error.",
        "",
        "| family | names that are read | merges of two dialects, read by ComfyUI | compressed, read by ComfyUI | "
        "converted for ComfyUI | for diffusers | for kohya's tools, and back |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in families:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for case in cases:
            if case.family == family.name:
                failed = any(line.startswith(f"{family.name}, {case.what}:") for line in wrong)
                counts[case.kind]["refused" if case.refused else "wrong" if failed else "exact"] += 1
        names = ", ".join(f"`{spelling.name}`" for spelling in spellings(family))
        kinds = ("merge", "compress", "comfy", "diffusers", "kohya")
        lines.append(f"| {family.name} | {names} | {' | '.join(_cell(counts[kind]) for kind in kinds)} |")
    return lines


def _cell(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "not possible"


if __name__ == "__main__":
    main()
