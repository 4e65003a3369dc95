"""LoRAs as ComfyUI reads and applies them: its key maps, its loader, its patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.weight_adapter
import torch
from torch import Tensor

from ...core import formats
from ...core.adapter import Adapter, Source, check_finite, is_text_encoder
from ...core.errors import FormatError, MergeError, name_some
from ...core.formats import files
from ...core.formats.hashes import sha256
from ...core.layers.keymap import ParameterSlice, rename
from ...core.lowrank import LowRank, best_rank_k
from ..loaded_loras import LoadedLoras
from ..lora import Lora
from .patches import Names, Sites, Target, common_names, fuse_unnamed, kind_of, low_rank, parts, place
from .program import progress

# Adapters whose update does not depend on the weight they act on, so that it can be computed on zeros.
_ADDITIVE = ("lora", "loha", "lokr")


def read(loras: Sequence[Lora], model: Any, clip: Any) -> LoadedLoras:
    """Read LoRAs through ComfyUI's own key maps and loader: whatever it can load into `model` can be merged.

    Args:
        model: A MODEL. clip: A CLIP or ``None``; without it text encoder layers cannot be placed.

    Raises:
        MergeError: A LoRA of another base model, or updates that are not low rank and may not be converted.
        FormatError: A file that cannot be read.
    """
    host = _Host(model, clip)
    sites = [host.sites(lora) for lora in loras]
    common = common_names({name: at for site in sites for name, at in site.places.items()}, host.names, host.rows)
    names, rows = host.names, host.rows
    return LoadedLoras(
        [rename(site.adapter(), common.key_map) for site in sites],
        tuple(line for site in sites for line in site.dropped),
        tuple(line for site in sites for line in site.notes),
        lambda adapter: fuse_unnamed(adapter, common, names, rows),  # holds no model
        common.places,
    )


class _Host:
    """The connected model: what ComfyUI calls its layers, and their weights."""

    def __init__(self, model: Any, clip: Any) -> None:
        self.key_map: dict[str, Target] = comfy.lora.model_lora_keys_unet(model.model, {})
        self._patchers = [model]
        if clip is not None:
            comfy.lora.model_lora_keys_clip(clip.cond_stage_model, self.key_map)
            self._patchers.append(clip.patcher)
        self.clip = clip
        self.names = Names(self.key_map)
        self._weights: dict[str, Tensor] = {}
        for patcher in self._patchers:
            self._weights.update(patcher.model_state_dict())
        heights = {key: weight.shape[0] for key, weight in self._weights.items() if weight.ndim}
        self.rows = heights.__getitem__  # outlives the model, see `again`

    def sites(self, lora: Lora) -> Sites:
        """Read one LoRA; every key of it ends up merged, carried or in `dropped`."""
        state_dict, metadata = open_lora(lora)
        source = _source(lora, state_dict)
        given = comfy.lora_convert.convert_lora(self.spelled(state_dict))
        try:
            patches = comfy.lora.load_lora(given, self.key_map, log_missing=False)
        except (KeyError, ValueError, RuntimeError) as error:  # a factor without its partner, an alpha of two numbers
            raise FormatError(
                "ComfyUI cannot read the LoRA: a tensor is missing or has the wrong shape.",
                file=source.path,
                found=str(error),
                remedy="the file is damaged or incomplete: export it again",
            ) from error
        sites = Sites(lora.label, lora.convert_rank, metadata, source)
        full: list[tuple[Target, Any]] = []
        for target, patch in patches.items():
            key = parts(target)[0]
            if key not in self._weights:
                sites.dropped.append(f"{key} of {lora.label}: the model has no such parameter")
            elif not self._take(sites, target, patch):
                full.append((target, patch))
        if full:
            self._convert(sites, full)
        sites.dropped += self._unread(lora, given, patches)
        if not (sites.modules or sites.diffs or sites.extras):
            raise MergeError(
                "ComfyUI finds nothing in this LoRA for the connected model.",
                file=source.path,
                expected="a LoRA of the model's architecture",
                found=sites.dropped[0] if patches else f"keys like {name_some(state_dict, 3)}",
                remedy="connect the base model the LoRA was trained for (and its CLIP)",
            )
        return sites

    def spelled(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Names that ComfyUI reads for those it does not: ``unet.<path>`` also as ``lora_unet_<path with _>``."""
        spelled: dict[str, Tensor] = {}
        for key, tensor in state_dict.items():
            head, dot, tail = key, "", ""
            while key.startswith("unet.") and head and f"lora_unet_{_flat(head)}" not in self.key_map:
                head, dot, rest = head.rpartition(".")
                tail = f"{dot}{rest}{tail}"
            spelled[f"lora_unet_{_flat(head)}{tail}" if key.startswith("unet.") and head else key] = tensor
        return spelled

    def _take(self, sites: Sites, target: Target, patch: Any) -> bool:
        """Take a patch as it is: low rank, a vector to add, a value to set. ``False``: it needs converting."""
        key = parts(target)[0]
        weight = self._weights[key]
        if isinstance(patch, comfy.weight_adapter.WeightAdapterBase):
            if patch.name != "lora" or patch.weights[4] is not None:
                return False
            at = place(target, patch.weights[0].shape[0])
            if at is None:
                return False
            try:
                part = low_rank(patch.weights, tuple(weight.shape[2:]))
            except (FormatError, RuntimeError) as error:  # RuntimeError: a mid matrix that does not fit
                raise _placed(error, sites, key) from None
            reshape = patch.weights[5]
            if reshape is not None:
                sites.extras[f"{self.names.whole(key)}.reshape_weight"] = torch.tensor(reshape)
            elif weight.is_floating_point():
                fits = (weight.shape[0] if isinstance(target, str) else part.d_out, weight[0].numel())
                if (part.d_out, part.d_in) != fits:
                    raise self._misfit(sites, key, fits, (part.d_out, part.d_in))
            sites.add(part, at)
            return True
        kind, values = patch
        if kind == "set":
            offset = parts(target)[1]
            rows = None if offset is None else self.names.rows(key, offset[1], offset[1] + offset[2])
            sites.extras[f"{rows or self.names.whole(key)}.set_weight"] = values[0]
            return True
        if kind == "diff" and values[0].ndim < 2:
            if values[0].shape != weight.shape:
                raise self._misfit(sites, key, tuple(weight.shape), tuple(values[0].shape))
            sites.diffs[self._parameter(key)] = values[0]
            return True
        return False

    def _parameter(self, key: str) -> str:
        """Name of a diff from which the comfy format makes the key that the stock loader reads."""
        module, _, parameter = key.rpartition(".")
        if parameter == "bias":
            return f"{self.names.whole(f'{module}.weight')}.bias"
        return f"{self.names.whole(key)}.weight"

    def _convert(self, sites: Sites, full: Sequence[tuple[Target, Any]]) -> None:
        """Updates that are not low rank, as their best approximation of rank `convert_rank`."""
        kinds = sorted({kind_of(patch) for _, patch in full})
        if sites.convert_rank < 1:
            names = [self.names.whole(parts(target)[0]) for target, _ in full]
            raise MergeError(
                f"The LoRA holds updates that are not low rank ({', '.join(kinds)}) and cannot be merged as they are.",
                file=sites.source.path,
                module=name_some(names),
                expected="plain LoRA layers, or a convert_rank",
                found=f"{len(full)} such layers",
                remedy="set convert_rank on Load LoRA (e.g. 32): each becomes its best low-rank approximation",
            )
        kept = whole = 0.0
        advance = progress()
        for done, (target, patch) in enumerate(full):
            advance(done, len(full), parts(target)[0])
            delta, at = self._delta(target, patch, sites.source.path)
            if not torch.isfinite(delta).all():
                raise FormatError("The file contains NaN or infinite numbers.", file=sites.source.path, module=at.key)
            if not delta.any():  # ComfyUI logs an update it cannot compute, and goes on
                sites.dropped.append(f"{at.key} of {sites.label}: ComfyUI computes no change from its {kind_of(patch)}")
                continue
            kernel = tuple(delta.shape[2:])
            A, B = best_rank_k(delta.flatten(1), min(sites.convert_rank, *delta.flatten(1).shape))
            kept += float(A.double().square().sum(1).square().sum())  # balanced: |B A|^2 = sum_j |a_j|^4
            whole += float(delta.double().square().sum())
            sites.add(LowRank(A, B, kernel=kernel), at)
        sites.source = replace(sites.source, convert_rank=sites.convert_rank)
        sites.notes.append(
            f"{sites.label}: {len(full)} layers ({', '.join(kinds)}) were approximated at rank {sites.convert_rank}, "
            f"which keeps {kept / (whole or 1):.1%} of their energy"
        )

    def _delta(self, target: Target, patch: Any, file: str) -> tuple[Tensor, ParameterSlice]:
        """What a patch adds to the model's own weight: after minus before, as ComfyUI computes it."""
        key, offset, fn = parts(target)
        # what is added does not depend on the weight, unless magnitudes (DoRA) are rescaled along with it
        if isinstance(patch, tuple) or (
            patch.name in _ADDITIVE and patch.weights[-2 if patch.name == "lora" else -1] is None
        ):
            weight = torch.zeros(self._weights[key].shape, dtype=torch.float32)
        else:
            weight = self._own_weight(key)
        start, size = (0, weight.shape[0]) if offset is None else offset[1:]
        before = weight[start : start + size].clone()
        entry = (1.0, patch, 1.0, None if offset is None else tuple(offset), fn)
        try:  # in float32 beside the weight, as the stock loader: OFT and BOFT work in no other
            after = comfy.lora.calculate_weight([entry], weight, key, intermediate_dtype=torch.float32)
        except (RuntimeError, TypeError) as error:
            raise FormatError(
                f"ComfyUI cannot compute the change from a layer's {kind_of(patch)}.",
                file=file,
                module=self.names.whole(key),
                found=str(error),
                remedy="the stock loader cannot use this file either: train or export it in another form",
            ) from error
        return (after[start : start + size] - before).float(), ParameterSlice(key, start, start + size)

    def _own_weight(self, key: str) -> Tensor:
        """The weight without any LoRA that is patched in, in float64 so that after - before keeps its digits."""
        weight, convert = self._originals[key]
        return convert(weight.detach().to(device="cpu", dtype=torch.float64, copy=True), inplace=True)

    @cached_property
    def _originals(self) -> dict[str, tuple[Tensor, Callable[..., Tensor]]]:
        return {key: entry[0] for patcher in self._patchers for key, entry in patcher.get_key_patches().items()}

    def _unread(self, lora: Lora, given: Mapping[str, Tensor], patches: Mapping[Target, Any]) -> Iterator[str]:
        """Keys of the file that ComfyUI did not use."""
        used = {id(tensor) for patch in patches.values() for tensor in _tensors(patch)}
        read = {key for key, tensor in given.items() if id(tensor) in used}
        modules = {".".join(parts[:n]) for parts in (key.split(".") for key in read) for n in range(1, len(parts))}
        for key in given:
            # these two are read as plain numbers, along with their module
            if key in read or (key.endswith((".alpha", ".reshape_weight")) and key.rpartition(".")[0] in modules):
                continue
            if self.clip is None and is_text_encoder(key):
                reason = "it belongs to a text encoder: connect the CLIP"
            else:
                reason = "the model has no place for it, or another key of the file takes that place"
            yield f"{key} of {lora.label}: {reason}"

    def _misfit(self, sites: Sites, key: str, expected: tuple[int, ...], found: tuple[int, ...]) -> MergeError:
        return MergeError(
            "The LoRA was made for another base model: one of its layers has a different shape.",
            file=sites.source.path,
            module=self.names.whole(key),
            expected=f"{expected} as in the connected model",
            found=found,
            remedy="connect the base model the LoRA was trained for",
        )


