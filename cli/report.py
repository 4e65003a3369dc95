"""`legomole inspect --plot`: a report of several LoRAs as a picture or a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..core.errors import LegoMoleError
from ..hosts.names import key_map
from .console import out, progress_bar
from .options import check_free, size_of

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.survey.survey import Survey


def check_plot(path: Path, *, overwrite: bool) -> None:
    """Refuse a picture that could not be written, before any work is done."""
    if path.suffix.lower() not in (".png", ".html"):
        raise typer.BadParameter(f"{path.name}: --plot writes .png or .html.")
    try:
        import PIL  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise LegoMoleError(
            "Pictures need Pillow, which is not installed.", found=error, remedy="pip install 'legomole[plots]'"
        ) from error
    check_free(path, overwrite=overwrite)


def surveyed(paths: Sequence[Path], rank: str | None, *, by_tsne: bool, quiet: bool) -> tuple[Survey, list[Adapter]]:
    """Look at LoRAs together; also gives them, under common names."""
    from ..core.formats import load
    from ..core.formats.file_changes import raise_if_changed
    from ..core.layers.align import align
    from ..core.merge.rank import Rank
    from ..core.survey.survey import survey

    chosen = None if rank is None else Rank.parse(rank)
    with raise_if_changed(paths), progress_bar("looking", quiet=quiet) as progress:
        adapters = align([load(path) for path in paths], key_map=key_map)
        drawn = "tsne" if by_tsne else "pca"
        return survey(adapters, rank=chosen, drawn=drawn, progress=progress), adapters


def write_plot(survey: Survey, adapters: Sequence[Adapter], path: Path) -> None:
    """Write the picture, or the page with the picture in it.

    Raises:
        SaveError: It could not be written.
    """
    from ..core.formats.files import write_bytes
    from ..core.pictures.charts import png
    from ..core.survey.page import page
    from ..core.survey.picture import draw_survey

    if path.suffix.lower() == ".html":
        write_bytes(path, page(survey, adapters).encode(errors="xmlcharrefreplace"))
    else:
        write_bytes(path, png(draw_survey(survey)))


def tell_plot(survey: Survey, path: Path) -> None:
    """Print the summary, and what was written."""
    from ..core.survey.findings import sentences

    out().print("\n".join(sentences(survey)), markup=False)
    out().print(f"wrote {path} ({size_of(path)})", markup=False)
