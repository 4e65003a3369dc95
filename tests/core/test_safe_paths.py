"""Untrusted file names stay inside their folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from legomole.core.safe_paths import is_inside, is_safe_name


@pytest.mark.parametrize(
    "name", ["merged", "styles/merged", "styles\\merged", "a..b", "%year%/x", "é \U0001f600", ".x"]
)
def test_names_inside(name: str, tmp_path: Path) -> None:
    assert is_safe_name(name)
    assert is_inside(tmp_path, name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../../x", "a/..", "..\\x", "a\\..\\x", "/etc/x", "//host/x", "\\\\host\\share\\x", "\\x",
     "C:\\x", "C:x", "c:/x", "a\0b"],
)  # fmt: skip
def test_names_outside(name: str, tmp_path: Path) -> None:
    assert not is_safe_name(name)
    assert not is_inside(tmp_path, name)


def test_links(tmp_path: Path) -> None:
    """A file below a link out of the folder is refused, one below a link inside the folder is not."""
    folder, other = tmp_path / "loras", tmp_path / "other"
    (folder / "sub").mkdir(parents=True)
    other.mkdir()
    (folder / "out").symlink_to(other, target_is_directory=True)
    (folder / "in").symlink_to(folder / "sub", target_is_directory=True)
    (tmp_path / "linked").symlink_to(folder, target_is_directory=True)
    assert not is_inside(folder, "out/x")
    assert not is_inside(folder, "in/../out/x")
    assert is_inside(folder, "in/x")
    assert is_inside(tmp_path / "linked", "sub/x")


PIECES = st.lists(
    st.sampled_from(["a", "..", ".", "/", "\\", "C:", "out", "link", "", " ", "~", "%2e%2e", "\0"]), max_size=8
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(PIECES)
def test_every_accepted_name_is_inside(tmp_path: Path, pieces: list[str]) -> None:
    folder = tmp_path / "loras"
    if not folder.exists():
        folder.mkdir()
        (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    name = "".join(pieces)
    if is_inside(folder, name):
        assert (folder / name).parent.resolve().is_relative_to(folder.resolve())
        assert (folder / name).absolute() != folder
        assert ".." not in name.replace("\\", "/").split("/")
