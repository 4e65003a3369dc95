"""The licences of all that an installation brings, as the installed packages state them; nobody is asked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .versions import EXTRAS, declared

# Licences that a program under Apache-2.0 may ask for: none of them reaches over to the program that imports.
_FREE = re.compile(
    r"apache|\bbsd\b|\bmit\b|\bisc\b|\bpsf\b|python software foundation|\bmpl\b|mozilla|unlicense|0bsd|zlib|"
    r"\bhpnd\b|historical permission|\bcc0\b|public domain",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Licence:
    """What a package says of itself.

    Args:
        says: Its licence; ``""`` where it names none.
    """

    package: str
    version: str
    says: str

    @property
    def known(self) -> bool:
        return bool(_FREE.search(self.says)) and not re.search(r"\bA?GPL", self.says)


def licences(extras: Iterable[str] = EXTRAS) -> tuple[list[Licence], list[str]]:
    """Of everything that the core and the extras need, and those packages need in turn.

    Returns:
        The licences by package, and what is declared but not installed.
    """
    found: dict[str, Licence] = {}
    missing: list[str] = []
    waiting = declared(extras)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name in missing or not _applies(requirement):
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        found[name] = Licence(name, installed.version, _stated(installed))
        for text in installed.requires or []:
            inner = Requirement(text)
            if _applies(inner, requirement.extras):
                waiting.append(inner)
    return [found[name] for name in sorted(found)], sorted(missing)


def _applies(requirement: Requirement, extras: Iterable[str] = ()) -> bool:
    """Whether a requirement counts here: its marker holds, for one of the extras or without any."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, ""))


def _stated(installed: Distribution) -> str:
    """The SPDX expression, else the classifiers, else the first line of the old field."""
    told = installed.metadata
    expression = told.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = [
        line.rpartition(" :: ")[2] for line in told.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    old = (told.get("License") or "").strip().splitlines()
    return ", ".join(classifiers) or (old[0] if old else "")


def text(found: Iterable[Licence], missing: Iterable[str]) -> str:
    """For people: the packages by licence, then those to look at."""
    by_licence: dict[str, list[str]] = {}
    odd: list[str] = []
    for licence in found:
        by_licence.setdefault(licence.says or "none stated", []).append(f"{licence.package} {licence.version}")
        if not licence.known:
            odd.append(f"{licence.package} {licence.version}: {licence.says or 'none stated'}")
    lines = [f"{says}: {', '.join(packages)}" for says, packages in sorted(by_licence.items())]
    lines += [f"{sum(map(len, by_licence.values()))} packages, {len(odd)} to look at", *odd]
    return "\n".join([*lines, *(f"not installed here: {name}" for name in missing)])
