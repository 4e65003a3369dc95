"""Write a sweep to a file: a page with table and chart, the chart, or the table."""

from __future__ import annotations

import csv
import io
from html import escape
from pathlib import Path

from ..formats.files import write_bytes
from ..pictures.charts import png
from ..pictures.sweep import draw_sweep
from ..recipes.sweep import Sweep
from .page import embedded, page_head, table

ENDINGS = (".html", ".png", ".csv")
"""Endings of the files that `write_sweep` writes."""


def write_sweep(swept: Sweep, path: Path) -> None:
    """Write a sweep to a file, atomically.

    Args:
        swept: The sweep.
        path: File whose ending says what is written: ``.html``, ``.png`` or ``.csv``.

    Raises:
        SaveError: The file could not be written.
    """
    ending = path.suffix.lower()
    if ending == ".png":
        write_bytes(path, png(draw_sweep(swept)))
    elif ending == ".csv":
        text = io.StringIO(newline="")
        csv.writer(text).writerows(swept.rows())
        write_bytes(path, text.getvalue().encode(errors="backslashreplace"))
    else:
        write_bytes(path, sweep_page(swept).encode(errors="xmlcharrefreplace"))


def sweep_page(swept: Sweep) -> str:
    """The page of a sweep: settings, chart, and all values as a table."""
    head, *rows = swept.rows()
    inputs = [f"{label}: weight {weight:g}" for label, weight in zip(swept.labels, swept.weights, strict=True)]
    lines = "".join(f"<li>{escape(line)}</li>" for line in (*inputs, *swept.reasons))
    title = escape(f"{len(rows)} merges of {', '.join(swept.labels)}")
    chart = embedded(draw_sweep(swept), "The errors of every merge as bars; the table holds their values.")
    return "\n".join([page_head(title), f"<ul>{lines}</ul>", chart, table("Merges", head, rows, names=(0,)), _NOTES])


_NOTES = """<h2>What the numbers mean</h2>
<p>Strength: factor on the weights. Errors are predicted on the layers' measured inputs, relative to what is wanted: 0
is exact. A LoRA's column: prompts that name it alone, for which the merge should act as the LoRA does. Joint: prompts
that name several, for 1.2 times their sum. Base: the change on prompts that name none, relative to the plain sum of the
LoRAs. Predicted: the loss by which the merges are ranked.</p>"""
