"""Find a recipe, and carry it out: from files to the merged adapter with its metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from ..adapter import Adapter, Source
from ..errors import name_some
from ..formats import FORMATS, detect, hashes, load, summarise, weights_of
from ..formats.unchanged import unchanged
from ..json_text import from_json
from ..layers.align import align
from ..layers.keymap import KeyMap
from ..merge.engine import BatchRunner, MergeResult, merge
from ..merge.statistics import Statistics
from ..merge.weights import adapters_matching
from ..progress import Progress
from ..version import __version__
from .metadata import KEY, disagreements, file_metadata
from .recipe import HUB, MAX_TEXT, Input, Recipe, RecipeError, build_method, from_dict, from_text, settings_of
from .remote import RemoteInputs, RemoteRunner


def read_recipe(path: Path, *, to_show: bool = False) -> Recipe:
    """The recipe in a YAML or TOML file, or in the metadata of a merged file or PEFT folder.

    Args:
        path: The file or folder.
        to_show: The recipe will not be carried out: one in metadata, where nobody sees it, may name any paths then.

    Raises:
        RecipeError: There is none, or it is broken. FormatError: The merged file itself is broken.
    """
    kind = {".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}.get(path.suffix.lower())
    if kind is not None:
        try:
            if path.stat().st_size > 4 * MAX_TEXT:  # bytes of a character
                raise ValueError(f"{path.stat().st_size} bytes, too many for a recipe")
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RecipeError("The recipe cannot be read.", file=path, found=str(error)) from None
        return from_text(text, "toml" if kind == "toml" else "yaml", path)
    recipe = recipe_in(summarise(path).metadata, path)
    if recipe is None:
        raise RecipeError(
            "This file was not made by a legomole merge.",
            file=path,
            expected=f"an entry {KEY} in its metadata, or a .yaml or .toml file",
        )
    if not to_show:
        _demand_names(recipe, path)
    return recipe


def _demand_names(recipe: Recipe, file: Path) -> None:
    """Raise unless a recipe that nobody has seen, inside a binary file, stays in that file's folder."""
    paths = [entry.path for entry in recipe.inputs if not entry.path.startswith(HUB)]
    paths += [str(recipe.settings["statistics"])] if "statistics" in recipe.settings else []
    outside = [
        p for p in paths if p in ("", "..") or not p == PurePosixPath(p).name == PureWindowsPath(p).name or "\0" in p
    ]
    if outside:
        raise RecipeError(
            "The recipe in the metadata names files in other folders.",
            file=file,
            expected="names of files beside it, as legomole writes them",
            found=name_some(map(repr, outside), 3),
            remedy="write it out with `legomole inspect --recipe`, look at the paths, and use that file",
        )


