"""Find the recipe in a recipe file or in the metadata of a merged file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import name_some
from ..formats import summarise
from ..json_text import from_json
from .metadata import KEY
from .recipe import HUB_PREFIX, Recipe, RecipeError
from .text import MAX_CHARACTERS, recipe_from_data, recipe_from_text


def read_recipe(path: Path, *, allow_any_path: bool = False) -> Recipe:
    """Read the recipe in a YAML or TOML file, or in the metadata of a merged file or PEFT folder.

    Args:
        path: File or folder.
        allow_any_path: Accept a recipe in metadata whose inputs lie in other folders. Pass ``True`` only to show the
            recipe: nobody sees the paths in a binary file before they are opened.

    Raises:
        RecipeError: No recipe, or a broken one.
        FormatError: The merged file itself is broken.
    """
    kind = {".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}.get(path.suffix.lower())
    if kind is not None:
        try:
            if path.stat().st_size > 4 * MAX_CHARACTERS:  # a character has at most 4 bytes
                raise ValueError(f"{path.stat().st_size} bytes, too many for a recipe")
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RecipeError("The recipe cannot be read.", file=path, found=str(error)) from None
        return recipe_from_text(text, "toml" if kind == "toml" else "yaml", path)
    recipe = recipe_in(summarise(path).metadata, path)
    if recipe is None:
        raise RecipeError(
            "This file was not made by a legomole merge.",
            file=path,
            expected=f"an entry {KEY} in its metadata, or a .yaml or .toml file",
        )
    if not allow_any_path:
        _check_paths_are_names(recipe, path)
    return recipe


def recipe_in(metadata: Mapping[str, str], file: object = None) -> Recipe | None:
    """Return the recipe in a merged file's metadata, ``None`` if it has none.

    Raises:
        RecipeError: The recipe is broken.
    """
    if KEY not in metadata:
        return None
    try:
        data = from_json(metadata[KEY])["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError("The recipe in the metadata is broken.", file=file, found=str(error)) from None
    return recipe_from_data(data, file)


def _check_paths_are_names(recipe: Recipe, file: Path) -> None:
    """Raise RecipeError unless all paths of a recipe are plain file names."""
    paths = [entry.path for entry in recipe.inputs if not entry.path.startswith(HUB_PREFIX)]
    paths += [str(recipe.settings["statistics"])] if "statistics" in recipe.settings else []
    paths += [recipe.base] if recipe.base is not None else []
    outside = [
        p for p in paths if p in ("", "..") or not p == PurePosixPath(p).name == PureWindowsPath(p).name or "\0" in p
    ]
    if outside:
        raise RecipeError(
            "The recipe in the metadata names files in other folders.",
            file=file,
            expected="names of files in the same folder, as legomole writes them",
            found=name_some(map(repr, outside), 3),
            remedy="write the recipe out with `legomole inspect --recipe`, check its paths, and use that file",
        )
