"""The cases: pairs of dialects merged, single ones converted and compressed, all from LoRAs whose changes are known."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from legomole.core import formats
from legomole.core.adapter import Adapter
from legomole.core.errors import LegoMoleError
from legomole.core.formats.suffixes import classify
from legomole.core.layers.align import align
from legomole.core.layers.families.table import Component, Dialect, Family, Reader
from legomole.core.layers.readers import Weight, targets_in, weights_of
from legomole.core.layers.regroup import regroup
from legomole.core.layers.resolve import resolve
from legomole.core.lowrank import LowRank
from legomole.core.recipes.method_settings import build_method
from legomole.core.recipes.output import name_output
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.run import describe, merge_aligned
from safetensors.torch import load_file
from torch import Tensor

from .models import BY_NAME, MODELS, shapes

RANK = 2
TOLERANCE = 1e-4  # relative; ComfyUI computes in float32
Deltas = Mapping[str, Tensor]  # canonical module -> change of its weight


@dataclass(frozen=True)
class Spelling:
    """How a file of one family names its layers.

    Args:
        name: For reports, e.g. ``lora_unet_ native``.
        dialects: One for each component that the file has.
    """

    name: str
    dialects: Mapping[Component, Dialect]


@dataclass(frozen=True)
class Case:
    """One file to be read, and what should be in it.

    Args:
        family: Name of the family.
        what: Operation and dialects, e.g. ``concat: lora_unet_ native + transformer. diffusers``.
        path: The file.
        truth: The changes that it should make.
        kind: ``read``, ``merge``, ``compress``, or the program for which it was converted.
        reader: Program that reads it, ``""`` for files that no program reads here.
        refused: The error's first line, where the operation was refused.
    """

    family: str
    what: str
    path: Path
    truth: Deltas
    kind: str = "merge"
    reader: str = "comfy"
    refused: str = ""


def spellings(family: Family) -> list[Spelling]:
    """All spellings of a family's diffusion model, each with its text encoders as the same programs spell them."""
    result: list[Spelling] = []
    for dialect in family.model.dialects:
        dialects: dict[Component, Dialect] = {}
        for component in (family.model, *family.encoders[:2]):
            options = sorted(
                component.dialects,
                key=lambda d: (d.flat != dialect.flat, len(d.readers ^ dialect.readers), d.prefix),
            )
            dialects[component] = dialect if component is family.model else options[0]
        result.append(Spelling(f"{dialect.prefix or '(none)'} {dialect.naming or 'native'}", dialects))
    return result


def lora(family: Family, spelling: Spelling, seed: int, reader: Reader | None = None) -> tuple[Adapter, Deltas]:
    """A random LoRA in a spelling, and its changes; of layers for which there are names that the reader reads."""
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, LowRank] = {}
    for name, (d_out, d_in) in shapes(family).items():
        A = torch.randn(RANK, d_in, generator=generator)
        modules[name] = LowRank(A, torch.randn(d_out, RANK, generator=generator), RANK / 2)
    canonical = Adapter(modules)
    resolution = resolve([canonical])
    assert resolution is not None
    targets = {}
    kept: dict[str, LowRank] = {}
    for weight in weights_of([canonical], resolution.positions):
        dialect = spelling.dialects.get(weight.component)
        names = [] if dialect is None else targets_in(dialect, weight, reader)
        covered = sum(target.stop - target.start for target in names)
        if covered:  # XLabs' names mean some rows only
            part = modules[weight.key]
            if covered < weight.total:
                B = torch.zeros_like(part.B)
                for target in names:
                    B[target.start : target.stop] = part.B[target.start : target.stop]
                part = LowRank(part.A, B, part.alpha)
            kept[weight.key] = part
            targets[weight.key] = names
    truth = {name: part.delta() for name, part in kept.items()}
    renamed = regroup(Adapter(kept), resolution.positions, targets)
    return renamed, truth


def write(adapter: Adapter, path: Path, spelling: Spelling) -> Adapter:
    """The adapter as read from a file in the format that its programs write."""
    flat = all("." not in name for name in adapter.modules)
    dotted = "diffusers" if spelling.name.startswith(("transformer.", "unet.")) else "comfy"
    format = "kohya" if flat else dotted
    names = formats.FORMATS[format]
    if not all(names.can_store_name(name) for name in adapter.modules):
        format = "comfy"
    return formats.load(formats.save(adapter, path, format=format))


