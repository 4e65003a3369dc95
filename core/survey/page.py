"""A survey as an HTML page: one file without scripts or external resources."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..adapter import Adapter, base_model
from ..merge.findings.finding import lights
from ..pictures.charts import png
from .picture import draw_survey
from .summary import format_cosine, report_title, summary_lines
from .survey import Survey

if TYPE_CHECKING:
    from PIL.Image import Image

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #28282d; background: #fff; max-width: 1060px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.5em; font-weight: 500; overflow-wrap: anywhere } h2 { font-size: 1.1em; margin-top: 2em }
img { width: 100%; height: auto; border: 1px solid #e1e1e6 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 14px }
th, td { padding: 3px 12px 3px 0; text-align: right; border-bottom: 1px solid #e1e1e6; font-weight: 400 }
th { color: #787880; vertical-align: bottom } .name { text-align: left; overflow-wrap: anywhere; max-width: 30em }
.lights { list-style: none; padding: 0 } .red { color: #c9302c } .yellow { color: #d99a00 } .green { color: #2e8b57 }
"""
# a second defence: should text from a file get past the escaping, the browser still runs and loads nothing
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_PAIR_ROWS = 200  # rows in the table of pairs, at most
_RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

Row = Sequence[object]


def html_page(survey: Survey, adapters: Sequence[Adapter]) -> str:
    """Return the page of a survey: summary, picture, and all values as tables.

    Args:
        survey: The survey to show.
        adapters: The adapters surveyed, for ranks, hashes and metadata of their files.
    """
    name = escape(report_title(survey))
    sentences = "".join(f"<li>{escape(line)}</li>" for line in summary_lines(survey))
    n = len(survey.report.inputs)
    rank_columns = ("rank", *(["the sum"] if n > 1 else []), *survey.report.inputs)
    parts = [
        page_head(name),
        f"<ul>{sentences}</ul>",
        _findings(survey),
        embedded(draw_survey(survey), "The report as a picture; the tables hold its values."),
        table("LoRAs", _LORA_COLUMNS, _lora_rows(survey, adapters), names=(1, 6)),
        table("Pairs", _PAIR_COLUMNS, _pair_rows(survey), names=(0, 1)) if n > 1 else "",
        table("Blocks", _block_columns(survey), _block_rows(survey), names=(0,)),
        table("Energy kept by rank", rank_columns, _rank_rows(survey)),
        _NOTES,
    ]
    return "\n".join(part for part in parts if part)


def page_head(title: str) -> str:
    """The first lines of a page that loads nothing, with an escaped title as heading."""
    return (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{title}</title>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name=viewport content="width=device-width"><style>{_STYLE}</style>\n<h1>{title}</h1>'
    )


def embedded(image: Image, alt: str) -> str:
    """An image inside the page."""
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png(image)).decode()}">'


def _findings(survey: Survey) -> str:
    """A light for every LoRA with its most severe finding, and a table of all findings."""
    rows = "\n".join(
        f"<li><span class={light}>&#9679;</span> {escape(label)}: {escape(text)}</li>"
        for label, light, text in lights(survey.report.inputs, survey.report.findings)
    )
    findings = [
        (
            *(f.level, f.kind.replace("_", " "), ", ".join(f.loras)),
            *(f"{f.value:.4g}", f"{f.threshold:.4g}", f.text, f.remedy),
        )
        for f in survey.report.findings
    ]
    return f"<h2>Findings</h2>\n<ul class=lights>{rows}</ul>" + (
        table("All findings", _FINDING_COLUMNS, findings, names=(0, 1, 2, 5, 6)) if findings else ""
    )


_FINDING_COLUMNS = ("", "kind", "LoRAs", "value", "threshold", "finding", "to do")
_LORA_COLUMNS = ("", "LoRA", "weight", "layers", "ranks", "size", "base model", "sha256")
_PAIR_COLUMNS = ("first", "second", "shared layers", "cosine", "common inputs", "common outputs")
_NOTES = """<h2>What the numbers mean</h2>
<p>Cosine: 1 the same direction, 0 unrelated, -1 opposite. Size: norm of the LoRA's delta, its weight included; energy:
square of the size. Common inputs (outputs): share of the directions a layer reads (writes) that both LoRAs use, mean
over the layers; for random LoRAs it is the larger rank divided by the width. Rank for 95%: smallest rank that keeps 95%
of the energy of the exact sum in these layers.</p>"""


def table(title: str, columns: Row, rows: Iterable[Row], names: Sequence[int] = ()) -> str:
    """Format a table; the columns at the positions `names` hold names, the others numbers."""

    def line(row: Row, tag: str) -> str:
        cells = (
            f"<{tag}{' class=name' if i in names else ''}>{escape(str(cell))}</{tag}>" for i, cell in enumerate(row)
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join([line(columns, "th"), *(line(row, "td") for row in rows)])
    return f"<h2>{title}</h2>\n<div class=wide><table>{body}</table></div>"


def _lora_rows(survey: Survey, adapters: Sequence[Adapter]) -> Iterator[Row]:
    sizes = survey.energies().sum(0).sqrt().tolist()
    for i, adapter in enumerate(adapters):
        ranks = sorted({part.rank for part in adapter.modules.values()})
        spread = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0]) if ranks else ""
        weight = f"{survey.report.weights[i]:g}"
        yield (
            i + 1, survey.report.inputs[i], weight, len(adapter.modules), spread, f"{sizes[i]:.3g}",
            base_model(adapter.metadata) or "not specified", adapter.source.sha256[:12],
        )  # fmt: skip


def _pair_rows(survey: Survey) -> Iterator[Row]:
    names, overlap = survey.report.inputs, survey.report.overlap()
    shared_in, shared_out = survey.shared_directions()
    pairs = survey.pairs()
    for i, j in pairs[:_PAIR_ROWS]:
        layers = sum(i in module.adapters and j in module.adapters for module in survey.report.modules)
        common = (f"{float(table[i, j]):.0%}" for table in (shared_in, shared_out))
        yield names[i], names[j], layers, format_cosine(overlap[i][j]), *common
    if len(pairs) > _PAIR_ROWS:
        yield f"and {len(pairs) - _PAIR_ROWS} pairs that overlap less", "", "", "", "", ""


def _block_columns(survey: Survey) -> Row:
    pair = ["cosine"] if len(survey.report.inputs) == 2 else []
    return "block", "layers", "rank for 95%", *pair, *(f"energy of {name}" for name in survey.report.inputs)


def _block_rows(survey: Survey) -> Iterator[Row]:
    for block, shares in zip(survey.blocks, survey.energy_shares().tolist(), strict=True):
        pair = [format_cosine(survey.report_of(block.layers).overlap()[0][1])] if len(shares) == 2 else []
        rank = survey.rank_for(0.95, block.layers)
        yield block.name, len(block.layers), rank, *pair, *(f"{share:.1%}" for share in shares)


def _rank_rows(survey: Survey) -> Iterator[Row]:
    n = len(survey.report.inputs)
    of_adapters = [survey.energy_by_rank(i) for i in range(n)]
    curves = [survey.energy_by_rank(), *of_adapters] if n > 1 else [survey.energy_by_rank()]
    longest = max(survey.rank_for(1 - 1e-9), *(len(curve) for curve in curves[1:]), 1)
    for rank in sorted({*(k for k in _RANKS if k < longest), longest}):
        yield rank, *(f"{float(curve[min(rank, len(curve)) - 1]):.1%}" for curve in curves)
