"""A survey as a page: one HTML file with everything in it, no script, nothing loaded from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from ..adapter import Adapter, base_model
from ..pictures.charts import png
from .findings import sentences, signed, title
from .picture import draw_survey
from .survey import Survey

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #28282d; background: #fff; max-width: 1060px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.5em; font-weight: 500; overflow-wrap: anywhere } h2 { font-size: 1.1em; margin-top: 2em }
img { width: 100%; height: auto; border: 1px solid #e1e1e6 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 14px }
th, td { padding: 3px 12px 3px 0; text-align: right; border-bottom: 1px solid #e1e1e6; font-weight: 400 }
th { color: #787880; vertical-align: bottom } .name { text-align: left; overflow-wrap: anywhere; max-width: 30em }
"""
# Should a stranger's text ever get through, the browser runs and loads nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MOST = 200  # rows of a table of pairs
_RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

Row = Sequence[object]


def page(survey: Survey, adapters: Sequence[Adapter]) -> str:
    """The page of a survey: summary, picture, and the numbers as tables.

    Args:
        survey: What was found. adapters: Of whom, for what their files say of themselves.
    """
    name = escape(title(survey))
    picture = base64.b64encode(png(draw_survey(survey))).decode()
    said = "".join(f"<li>{escape(line)}</li>" for line in sentences(survey))
    n = len(survey.report.inputs)
    parts = [
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{name}</title>",
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f'<meta name=viewport content="width=device-width"><style>{_STYLE}</style>',
        f"<h1>{name}</h1>\n<ul>{said}</ul>",
        f'<img alt="The report as a picture; the tables have its numbers." src="data:image/png;base64,{picture}">',
        _table("LoRAs", _LORAS, _loras(survey, adapters), names=(1, 6)),
        _table("Pairs", _PAIRS, _pairs(survey), names=(0, 1)) if n > 1 else "",
        _table("Blocks", _block_heads(survey), _blocks(survey), names=(0,)),
        _table("Energy kept by rank", ("rank", *(["the sum"] if n > 1 else []), *survey.report.inputs), _kept(survey)),
        _NOTES,
    ]
    return "\n".join(part for part in parts if part)


_LORAS = ("", "LoRA", "weight", "layers", "ranks", "size", "base model", "sha256")
_PAIRS = ("first", "second", "shared layers", "cosine", "common inputs", "common outputs")
_NOTES = """<h2>What the numbers mean</h2>
<p>Cosine: 1 the same direction, 0 unrelated, -1 opposite. Size: the norm of all a LoRA adds, its weight included;
energy is its square. Common inputs (outputs): the share of the directions a layer reads (writes) that both LoRAs use,
in the mean over the layers; by chance it is the larger rank over the width. Rank for 95%: the smallest that keeps 95%
of the energy of the exact sum in these layers.</p>"""


def _table(head: str, heads: Row, rows: Iterable[Row], names: Sequence[int] = ()) -> str:
    def line(row: Row, tag: str) -> str:
        cells = (
            f"<{tag}{' class=name' if i in names else ''}>{escape(str(cell))}</{tag}>" for i, cell in enumerate(row)
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join([line(heads, "th"), *(line(row, "td") for row in rows)])
    return f"<h2>{head}</h2>\n<div class=wide><table>{body}</table></div>"


def _loras(survey: Survey, adapters: Sequence[Adapter]) -> Iterator[Row]:
    sizes = survey.energies().sum(0).sqrt().tolist()
    for i, adapter in enumerate(adapters):
        ranks = sorted({part.rank for part in adapter.modules.values()})
        spread = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0]) if ranks else ""
        weight = f"{survey.report.weights[i]:g}"
        yield (
            i + 1, survey.report.inputs[i], weight, len(adapter.modules), spread, f"{sizes[i]:.3g}",
            base_model(adapter.metadata) or "not told", adapter.source.sha256[:12],
        )  # fmt: skip


def _pairs(survey: Survey) -> Iterator[Row]:
    names, overlap = survey.report.inputs, survey.report.overlap()
    shared_in, shared_out = survey.shared()
    pairs = survey.pairs()
    for i, j in pairs[:_MOST]:
        layers = sum(i in module.adapters and j in module.adapters for module in survey.report.modules)
        common = (f"{float(table[i, j]):.0%}" for table in (shared_in, shared_out))
        yield names[i], names[j], layers, signed(overlap[i][j]), *common
    if len(pairs) > _MOST:
        yield f"and {len(pairs) - _MOST} pairs that overlap less", "", "", "", "", ""


def _block_heads(survey: Survey) -> Row:
    pair = ["cosine"] if len(survey.report.inputs) == 2 else []
    return "block", "layers", "rank for 95%", *pair, *(f"energy of {name}" for name in survey.report.inputs)


def _blocks(survey: Survey) -> Iterator[Row]:
    for part, row in zip(survey.parts, survey.shares().tolist(), strict=True):
        pair = [signed(survey.of(part.layers).overlap()[0][1])] if len(row) == 2 else []
        rank = survey.rank_for(0.95, part.layers)
        yield part.name, len(part.layers), rank, *pair, *(f"{share:.1%}" for share in row)


def _kept(survey: Survey) -> Iterator[Row]:
    n = len(survey.report.inputs)
    curves = [survey.kept(), *(survey.kept(i) for i in range(n))] if n > 1 else [survey.kept()]
    longest = max(survey.rank_for(1 - 1e-9), *(len(curve) for curve in curves[1:]), 1)
    for rank in sorted({*(k for k in _RANKS if k < longest), longest}):
        yield rank, *(f"{float(curve[min(rank, len(curve)) - 1]):.1%}" for curve in curves)
