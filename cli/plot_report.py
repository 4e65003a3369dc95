"""`legomole inspect --plot`: a report of several LoRAs as a picture or an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..core.errors import FormatError, LegoMoleError
from ..hosts.names import key_map
from .console import out, progress_bar
from .options import check_free, size_of

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.survey.survey import Survey


def check_plot(path: Path, *, overwrite: bool) -> None:
    """Raise an error for a plot that could not be written, before any work is done."""
    if path.suffix.lower() not in (".png", ".html"):
        raise typer.BadParameter(f"{path.name}: --plot writes .png or .html.")
    try:
        import PIL  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise LegoMoleError(
            "Plots need Pillow, which is not installed.", found=error, remedy="pip install 'legomole[plots]'"
        ) from error
    check_free(path, overwrite=overwrite)


def survey_files(paths: Sequence[Path], rank: str | None, *, quiet: bool) -> tuple[Survey, list[Adapter]]:
    """Survey the LoRAs in files; also returns them, aligned.

    Args:
        paths: LoRA files or PEFT folders.
        rank: Rank of the LEGO merge in the report.
        quiet: Show no progress bar.
    """
    from ..core.formats.file_changes import raise_if_changed
    from ..core.layers.align import align
    from ..core.merge.rank import Rank
    from ..core.survey.survey import survey

    lego_rank = None if rank is None else Rank.parse(rank)
    with raise_if_changed(paths), progress_bar("comparing", quiet=quiet) as progress:
        adapters = align([_load(path) for path in paths], key_map=key_map)
        return survey(adapters, rank=lego_rank, progress=progress), adapters


def _load(path: Path) -> Adapter:
    """Load a LoRA, also one with NaN or infinity, whose hash is then unknown."""
    from ..core.formats import load

    try:
        return load(path)
    except FormatError:
        return load(path, verify=False)


def write_plot(survey: Survey, adapters: Sequence[Adapter], path: Path) -> None:
    """Write the report as a picture, or as a page that contains the picture.

    Raises:
        SaveError: The file could not be written.
    """
    from ..core.formats.files import write_bytes
    from ..core.pictures.charts import png
    from ..core.survey.page import html_page
    from ..core.survey.picture import draw_survey

    if path.suffix.lower() == ".html":
        write_bytes(path, html_page(survey, adapters).encode(errors="xmlcharrefreplace"))
    else:
        write_bytes(path, png(draw_survey(survey)))


def print_summary(survey: Survey, path: Path) -> None:
    """Print the summary of a survey, and where the plot was written."""
    from ..core.survey.summary import summary_lines

    out().print("\n".join(summary_lines(survey)), markup=False)
    out().print(f"wrote {path} ({size_of(path)})", markup=False)
