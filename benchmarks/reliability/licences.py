"""Licences of all dependencies, as the installed packages state them; nothing is looked up online."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .versions import EXTRAS, declared

# licences compatible with Apache-2.0: none of them extends to the program that imports the package
_FREE = re.compile(
    r"apache|\bbsd\b|\bmit\b|\bisc\b|\bpsf\b|python software foundation|\bmpl\b|mozilla|unlicense|0bsd|zlib|"
    r"\bhpnd\b|historical permission|\bcc0\b|public domain",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Licence:
    """Licence of a package.

    Args:
        text: Licence as the package states it; ``""`` if it states none.
    """

    package: str
    version: str
    text: str

    @property
    def is_free(self) -> bool:
        return bool(_FREE.search(self.text)) and not re.search(r"\bA?GPL", self.text)


def licences(extras: Iterable[str] = EXTRAS) -> tuple[list[Licence], list[str]]:
    """Return the licences of all dependencies of the core and some extras, including indirect ones.

    Returns:
        Licences, and names of declared packages that are not installed.
    """
    by_name: dict[str, Licence] = {}
    missing: list[str] = []
    waiting = declared(extras)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in by_name or name in missing or not _applies(requirement):
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        by_name[name] = Licence(name, installed.version, _stated(installed))
        for text in installed.requires or []:
            inner = Requirement(text)
            if _applies(inner, requirement.extras):
                waiting.append(inner)
    return [by_name[name] for name in sorted(by_name)], sorted(missing)


def _applies(requirement: Requirement, extras: Iterable[str] = ()) -> bool:
    """Whether the marker of a requirement holds here, without extras or for one of them."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, ""))


def _stated(installed: Distribution) -> str:
    """Return the SPDX expression, else the classifiers, else the first line of the old field."""
    metadata = installed.metadata
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = [
        line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    old = (metadata.get("License") or "").strip().splitlines()
    return ", ".join(classifiers) or (old[0] if old else "")


def text(licences: Iterable[Licence], missing: Iterable[str]) -> str:
    """Format the packages by licence, and then those with unknown licences."""
    by_licence: dict[str, list[str]] = {}
    odd: list[str] = []
    for licence in licences:
        by_licence.setdefault(licence.text or "none stated", []).append(f"{licence.package} {licence.version}")
        if not licence.is_free:
            odd.append(f"{licence.package} {licence.version}: {licence.text or 'none stated'}")
    lines = [f"{text}: {', '.join(packages)}" for text, packages in sorted(by_licence.items())]
    lines += [f"{sum(map(len, by_licence.values()))} packages, {len(odd)} to look at", *odd]
    return "\n".join([*lines, *(f"not installed here: {name}" for name in missing)])
