"""The demonstration: one subject LoRA, one style LoRA, and four prompts under each way to combine them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..core.formats import load, save
from ..core.merge.engine import merge
from ..core.merge.methods.lego import Lego
from ..core.merge.rank import Rank
from ..core.mole.attach import attach
from ..core.mole.mixture import Mixture
from ..core.mole.trained import TrainedGates
from .model import Prompts
from .oracle import judge
from .sampling import first_half, sample
from .store import Store
from .words import prompt

if TYPE_CHECKING:
    from PIL.Image import Image

SUBJECT, STYLE = "heart", "ember"
STRENGTHS = (1.3, 0.8)  # together: at 1 and 1 the style drowns the subject
_EACH = 8  # pictures of each row that are judged; the first is shown
_SUBJECTS = ("star", "moon", "cross", "ring", "arrow", "flower", "tree", "mushroom")
_STYLES = ("blueprint", "flat", "neon", "stripes", "pastel", "night", "dots", "checker")
ROWS = {  # which LoRAs a prompt is about -> what its pictures should show
    "both": ((SUBJECT, STYLE),) * _EACH,
    "subject": tuple((SUBJECT, style) for style in _STYLES),
    "style": tuple((subject, STYLE) for subject in _SUBJECTS),
    "neither": tuple(zip(_SUBJECTS[3:] + _SUBJECTS[:3], _STYLES, strict=True)),
}
_SEED = 3

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Column:
    """A picture per row, ``(4, 3, 64, 64)`` in [-1, 1], and per row the share that shows what was asked for."""

    pictures: Tensor
    scores: Mapping[str, float]


def columns(folder: Path, store: Store | None = None, tell: Tell = lambda *_: None) -> dict[str, Column]:
    """Paint and judge every way. The merged LoRA is saved as ``folder/lego.safetensors``.

    Args:
        folder: Must exist. store: The weights; default the shipped ones. tell: Called with (done, in all, what next).
    """
    store = store or Store()
    subject, style = (load(store.lora(concept)) for concept in (SUBJECT, STYLE))
    lego = merge([subject, style], Lego(Rank.parse("1x")), STRENGTHS).adapter
    save(lego, folder / "lego.safetensors", format="diffusers")
    gates = TrainedGates.load(store.folder / "gates.safetensors").of([subject, style])
    ways = {
        "no LoRA": None,
        f"{SUBJECT} LoRA": Mixture((subject,)),
        f"{STYLE} LoRA": Mixture((style,)),
        "sum": Mixture((subject, style), strengths=STRENGTHS),
        "LEGO": Mixture((lego,)),
        "MoLE": Mixture((subject, style), gates, STRENGTHS),
    }
    prompts, found = Prompts(), dict[str, Column]()
    for name, mixture in ways.items():
        tell(len(found), len(ways), name)
        with nullcontext() if mixture is None else attach(store.transformer, mixture, prompt_rows=first_half):
            found[name] = _column(store, prompts)
    tell(len(found), len(ways), "")
    return found


def _column(store: Store, prompts: Prompts) -> Column:
    wanted = [pair for pairs in ROWS.values() for pair in pairs]
    pictures = store.pictures(sample(store.transformer, prompts, [prompt(*pair) for pair in wanted], _SEED))
    right = judge(store.oracle, pictures, wanted).both.float().view(len(ROWS), _EACH).mean(1)
    return Column(pictures[::_EACH], dict(zip(ROWS, right.tolist(), strict=True)))


def tile(picture: Tensor, size: int) -> Image:
    """A picture ``(3, 64, 64)`` in [-1, 1] as an image of `size` pixels a side."""
    from PIL import Image

    rgb = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC)


def sheet(found: Mapping[str, Column], zoom: int = 2) -> Image:
    """All columns side by side, prompts on the left, scores below."""
    from PIL import Image, ImageDraw, ImageFont

    cell, left, top, gap = 64 * zoom, 150, 34, 6
    line = 17
    width, height = left + len(found) * (cell + gap), top + len(ROWS) * (cell + gap) + line * (len(ROWS) + 1) + 14
    picture = Image.new("RGB", (width, height), (255, 255, 255))
    draw, big, small = ImageDraw.Draw(picture), ImageFont.load_default(15), ImageFont.load_default(12)
    ink, pale, bad, good = (40, 40, 45), (110, 110, 118), (190, 40, 50), (30, 120, 60)
    for i, (kind, (pair, *_)) in enumerate(ROWS.items()):
        y = top + i * (cell + gap)
        article, *rest = prompt(*pair).split(" in ")
        draw.text((8, y + cell / 2 - 18), article, fill=ink, font=big)
        draw.text((8, y + cell / 2), "in " + " in ".join(rest), fill=ink, font=big)
        draw.text((8, y + cell / 2 + 22), f"(asks for {kind})", fill=pale, font=small)
    below = top + len(ROWS) * (cell + gap) + 4
    draw.text((8, below), f"right, of {_EACH} pictures:", fill=pale, font=small)
    for i, kind in enumerate(ROWS):
        draw.text((8, below + line * (i + 1)), kind, fill=ink, font=small)
    for j, (name, column) in enumerate(found.items()):
        x = left + j * (cell + gap)
        draw.text((x + cell / 2, top / 2), name, fill=ink, font=big, anchor="mm")
        for i, score in enumerate(column.scores.values()):
            picture.paste(tile(column.pictures[i], cell), (x, top + i * (cell + gap)))
            color = good if score >= 0.75 else bad if score < 0.5 else ink
            place = (x + cell / 2, below + line * (i + 1) + 7)
            draw.text(place, f"{round(score * _EACH)}", fill=color, font=small, anchor="mm")
    return picture


def words(found: Mapping[str, Column]) -> str:
    """What one sees, from the scores alone."""

    def of(name: str, kind: str) -> str:
        return f"{round(found[name].scores[kind] * _EACH)} of {_EACH}"

    alone = f"{of(f'{SUBJECT} LoRA', 'subject')} and {of(f'{STYLE} LoRA', 'style')}"
    lines = [f"Each LoRA alone shows its concept in {alone} pictures."]
    for name in ("sum", "LEGO", "MoLE"):
        lines.append(
            f"{name}: both together in {of(name, 'both')}; the subject alone in {of(name, 'subject')}, the style "
            f"in {of(name, 'style')}; what asks for neither comes out right in {of(name, 'neither')}."
        )
    return "\n".join(lines)


def run(folder: Path, tell: Tell = lambda *_: None) -> tuple[dict[str, Column], list[Path]]:
    """Everything; writes ``demo.png`` and ``lego.safetensors``. Returns the columns and the files."""
    found = columns(folder, tell=tell)
    path, part = folder / "demo.png", folder / "demo.part.png"
    sheet(found).save(part)
    part.replace(path)
    return found, [path, folder / "lego.safetensors"]
