"""The demonstration: a subject LoRA and a style LoRA, combined in every way, on four kinds of prompts."""

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
from ..core.pictures.canvas import INK, Canvas, Colour
from .model import Prompts
from .oracle import judge
from .sampling import first_half, sample
from .store import Store
from .words import prompt

if TYPE_CHECKING:
    from PIL.Image import Image

SUBJECT, STYLE = "heart", "ember"
STRENGTHS = (1.3, 0.8)  # for both LoRAs together: at 1 and 1 the style hides the subject
_EACH = 8  # images per row that are judged; the first is shown
_SUBJECTS = ("star", "moon", "cross", "ring", "arrow", "flower", "tree", "mushroom")
_STYLES = ("blueprint", "flat", "neon", "stripes", "pastel", "night", "dots", "checker")
ROWS = {  # concepts of the LoRAs that a prompt names -> what its images should show
    "both": ((SUBJECT, STYLE),) * _EACH,
    "subject": tuple((SUBJECT, style) for style in _STYLES),
    "style": tuple((subject, STYLE) for subject in _SUBJECTS),
    "neither": tuple(zip(_SUBJECTS[3:] + _SUBJECTS[:3], _STYLES, strict=True)),
}
_SEED = 3
_GOOD: Colour = (30, 120, 60)
_BAD: Colour = (190, 40, 50)
_NOTE: Colour = (110, 110, 118)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Column:
    """Result of one way to combine the LoRAs.

    Args:
        pictures: One image per row, ``(4, 3, 64, 64)`` in [-1, 1].
        scores: Share of the images in each row that show what the prompt says.
    """

    pictures: Tensor
    scores: Mapping[str, float]


def columns(folder: Path, store: Store | None = None, progress: Progress = lambda *_: None) -> dict[str, Column]:
    """Sample and judge images for every way to combine the LoRAs; save the merged one as ``folder/lego.safetensors``.

    Args:
        folder: Existing folder for the merged LoRA.
        store: Model weights; default the shipped ones.
        progress: Called with the number of columns done, their total, and the next column's name.
    """
    store = store or Store()
    subject, style = (load(store.lora(concept)) for concept in (SUBJECT, STYLE))
    lego = merge([subject, style], Lego(Rank.parse("1x")), STRENGTHS).adapter
    save(lego, folder / "lego.safetensors", format="diffusers")
    gates = TrainedGates.load(store.folder / "gates.safetensors").of([subject, style])
    mixtures = {
        "no LoRA": None,
        f"{SUBJECT} LoRA": Mixture((subject,)),
        f"{STYLE} LoRA": Mixture((style,)),
        "sum": Mixture((subject, style), strengths=STRENGTHS),
        "LEGO": Mixture((lego,)),
        "MoLE": Mixture((subject, style), gates, STRENGTHS),
    }
    prompts, result = Prompts(), dict[str, Column]()
    for name, mixture in mixtures.items():
        progress(len(result), len(mixtures), name)
        with nullcontext() if mixture is None else attach(store.transformer, mixture, prompt_rows=first_half):
            result[name] = _column(store, prompts)
    progress(len(result), len(mixtures), "")
    return result


def _column(store: Store, prompts: Prompts) -> Column:
    wanted = [pair for pairs in ROWS.values() for pair in pairs]
    pictures = store.pictures(sample(store.transformer, prompts, [prompt(*pair) for pair in wanted], _SEED))
    right = judge(store.oracle, pictures, wanted).both.float().view(len(ROWS), _EACH).mean(1)
    return Column(pictures[::_EACH], dict(zip(ROWS, right.tolist(), strict=True)))


def tile(picture: Tensor, size: int) -> Image:
    """Convert a picture ``(3, 64, 64)`` in [-1, 1] to a square image of `size` pixels."""
    from PIL import Image

    rgb = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC)


def sheet(columns: Mapping[str, Column], zoom: int = 2) -> Image:
    """Draw all columns side by side, with the prompts on the left and the scores below."""
    canvas = Canvas(density=1)
    cell, left, top, gap, line = 64 * zoom, 150, 34, 6, 17
    below = top + len(ROWS) * (cell + gap) + 4
    for i, (kind, (pair, *_)) in enumerate(ROWS.items()):
        middle = top + i * (cell + gap) + cell / 2
        subject, *rest = prompt(*pair).split(" in ")
        canvas.text(8, middle - 18, subject, size=15)
        canvas.text(8, middle, "in " + " in ".join(rest), size=15)
        canvas.text(8, middle + 22, f"(asks for {kind})", _NOTE)
        canvas.text(8, below + line * (i + 1), kind)
    canvas.text(8, below, f"right, of {_EACH} pictures:", _NOTE)
    for j, (name, column) in enumerate(columns.items()):
        x = left + j * (cell + gap)
        canvas.text(x + cell / 2, top / 2, name, size=15, anchor="mm")
        for i, score in enumerate(column.scores.values()):
            canvas.image(x, top + i * (cell + gap), tile(column.pictures[i], cell))
            colour = _GOOD if score >= 0.75 else _BAD if score < 0.5 else INK
            canvas.text(x + cell / 2, below + line * (i + 1) + 7, f"{round(score * _EACH)}", colour, anchor="mm")
    return canvas.finish(left + len(columns) * (cell + gap), below + line * (len(ROWS) + 1) + 10)


def summary(columns: Mapping[str, Column]) -> str:
    """Summarise the scores in sentences."""

    def count(name: str, kind: str) -> str:
        return f"{round(columns[name].scores[kind] * _EACH)} of {_EACH}"

    alone = f"{count(f'{SUBJECT} LoRA', 'subject')} and {count(f'{STYLE} LoRA', 'style')}"
    lines = [f"Each LoRA alone shows its concept in {alone} pictures."]
    for name in ("sum", "LEGO", "MoLE"):
        lines.append(
            f"{name}: both together in {count(name, 'both')}; the subject alone in {count(name, 'subject')}, the style "
            f"in {count(name, 'style')}; prompts for neither are right in {count(name, 'neither')}."
        )
    return "\n".join(lines)


def run(folder: Path, progress: Progress = lambda *_: None) -> tuple[dict[str, Column], list[Path]]:
    """Run the demonstration and write ``demo.png`` and ``lego.safetensors``; return the columns and the files."""
    result = columns(folder, progress=progress)
    path, part = folder / "demo.png", folder / "demo.part.png"
    sheet(result).save(part)
    part.replace(path)
    return result, [path, folder / "lego.safetensors"]