def recipe_in(metadata: Mapping[str, str], file: object = None) -> Recipe | None:
    """The recipe in a merged file's metadata, ``None`` if it has none.

    Raises:
        RecipeError: It is broken.
    """
    if KEY not in metadata:
        return None
    try:
        data = from_json(metadata[KEY])["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError("The recipe in the metadata is broken.", file=file, found=str(error)) from None
    return from_dict(data, file)


def run(
    recipe: Recipe,
    *,
    folder: Path = Path(),
    key_map: Callable[[Sequence[Adapter]], KeyMap] | None = None,
    spell: Callable[[Adapter, str], Adapter] | None = None,
    cached: Callable[[str], Path] | None = None,
    device: torch.device | str = "cpu",
    reading: Progress | None = None,
    progress: Progress | None = None,
    spread: RemoteRunner | None = None,
) -> MergeResult:
    """Load the inputs, bring them to common names, merge them.

    The result's metadata tells the whole story, its source the format to save it in.

    Args:
        recipe: What to do.
        folder: Where the recipe's relative paths start.
        key_map: A host's, for inputs whose files name the same layers differently, see `align`.
        spell: The same host's: an adapter under the names that a format needs. With it the result is ready to be
            saved in the format the recipe asks for, and Stable Diffusion LoRAs keep kohya names if the first has
            them; without it names stay as `align` left them.
        cached: A host's: the folder of an adapter's name in the local Hugging Face cache.
        device: Where to compute. progress: See `merge`.
        reading: The same for the inputs: called with (inputs read, inputs in all, path of the last).
        spread: A host's: does the work elsewhere, see `merge`, where the inputs are opened anew.

    Raises:
        RecipeError: An input is not the file the recipe was written for, or the method's settings are wrong.
        FormatError: An input cannot be read. MergeError: They cannot be merged.
    """
    settings = dict(recipe.settings)
    if "statistics" not in settings:  # wrong settings are told before large files are read
        build_method(recipe.method, settings)
    paths = [place(entry.path, folder, cached) for entry in recipe.inputs]
    statistics = folder / str(settings["statistics"]) if "statistics" in settings else None
    inputs = paths if statistics is None else [*paths, statistics]
    with unchanged(inputs), hashes.hash_in_background([weights_of(path) for path in paths]) as hashed:
        adapters: list[Adapter] = []
        for entry, path in zip(recipe.inputs, paths, strict=True):
            adapters.append(_load(entry, path, recipe.convert_rank))
            if reading is not None:
                reading(len(adapters), len(recipe.inputs), entry.path)
        # hashes that only the metadata tells are waited for after the merge
        asked = statistics is not None or spread is not None or any(entry.sha256 for entry in recipe.inputs)
        if asked:
            adapters = _identified(recipe, paths, adapters, hashed)
        if statistics is not None:
            settings["statistics"] = Statistics.load(statistics).of(adapters)
            found = hashes.sha256(statistics)
            _check_hash(statistics, recipe.statistics_sha256, found)
            recipe = recipe.model_copy(update={"statistics_sha256": found})
        method = build_method(recipe.method, settings)
        aligned = align(adapters, key_map=key_map)
        translated = any(before is not after for before, after in zip(adapters, aligned, strict=True))
        each: BatchRunner | None = None
        if spread is not None:
            each = partial(
                spread, RemoteInputs.of(adapters, [*map(Path.absolute, paths)], recipe.convert_rank, key_map)
            )
        result = merge(
            aligned,
            method,
            [entry.weight for entry in recipe.inputs],
            text_encoder_weights=[
                entry.weight if entry.text_encoder_weight is None else entry.text_encoder_weight
                for entry in recipe.inputs
            ],
            module_weights=_module_weights(recipe, aligned),
            normalize=recipe.normalize,
            dtype=None if recipe.dtype is None else getattr(torch, recipe.dtype),
            device=device,
            progress=progress,
            each=each,
        )
        if not asked:
            adapters = _identified(recipe, paths, adapters, hashed)
    done = recipe.model_copy(update={"legomole": __version__, "settings": recipe.settings | settings_of(method)})
    notes = [*result.report.notes, *disagreements(adapters)]
    if translated and result.adapter.extras:
        notes.append(
            f"{len(result.adapter.extras)} tensors that are carried along keep their file's names, unlike the layers: "
            f"{name_some(sorted(result.adapter.extras))}"
        )
    if recipe.legomole != __version__:
        notes.append(
            f"the recipe was written by legomole {recipe.legomole}, this is {__version__}: "
            'see "Results change" in the CHANGELOG'
        )
    report = dataclasses.replace(result.report, notes=tuple(notes))
    metadata = file_metadata(done, report, adapters)
    first, merged, format = adapters[0].source.format, result.adapter, recipe.format
    if format is None and spell is not None and _wants_kohya(first, merged):
        format = "kohya"
    if format is None:
        format = _format(first, merged, translated)
    elif spell is not None:
        merged = spell(merged, format)
    return MergeResult(dataclasses.replace(merged, metadata=metadata, source=Source(format=format)), report)


_BARE_UNET = ("down_blocks.", "mid_block.", "up_blocks.")


def _wants_kohya(first: str, merged: Adapter) -> bool:
    """Whether a Stable Diffusion LoRA under diffusers' names should rather have kohya's.

    Those are read by every program, diffusers' names by diffusers, bare ones by none.
    """
    starts = ("unet.", *_BARE_UNET) if first == "kohya" else _BARE_UNET
    known = all(name.startswith(("unet.", "text_encoder.", "text_encoder_2.", *_BARE_UNET)) for name in merged.modules)
    return known and any(name.startswith(starts) for name in merged.modules)


def _format(first: str, merged: Adapter, translated: bool) -> str:
    """The first input's format if it can say the merged names, else one that can.

    Names a host has translated are its own, whatever the first format could say too; ``comfy`` says any, also those
    of several dialects in one file, which its readers look up one by one.
    """
    names = merged.layers
    if not translated and all(FORMATS[first].carries(name) for name in names):
        return first
    own = detect(names)
    return own if all(FORMATS[own].fits(name) for name in names) else "comfy"


def place(path: str, folder: Path, cached: Callable[[str], Path] | None) -> Path:
    """Where an input of a recipe lies.

    Args:
        path: As the recipe has it. folder: Where the recipe's relative paths start. cached: See `run`.

    Raises:
        RecipeError: A name of the Hugging Face Hub, and no host to look it up. FormatError: The host's.
    """
    if not path.startswith(HUB):
        return folder / path
    if cached is None:
        raise RecipeError("Adapters of the Hugging Face cache are merged on the command line only.", file=path)
    return cached(path.removeprefix(HUB))


def _load(entry: Input, path: Path, convert_rank: int | None) -> Adapter:
    adapter = load(path, convert_rank=convert_rank, known=True)
    # the folder in the cache is called after a commit
    return adapter.sourced(path=entry.path) if entry.path.startswith(HUB) else adapter


def _identified(
    recipe: Recipe, paths: Sequence[Path], adapters: Sequence[Adapter], hashed: Sequence[Future[str]]
) -> list[Adapter]:
    """The inputs with their files' hashes, which must be those of the recipe."""
    for entry, path, found in zip(recipe.inputs, paths, hashed, strict=True):
        _check_hash(path, entry.sha256, found.result())
    return [adapter.sourced(sha256=found.result()) for adapter, found in zip(adapters, hashed, strict=True)]


def _check_hash(path: Path, wanted: str, found: str) -> None:
    if wanted and found != wanted:
        raise RecipeError(
            "An input is not the file this recipe was written for.",
            file=path,
            expected=f"sha256 {wanted}",
            found=f"sha256 {found}",
            remedy="find the original file, or remove the sha256 from the recipe to use this one",
        )


def _module_weights(recipe: Recipe, adapters: Sequence[Adapter]) -> list[dict[str, float]]:
    """Patterns per adapter: its own, and of those meant for all the ones it has modules for."""
    tables = [dict(entry.module_weights) for entry in recipe.inputs]
    for pattern, factor in recipe.module_weights.items():
        for i in adapters_matching(pattern, adapters) or [0]:  # nobody has them: let merge() refuse the pattern
            tables[i][pattern] = tables[i].get(pattern, 1.0) * factor
    return tables