def _flat(name: str) -> str:
    return name.removeprefix("unet.").replace(".", "_")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        yield from _tensors(value.weights)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _placed(error: FormatError | RuntimeError, sites: Sites, key: str) -> FormatError:
    """The same error, with the file and layer it is about."""
    if isinstance(error, RuntimeError):
        return FormatError("The factors do not fit together.", file=sites.source.path, module=key, found=str(error))
    return error.at(sites.source.path, key)


def open_lora(lora: Lora) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors by key as the stock loader would get them, and the metadata.

    Raises:
        FormatError: A file that is not a sound safetensors file.
    """
    content = lora.content
    if isinstance(content, Adapter):
        return formats.to_state_dict(content, "comfy"), content.metadata
    return files.read_tensors(content) if isinstance(content, Path) else (dict(content), {})


def trigger_words(lora: Lora) -> str:
    """The words that a LoRA's file says it is called by, ``""`` where it says none."""
    return open_lora(lora)[1].get("modelspec.trigger_phrase", "")


def _source(lora: Lora, state_dict: Mapping[str, Tensor]) -> Source:
    if isinstance(lora.content, Adapter):
        return lora.content.source
    if isinstance(lora.content, Path):
        return Source(str(lora.content), sha256(lora.content), formats.detect(state_dict))
    return Source(lora.label)


