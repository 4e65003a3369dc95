"""Report what is missing in pyproject.toml before a release: addresses that only the owner of the repository knows.

Usage: python .github/check_release.py [tag]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).parents[1]
_URLS = ("Repository", "Documentation", "Bug Tracker")


def problems(project: dict[str, Any], version: str, tag: str | None = None) -> list[str]:
    """Return what must be changed, one sentence each.

    Args:
        project: The contents of pyproject.toml.
        version: The package's version.
        tag: The tag that is released, e.g. ``v0.1.0``.
    """
    found: list[str] = []
    urls, comfy = project["project"].get("urls", {}), project["tool"]["comfy"]
    for name in _URLS:
        if not str(urls.get(name, "")).startswith("https://"):
            found.append(f'[project.urls] needs "{name}" = "https://.."')
    for name, file in (("Icon", "icon.png"), ("Banner", "banner.png")):
        if not str(comfy.get(name, "")).startswith("https://"):
            found.append(f"[tool.comfy] needs {name} = the address of docs/images/{file} in the repository")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", comfy.get("PublisherId", "")):
        found.append("[tool.comfy] needs PublisherId = your id at the registry")
    if tag is not None and tag != f"v{version}":
        found.append(f"the tag is {tag}, and core/__init__.py has version {version}")
    return found


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = re.search(r'__version__ = "(.+)"', (ROOT / "core" / "__init__.py").read_text())
    assert version is not None
    found = problems(project, version[1], *sys.argv[1:2])
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
