"""What a release needs: the check of pyproject.toml, the workflows of the repository, icon and banner."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")


def script(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the release check runs on Python 3.12")
def test_the_check_names_every_address_that_is_missing(project: dict[str, Any]) -> None:
    problems = script(".github/check_release.py").problems
    complete = {**project, "project": {**project["project"]}, "tool": {"comfy": {**project["tool"]["comfy"]}}}
    urls = ("Repository", "Documentation", "Bug Tracker")
    complete["project"]["urls"] = dict.fromkeys(urls, "https://example.org")
    complete["tool"]["comfy"] |= {"Icon": "https://example.org/icon.png", "Banner": "https://example.org/banner.png"}
    assert problems(complete, "1.2.3", "v1.2.3") == []
    assert problems(complete, "1.2.3", "v1.2.4") == ["the tag is v1.2.4, and core/__init__.py has version 1.2.3"]
    for name in urls:
        changed = {**complete["project"]["urls"]}
        del changed[name]
        (problem,) = problems({**complete, "project": {"urls": changed}}, "1.2.3")
        assert f'"{name}"' in problem
    for name, value in (("Icon", ""), ("Banner", "banner.png"), ("PublisherId", "Not an id")):
        (problem,) = problems({**complete, "tool": {"comfy": {**complete["tool"]["comfy"], name: value}}}, "1.2.3")
        assert f"needs {name} " in problem


def test_workflows_test_supported_pythons_and_publish_tags_only_after_the_check(project: dict[str, Any]) -> None:
    test, publish = (yaml.safe_load((ROOT / f".github/workflows/{n}.yml").read_text()) for n in ("test", "publish"))
    pythons = test["jobs"]["test"]["strategy"]["matrix"]["python"]
    classifiers = project["project"]["classifiers"]
    assert len(pythons) == 3
    assert all(f"Programming Language :: Python :: {python}" in classifiers for python in pythons)
    assert f">={pythons[0]}" == project["project"]["requires-python"]
    assert publish[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as a boolean
    assert {name: job.get("needs") for name, job in publish["jobs"].items()} == {
        "check": None, "pypi": "check", "registry": "check",
    }  # fmt: skip


def test_issue_forms_ask_for_report_and_versions() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    required = {field["id"] for field in form["body"] if field.get("validations", {}).get("required")}
    assert {"report", "versions"} <= required


def test_icon_and_banner_are_those_of_the_script(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    script("docs/images/brand.py").draw(tmp_path)
    for name, size in (("icon.png", (400, 400)), ("banner.png", (1400, 600))):
        with image.open(tmp_path / name) as drawn, image.open(ROOT / "docs" / "images" / name) as shipped:
            assert drawn.size == shipped.size == size
            assert drawn.tobytes() == shipped.tobytes()


def test_ignored_folders_hold_no_module_of_the_package(project: dict[str, Any]) -> None:
    """`.comfyignore` leaves out what the node pack does not need."""
    ignored = (ROOT / ".comfyignore").read_text().split()
    packages = [name.removeprefix("legomole.") for name in project["tool"]["setuptools"]["packages"]]
    assert all(re.fullmatch(r"[.\w]+/", name) and (ROOT / name).is_dir() for name in ignored)
    assert not [name for name in packages if f"{name.split('.')[0]}/" in ignored]