def apply(lora: Lora, model: Any, clip: Any, strength_model: float, strength_clip: float) -> tuple[Any, Any]:
    """Patch a LoRA into a model and its text encoders: the stock loader, on the state dict that Save LoRA writes.

    Names that only other hosts read are respelled first, as for a merge.

    Raises:
        MergeError: Nothing of the LoRA fits, or a strength is no number.
        FormatError: NaN or infinity in the LoRA, which the stock loader would paint with.
    """
    strength_model, strength_clip = strength_model * lora.strength_model, strength_clip * lora.strength_clip
    if not (math.isfinite(strength_model) and math.isfinite(strength_clip)):
        raise MergeError(
            "A strength is not a finite number.",
            file=lora.label,
            expected="e.g. 0.8",
            found=[strength_model, strength_clip],
        )
    if strength_model == 0 and strength_clip == 0:
        return model, clip
    tensors, _ = open_lora(lora)
    file = str(lora.content) if isinstance(lora.content, Path) else lora.label
    for key, tensor in tensors.items():
        check_finite(tensor, key, file)
    state_dict = _Host(model, clip).spelled(tensors)
    applied = comfy.sd.load_lora_for_models(model, clip, state_dict, strength_model, strength_clip)
    if _patch_count(*applied) == _patch_count(model, clip):
        raise MergeError(
            "Nothing of the LoRA fits the model.",
            file=lora.label,
            expected="a LoRA of the model's architecture",
            found=f"keys like {name_some(state_dict, 3)}",
            remedy="connect the base model the LoRA was made for",
        )
    return applied


def _patch_count(model: Any, clip: Any) -> int:
    patchers = [model, *([] if clip is None else [clip.patcher])]
    return sum(len(patches) for patcher in patchers for patches in patcher.patches.values())