def merge_all(
    family: Family, folder: Path, *, every_pair: bool, only: Callable[[str], bool] = lambda what: True
) -> Iterator[Case]:
    """All cases of a family: files are written into `folder`."""
    written: list[tuple[Spelling, Adapter, Deltas]] = []
    for i, spelling in enumerate(spellings(family)):
        adapter, truth = lora(family, spelling, seed=i)
        if truth:
            path = folder / f"{family.name}-{i}.safetensors"
            written.append((spelling, write(adapter, path, spelling), truth))
            if all("comfy" in dialect.readers for dialect in spelling.dialects.values()):
                adapter, truth = lora(family, spelling, seed=i, reader="comfy")
                path = folder / f"{family.name}-{i}-read.safetensors"
                write(adapter, path, spelling)
                yield Case(family.name, f"read: {spelling.name}", path, truth, "read")
    number = 0
    for i, first in enumerate(written):
        for j, second in enumerate(written):
            if i == j or (not every_pair and i != 0 and j != 0 and (i + j) % len(written) != 1):
                continue
            for method in ("concat", "svd") if i == 0 or j == 0 else ("concat",):
                what = f"{method}: {first[0].name} + {second[0].name}"
                if only(what):
                    number += 1
                    yield _merged(family, method, [first, second], folder / f"{family.name}-m{number}", what, None)
        for reader in ("comfy", "diffusers", "kohya"):
            what = f"convert for {reader}: {first[0].name}"
            if only(what):
                number += 1
                yield from _converted(family, first, reader, folder / f"{family.name}-m{number}", what)
        what = f"compress: {first[0].name}"
        if only(what):
            number += 1
            yield _merged(family, "svd", [first], folder / f"{family.name}-m{number}", what, "comfy")


_Written = tuple[Spelling, Adapter, Deltas]


def _merged(family: Family, method: str, inputs: Sequence[_Written], path: Path, what: str, reader: Any) -> Case:
    truth: dict[str, Tensor] = {}
    for _, _, deltas in inputs:
        for name, delta in deltas.items():
            truth[name] = truth[name] + delta if name in truth else delta
    adapters = [adapter for _, adapter, _ in inputs]
    kind = "merge" if len(inputs) > 1 else "compress"
    rank = {} if method == "concat" else {"rank": "100%"}
    recipe = Recipe(
        method=method, settings=rank, reader=reader, inputs=[Input(path=adapter.source.path) for adapter in adapters]
    )
    try:
        aligned = align(adapters)
        renamed = any(before is not after for before, after in zip(adapters, aligned, strict=True))
        chosen = build_method(method, rank)
        result = describe(recipe, chosen, merge_aligned(recipe, chosen, aligned), adapters, renamed=renamed)
        merged, format = result.adapter, result.adapter.source.format
        if not renamed:  # the inputs agree on names that ComfyUI may not read
            merged, format = name_output(merged, first_format=format, inputs=adapters, reader="comfy")
        return Case(family.name, what, formats.save(merged, path, format=format), truth, kind)
    except LegoMoleError as error:
        return Case(family.name, what, path, truth, kind, refused=str(error).splitlines()[0])


def _converted(family: Family, original: _Written, reader: Any, path: Path, what: str) -> Iterator[Case]:
    _, adapter, truth = original
    # layers for which the reader has no name (T5, projections of text encoders) are left out
    truth = {name: delta for name, delta in truth.items() if _has_name(family, name, reader)}
    positions = {name: family.find(name) for name in adapter.modules}
    kept = {
        name: part
        for name, part in adapter.modules.items()
        if (hit := positions[name]) and _has_name(family, hit[0].root + hit[1], reader)
    }
    adapter = replace(adapter, modules=kept)
    try:
        named, format = name_output(adapter, first_format=adapter.source.format, reader=reader)
        there = formats.load(formats.save(named, path, format=format))
        yield Case(family.name, what, Path(there.source.path), truth, reader, "" if reader == "kohya" else reader)
        back, format = name_output(there, first_format=there.source.format, reader="comfy")
        saved = formats.save(back, path.with_name(f"{path.name}-back"), format=format)
        yield Case(family.name, f"{what}, and back for comfy", saved, truth, reader)
    except LegoMoleError as error:
        yield Case(family.name, what, path, truth, reader, refused=str(error).splitlines()[0])


