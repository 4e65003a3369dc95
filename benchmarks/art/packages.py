"""Emoji as SVG from npm packages, by code point."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ..common import write

_LABELS = "emojibase-data"
VERSIONS = {
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/openmoji": "1.2.29",
    "@iconify-json/emojione-monotone": "1.2.1",
    _LABELS: "17.0.0",
}
"""Package -> version; all hands draw every subject of `words`."""

LICENCES = frozenset({"MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0"})
_SIZE = 96
_INK = "#202020"  # colour of drawings that leave theirs open


def fetch(folder: Path) -> None:
    """Download and unpack the packages, and write ``licences.json``; finished ones are kept.

    Raises:
        ValueError: A package has a licence that is not in `LICENCES`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    licences: dict[str, dict[str, str]] = {}
    for name, version in VERSIONS.items():
        target = folder / name.replace("/", "+")
        if not target.exists():
            done = subprocess.run(
                ["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True, capture_output=True, text=True
            )
            part = target.with_suffix(".part")
            with tarfile.open(folder / done.stdout.split()[-1]) as archive:
                archive.extractall(part, filter="data")
            part.replace(target)
        licence = json.loads((target / "package/package.json").read_text())["license"]
        if licence not in LICENCES:
            raise ValueError(f"{name}: licence {licence}")
        info = target / "package/info.json"
        author = json.loads(info.read_text())["author"] if info.exists() else {"name": "Miles Johnson"}
        licences[name] = {
            "version": version,
            "licence": licence,
            "author": author["name"],
            "url": author.get("url", ""),
        }
    write(folder / "licences.json", licences)


@cache
def code_points(folder: Path) -> dict[str, str]:
    """Return label -> code points as in the packages' ``chars.json``."""
    data = json.loads((folder / _LABELS / "package/en/data.json").read_text())
    return {entry["label"]: entry["hexcode"].lower().replace("-fe0f", "") for entry in data}


@dataclass(frozen=True)
class Hand:
    """The drawings of one package.

    Args:
        folder: Folder of `fetch`.
        package: Name of the package.
    """

    folder: Path
    package: str

    @cached_property
    def _icons(self) -> dict[str, Any]:
        return self._read("icons.json")

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / self.package.replace("/", "+") / "package" / name
        return json.loads(path.read_text()) if path.exists() else {}

    @cached_property
    def names(self) -> dict[str, str]:
        """Code points -> name of the drawing; empty for packages without ``chars.json``."""
        return self._read("chars.json")

    def svg(self, label: str) -> str:
        """Return the drawing with this label as an SVG document.

        Raises:
            KeyError: The package has no such drawing.
        """
        code = code_points(self.folder)[label]
        slug = re.sub("[^a-z0-9]+", "-", label.lower()).strip("-")
        others = [names.get(code, slug) for names in _all_names(self.folder)]
        aliases, icons = self._icons.get("aliases", {}), self._icons["icons"]
        for name in dict.fromkeys([self.names.get(code, slug), *others, *(f"{name}-face" for name in others)]):
            while name in aliases:
                name = aliases[name]["parent"]
            if name in icons:
                return _document({**self._icons, **icons[name]})
        raise KeyError(f"{self.package}: {label}")


@cache
def _all_names(folder: Path) -> list[dict[str, str]]:
    return [Hand(folder, package).names for package in VERSIONS if package != _LABELS]


def _document(icon: dict[str, Any]) -> str:
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", 16), icon.get("height", 16)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{_SIZE}" height="{_SIZE}" viewBox="{left} {top} {width} {height}" color="{_INK}">{icon["body"]}</svg>'
    )
