"""Write ``results.json`` and the tables ``table.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import common
from .measure import NAMED, OTHER, Row, share
from .prompts import KINDS
from .synonyms import Result, opened

ENCODERS = {"minilm": "all-MiniLM-L6-v2", "nano": "the small model"}
_MISSES = 12  # per encoder, in the table


def write(
    out: Path,
    rows: Sequence[Row],
    mean_rows: Sequence[Row],
    synonyms: Sequence[Result],
    shut: Mapping[str, tuple[int, int]],
) -> None:
    """Write both files.

    Args:
        out: Folder. rows: Rows of gates that read tokens. mean_rows: The same of gates that read the mean.
        synonyms, shut: See `synonyms.measure`; empty if they were not measured.
    """
    lines = [json.dumps(asdict(row)) for row in rows]
    summary = {"summary": {name: _summary(rows, mean_rows, name) for name in _measured(rows)},
               "synonyms": [asdict(result) for result in synonyms]}  # fmt: skip
    rest = json.dumps(summary, indent=1)
    common.write(out / "results.json", '{\n"rows": [\n' + ",\n".join(lines) + "\n],\n" + rest[1:].lstrip())
    parts = [table(rows, mean_rows, name) for name in _measured(rows)]
    parts += [misses([row for row in rows if row.encoder == name]) for name in _measured(rows)]
    if synonyms:
        parts.append(synonym_table(synonyms, shut))
    common.write(out / "table.md", "\n\n".join(part for part in parts if part))


def _measured(rows: Sequence[Row]) -> list[str]:
    return [name for name in ENCODERS if any(row.encoder == name for row in rows)]


def _summary(rows: Sequence[Row], mean_rows: Sequence[Row], encoder: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for label, part in (("tokens", rows), ("mean", mean_rows)):
        own = [row for row in part if row.encoder == encoder]
        for key, named in (("named", True), ("others", False)):
            right, count = share(own, named=named)
            result[f"{label}_{key}"] = {"right": right, "of": count}
    return result


def table(rows: Sequence[Row], mean_rows: Sequence[Row], encoder: str) -> str:
    """Return the Markdown table of one encoder: right gates by kind of prompt."""
    rows, mean_rows = ([row for row in part if row.encoder == encoder] for part in (rows, mean_rows))
    prompts, concepts = len({row.prompt for row in rows}), len({row.concept for row in rows})
    lines = [
        f"**{ENCODERS[encoder]}: {prompts} prompts, {concepts} concepts**", "",
        f"| prompts | named: >= {NAMED:g} | not named: <= {OTHER:g} | mean gates, named | mean gates, not named |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for kind in (*KINDS, "all"):
        cells = [
            _cell(*share([row for row in part if kind in (row.kind, "all")], named=named))
            for part in (rows, mean_rows)
            for named in (True, False)
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(right: int, count: int) -> str:
    return f"{right} of {count}" if count else "-"


def misses(rows: Sequence[Row]) -> str:
    """Return a Markdown list of wrong gates, the worst first."""
    wrong = sorted((row for row in rows if not row.right), key=lambda row: row.gate * (1 if row.named else -1))
    if not wrong:
        return ""
    shown = [
        f"- {'named' if row.named else 'not named'}, `{row.concept}` at {row.gate / row.bare:.2f}: "
        f"*{row.prompt if len(row.prompt) <= 60 else f'{row.prompt[:58]}..'}*"
        for row in wrong[:_MISSES]
    ]
    head = f"Wrong gates of {ENCODERS[rows[0].encoder]}: {len(wrong)} of {len(rows)}" + (
        f", the first {_MISSES}:" if len(wrong) > _MISSES else ":"
    )
    return "\n".join([head, "", *shown])


def synonym_table(results: Sequence[Result], shut: Mapping[str, tuple[int, int]]) -> str:
    """Return the Markdown table of words that were not listed."""
    lines = [
        "| concept | word that is not listed | gate, name listed | and two further words |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.concept} | {r.word} | {r.alone:.2f} | {r.further:.2f} |" for r in results]
    for kind in dict.fromkeys(r.kind for r in results):
        alone, further, count = opened(results, kind)
        lines.append(f"| **{kind}s** | at least 0.5 | {alone} of {count} | {further} of {count} |")
    lines.append(
        "| | prompts without the concept, <= 0.3 | " + " | ".join(_cell(*pair) for pair in shut.values()) + " |"
    )
    return "\n".join(lines)