def _has_name(family: Family, name: str, reader: str) -> bool:
    """Whether the reader has names for a canonical module."""
    component = next(component for component in family.components if name.startswith(component.root))
    return any(
        component.slots(dialect.naming, name.removeprefix(component.root))
        for dialect in component.dialects
        if reader in dialect.readers
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def read_by_comfyui(cases: Sequence[Case], folder: Path, comfy: Path, python: Path) -> list[str]:
    """Compare each case with what ComfyUI reads; all in one process. Returns descriptions of wrong cases."""
    models = {}
    for name in {case.family for case in cases}:
        all_shapes = shapes(BY_NAME[name])
        models[name] = {
            "cls": MODELS[name].cls,
            "config": dict(MODELS[name].config),
            "weights": {f"{key}.weight": s for key, s in all_shapes.items() if key.startswith("diffusion_model.")},
            "clip": {
                f"{key.removeprefix('text_encoders.')}.weight": s
                for key, s in all_shapes.items()
                if key.startswith("text_encoders.")
            },
        }
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps({"models": models, "files": [(str(case.path), case.family) for case in cases]}))
    script = Path(__file__).with_name("comfy_reader.py")
    done = subprocess.run([python, script, comfy, jobs], capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    wrong: list[str] = []
    for case in cases:
        read = {
            (key if key.startswith("diffusion_model.") else f"text_encoders.{key}").removesuffix(".weight"): tensor
            for key, tensor in load_file(f"{case.path}.read").items()
        }
        difference = compare(read, case.truth)
        lost = json.loads(Path(f"{case.path}.lost").read_text())
        if difference or lost:
            wrong.append(f"{case.family}, {case.what}: {difference} {lost[:2]}")
    return wrong


def compare(read: Deltas, truth: Deltas) -> str:
    """An empty text if the changes are equal, else the first difference."""
    for name in sorted(read.keys() | truth.keys()):
        want = truth.get(name)
        have = read.get(name)
        if want is None or have is None:
            if (have if want is None else want).any():  # type: ignore[union-attr]
                return f"{name} is {'not read' if have is None else 'changed though it should not be'}"
        elif have.shape != want.shape or float((have - want).norm()) > TOLERANCE * float(want.norm()):
            return f"{name} is wrong by {float((have - want).norm() / want.norm()):.2g}"
    return ""


def read_by_diffusers(cases: Sequence[Case]) -> list[str]:
    """Compare files for diffusers with what its loaders read. Returns descriptions of wrong cases."""
    from diffusers.loaders import lora_pipeline

    wrong: list[str] = []
    for case in cases:
        loader = MODELS[case.family].loader
        if not loader:
            continue
        try:
            result = getattr(lora_pipeline, loader).lora_state_dict(
                load_file(case.path), unet_config=SimpleNamespace(layers_per_block=2)
            )
        except Exception as error:  # loaders raise anything
            wrong.append(f"{case.family}, {case.what}, diffusers: {error}")
            continue
        tensors = result[0] if isinstance(result, tuple) else result
        read = {module: tensors[keys["up"]] @ tensors[keys["down"]] for module, keys in classify(tensors)[0].items()}
        difference = compare(read, _in_diffusers(case))
        if difference:
            wrong.append(f"{case.family}, {case.what}, diffusers: {difference}")
    return wrong


def _in_diffusers(case: Case) -> dict[str, Tensor]:
    """The true changes under the names of diffusers' models."""
    result: dict[str, Tensor] = {}
    family = BY_NAME[case.family]
    for name, delta in case.truth.items():
        component = next(c for c in family.components if name.startswith(c.root))
        path = name.removeprefix(component.root)
        weight = Weight(component, path, delta.shape[0], delta.shape[1], ((0, delta.shape[0]),), False)
        dialect = next(d for d in component.dialects if "diffusers" in d.readers)
        for target in targets_in(dialect, weight):
            rows = delta[target.start : target.stop]
            result[target.name] = rows.roll(len(rows) // 2, 0) if target.swapped else rows
    return result
