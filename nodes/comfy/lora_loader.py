"""Load and apply LoRAs through ComfyUI's own key maps, loader and patches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.sd
import comfy.weight_adapter
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...core import formats
from ...core.adapter import Adapter, Source, check_finite, is_text_encoder
from ...core.errors import FormatError, MergeError, name_some
from ...core.formats import files
from ...core.formats.convert import approximation_note, is_matrix, low_rank_of_total
from ...core.layers.keymap import ParameterSlice, apply_key_map
from ...core.lowrank import LowRank, best_rank_k
from ..graph_lora import GraphLora, require_all_steps
from ..loaded_loras import LoadedLoras, file_notes, hashes_later, states_of
from .display import progress_bar
from .patches import (
    AdapterBuilder,
    LoaderNames,
    Target,
    find_common_names,
    fuse_unnamed,
    kind_of_update,
    slice_of,
    split_target,
    to_low_rank,
)

# Kinds of adapters whose update does not depend on the weight it is added to, so that it can be computed from zeros.
_ADDITIVE = ("lora", "loha", "lokr")


def read(loras: Sequence[GraphLora], model: Any, clip: Any) -> LoadedLoras:
    """Load LoRAs through ComfyUI's key maps and loader, so that whatever it can load into `model` can be merged.

    Args:
        loras: The LoRAs.
        model: The MODEL.
        clip: The CLIP or ``None``; without it text encoder layers are dropped.

    Raises:
        MergeError: A LoRA of another base model, or updates that are not low rank and may not be converted.
        FormatError: A file that cannot be read.
    """
    layers, states = _ModelLayers(model, clip), states_of(loras)
    builders = [layers.read(lora) for lora in loras]
    slices = {name: rows for builder in builders for name, rows in builder.slices.items()}
    common = find_common_names(slices, layers.names, layers.row_count)
    names, row_count = layers.names, layers.row_count
    originals = [builder.build() for builder in builders]
    return LoadedLoras(
        [apply_key_map(adapter, common.key_map) for adapter in originals],
        originals,
        connected=f"{base_of(model)} model{'' if clip is None else ' with CLIP'}",
        file_notes=file_notes(loras),
        dropped=tuple(line for builder in builders for line in builder.dropped),
        finish=lambda adapter: fuse_unnamed(adapter, common, names, row_count),  # must not refer to the model
        slices=common.slices,
        pending=hashes_later(loras, states),
    )


def base_of(model: Any) -> str:
    """Return ComfyUI's name for the kind of a MODEL, e.g. ``Flux``."""
    return type(model.model).__name__


class _ModelLayers:
    """The layers of the connected model: ComfyUI's names for them, and their weights."""

    def __init__(self, model: Any, clip: Any) -> None:
        self.key_map: dict[str, Target] = comfy.lora.model_lora_keys_unet(model.model, {})
        self._patchers = [model]
        if clip is not None:
            comfy.lora.model_lora_keys_clip(clip.cond_stage_model, self.key_map)
            self._patchers.append(clip.patcher)
        self.clip = clip
        self.names = LoaderNames(self.key_map)
        self._weights: dict[str, Tensor] = {}
        for patcher in self._patchers:
            self._weights.update(patcher.model_state_dict())
        row_counts = {key: weight.shape[0] for key, weight in self._weights.items() if weight.ndim}
        self.row_count = row_counts.__getitem__  # the cache of loaded LoRAs keeps it, and must not keep the model

    def read(self, lora: GraphLora) -> AdapterBuilder:
        """Read one LoRA. Each of its keys is merged, passed on, or listed in `dropped`."""
        state_dict, metadata = open_lora(lora)
        source = _source(lora, state_dict)
        converted = comfy.lora_convert.convert_lora(self.readable_names(state_dict))
        try:
            patches = comfy.lora.load_lora(converted, self.key_map, log_missing=False)
        except (KeyError, ValueError, RuntimeError) as error:  # e.g. a factor is missing, or an alpha has two values
            raise FormatError(
                "ComfyUI cannot read the LoRA: a tensor is missing or has the wrong shape.",
                file=source.path,
                found=str(error),
                remedy="the file is damaged or incomplete: export it again",
            ) from error
        builder = AdapterBuilder(lora.label, lora.convert_rank, metadata, source)
        to_convert: list[tuple[Target, Any]] = []
        for target, patch in patches.items():
            key = split_target(target)[0]
            if key not in self._weights:
                builder.dropped.append(f"{key} of {lora.label}: the model has no such parameter")
            elif not self._add_patch(builder, target, patch):
                to_convert.append((target, patch))
        if to_convert:
            self._convert(builder, to_convert)
        builder.dropped += self.unread_keys(lora, converted, patches)
        if not (builder.modules or builder.diffs or builder.extras):
            raise MergeError(
                "ComfyUI finds nothing in this LoRA for the connected model.",
                file=source.path,
                expected="a LoRA of the model's architecture",
                found=builder.dropped[0] if patches else f"keys like {name_some(state_dict, 3)}",
                remedy=self.remedy(),
            )
        return builder

    def remedy(self) -> str:
        if any(key.endswith(".qweight") for key in self._weights):  # Nunchaku's
            return (
                "the layers of this model have no weights that LoRAs are added to: load it in another format, or use "
                "the LoRA loader of the pack that loaded the model, with a file from Save LoRA"
            )
        return "connect the base model the LoRA was trained for (and its CLIP)"

    def readable_names(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename keys that ComfyUI does not read: ``unet.<path>`` becomes ``lora_unet_<path with _>`` where it can."""
        renamed: dict[str, Tensor] = {}
        for key, tensor in state_dict.items():
            head, dot, tail = key, "", ""
            while key.startswith("unet.") and head and f"lora_unet_{_underscored(head)}" not in self.key_map:
                head, dot, rest = head.rpartition(".")
                tail = f"{dot}{rest}{tail}"
            renamed[f"lora_unet_{_underscored(head)}{tail}" if key.startswith("unet.") and head else key] = tensor
        return renamed

    def _add_patch(self, builder: AdapterBuilder, target: Target, patch: Any) -> bool:
        """Add a patch that is low rank, a vector to add, or a value to set. ``False`` if it must be converted."""
        key = split_target(target)[0]
        weight = self._weights[key]
        if isinstance(patch, comfy.weight_adapter.WeightAdapterBase):
            if patch.name != "lora" or patch.weights[4] is not None:
                return False
            rows = slice_of(target, patch.weights[0].shape[0])
            if rows is None:
                return False
            try:
                update = to_low_rank(patch.weights, tuple(weight.shape[2:]))
            except (FormatError, RuntimeError) as error:  # RuntimeError: a Tucker core of the wrong shape
                raise _located(error, builder, key) from None
            reshape = patch.weights[5]
            if reshape is not None:
                builder.extras[f"{self.names.of_parameter(key)}.reshape_weight"] = torch.tensor(reshape)
            elif weight.is_floating_point():
                expected = (weight.shape[0] if isinstance(target, str) else update.d_out, weight[0].numel())
                if (update.d_out, update.d_in) != expected:
                    raise self._wrong_shape(builder, key, expected, (update.d_out, update.d_in))
            builder.add(update, rows)
            return True
        kind, values = patch
        if kind == "set":
            offset = split_target(target)[1]
            name = None if offset is None else self.names.of_rows(key, offset[1], offset[1] + offset[2])
            builder.extras[f"{name or self.names.of_parameter(key)}.set_weight"] = values[0]
            return True
        approximated = builder.convert_rank and is_matrix(values[0])
        name = self._diff_name(target)
        if kind == "diff" and name is not None and not approximated:
            _, offset, _ = split_target(target)
            shape = tuple(weight.shape) if offset is None else (offset[2], *weight.shape[1:])
            if values[0].shape != shape:
                raise self._wrong_shape(builder, key, shape, tuple(values[0].shape))
            builder.diffs[name] = values[0]
            return True
        return False

    def _diff_name(self, target: Target) -> str | None:
        """Return the name of a diff that the comfy format saves under a key that the stock loader reads.

        ``None`` for rows that have no name or that the loader reorders.
        """
        key, offset, fn = split_target(target)
        if offset is not None or fn is not None:
            name = None if offset is None or fn is not None else self.names.of_rows(key, offset[1], sum(offset[1:]))
            return None if name is None else f"{name}.weight"
        module, _, parameter = key.rpartition(".")
        if parameter == "bias":
            return f"{self.names.of_parameter(f'{module}.weight')}.bias"
        return f"{self.names.of_parameter(key)}.weight"

    def _convert(self, builder: AdapterBuilder, patches: Sequence[tuple[Target, Any]]) -> None:
        """Add updates that are not low rank as their best approximations of rank `convert_rank`."""
        kinds = sorted({kind_of_update(patch) for _, patch in patches})
        if builder.convert_rank < 1:
            names = [self.names.of_parameter(split_target(target)[0]) for target, _ in patches]
            raise MergeError(
                f"The LoRA has updates that are not low rank ({', '.join(kinds)}) and cannot be merged without "
                "approximating them.",
                file=builder.source.path,
                module=name_some(names),
                expected="plain LoRA layers, or a convert_rank",
                found=f"{len(patches)} such layers",
                remedy="set convert_rank on Load LoRA (e.g. 32): each becomes its best low-rank approximation",
            )
        updates: list[LowRank] = []
        progress = progress_bar()
        for number, (target, patch) in enumerate(patches):
            progress(number, len(patches), split_target(target)[0])
            delta, rows = self._delta(target, patch, builder.source.path)
            if not torch.isfinite(delta).all():
                raise FormatError(
                    "The file contains NaN or infinite numbers.", file=builder.source.path, module=rows.key
                )
            if not delta.any():  # where ComfyUI cannot compute an update it logs that and changes nothing
                reason = f"ComfyUI computes no change from its {kind_of_update(patch)}"
                builder.dropped.append(f"{rows.key} of {builder.label}: {reason}")
                continue
            kernel = tuple(delta.shape[2:])
            A, B = best_rank_k(delta.flatten(1), min(builder.convert_rank, *delta.flatten(1).shape))
            updates.append(low_rank_of_total(A, B, kernel, float(delta.double().square().sum())))
            builder.add(updates[-1], rows)
        builder.source = replace(builder.source, convert_rank=builder.convert_rank)
        builder.notes.append(approximation_note(builder.label, kinds, updates, builder.convert_rank))

    def _delta(self, target: Target, patch: Any, file: str) -> tuple[Tensor, ParameterSlice]:
        """Return what a patch adds to the model's weight, as ComfyUI computes it: after minus before."""
        key, offset, fn = split_target(target)
        # an additive update depends on the weight only where the magnitudes are rescaled too (DoRA)
        if isinstance(patch, tuple) or (
            patch.name in _ADDITIVE and patch.weights[-2 if patch.name == "lora" else -1] is None
        ):
            weight = torch.zeros(self._weights[key].shape, dtype=torch.float32)
        else:
            weight = self._unpatched_weight(key)
        start, size = (0, weight.shape[0]) if offset is None else offset[1:]
        before = weight[start : start + size].clone()
        entry = (1.0, patch, 1.0, None if offset is None else tuple(offset), fn)
        try:  # float32 as in the stock loader: OFT and BOFT work in no other dtype
            after = comfy.lora.calculate_weight([entry], weight, key, intermediate_dtype=torch.float32)
        except (RuntimeError, TypeError) as error:
            raise FormatError(
                f"ComfyUI cannot compute the change from a layer's {kind_of_update(patch)}.",
                file=file,
                module=self.names.of_parameter(key),
                found=str(error),
                remedy="the stock loader cannot use this file either: train or export it in another form",
            ) from error
        return (after[start : start + size] - before).float(), ParameterSlice(key, start, start + size)

    def _unpatched_weight(self, key: str) -> Tensor:
        """Return the weight without patched-in LoRAs, in float64 to keep the precision of after minus before.

        A quantised weight is dequantised. `ModelPatcher.get_key_patches` would do, but fails for the scales of those.
        """
        patcher = next(patcher for patcher in self._patchers if key in patcher.model_state_dict())
        with patcher.use_ejected():
            weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
        if key in patcher.backup:
            weight = patcher.backup[key].weight
        if key in patcher.hook_backup:
            weight = patcher.hook_backup[key][0]
        if isinstance(weight, QuantizedTensor):
            return weight.detach().dequantize().to(device="cpu", dtype=torch.float64)
        if not weight.is_floating_point():  # e.g. the packed blocks of a GGUF file
            raise MergeError(
                "The update of the LoRA depends on the weights of the model, and only another pack can unpack those.",
                module=self.names.of_parameter(key),
                found=f"{type(weight).__name__} of {weight.dtype}",
                remedy="connect the same model from a file that ComfyUI's own loader reads",
            )
        weight = weight.detach().to(device="cpu", dtype=torch.float64, copy=True)
        return weight if convert is None else convert(weight, inplace=True)

    def unread_keys(
        self, lora: GraphLora, state_dict: Mapping[str, Tensor], patches: Mapping[Target, Any]
    ) -> Iterator[str]:
        """Yield the keys of the file that ComfyUI did not use, with the reason."""
        used = {id(tensor) for patch in patches.values() for tensor in _tensors(patch)}
        read = {key for key, tensor in state_dict.items() if id(tensor) in used}
        modules = {".".join(parts[:n]) for parts in (key.split(".") for key in read) for n in range(1, len(parts))}
        for key in state_dict:
            # alpha and reshape_weight do not appear in patches as tensors: they count as read if their module was
            if key in read or (key.endswith((".alpha", ".reshape_weight")) and key.rpartition(".")[0] in modules):
                continue
            if self.clip is None and is_text_encoder(key):
                reason = "it belongs to a text encoder: connect the CLIP"
            else:
                reason = "the model has no such layer, or another key of the file changes the same layer"
            yield f"{key} of {lora.label}: {reason}"

    def not_applied(self, lora: GraphLora, state_dict: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return the keys of a LoRA that the stock loader does not use, with the reason.

        Args:
            lora: The LoRA, for its label.
            state_dict: Its tensors, under the names that the stock loader gets.
        """
        converted = comfy.lora_convert.convert_lora(dict(state_dict))
        patches = comfy.lora.load_lora(converted, self.key_map, log_missing=False)
        missing = [key for key in (split_target(target)[0] for target in patches) if key not in self._weights]
        return (
            *(f"{key} of {lora.label}: the model has no such parameter" for key in missing),
            *self.unread_keys(lora, converted, patches),
        )

    def _wrong_shape(
        self, builder: AdapterBuilder, key: str, expected: tuple[int, ...], found: tuple[int, ...]
    ) -> MergeError:
        return MergeError(
            "The LoRA was made for another base model: one of its layers has a different shape.",
            file=builder.source.path,
            module=self.names.of_parameter(key),
            expected=f"{expected} as in the connected model",
            found=found,
            remedy="connect the base model the LoRA was trained for",
        )


def _underscored(name: str) -> str:
    return name.removeprefix("unet.").replace(".", "_")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        yield from _tensors(value.weights)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _located(error: FormatError | RuntimeError, builder: AdapterBuilder, key: str) -> FormatError:
    """Return the error with its file and layer."""
    if isinstance(error, RuntimeError):
        return FormatError("The factors do not fit together.", file=builder.source.path, module=key, found=str(error))
    return error.at(builder.source.path, key)


def open_lora(lora: GraphLora) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Return the tensors by key, as the stock loader would get them, and the metadata.

    Raises:
        FormatError: A damaged safetensors file, or a file of another type.
    """
    content = lora.content
    if isinstance(content, Adapter):
        return formats.to_state_dict(content, "comfy"), content.metadata
    return files.read_tensors(content) if isinstance(content, Path) else (dict(content), {})


def _source(lora: GraphLora, state_dict: Mapping[str, Tensor]) -> Source:
    if isinstance(lora.content, Adapter):
        return lora.content.source
    if isinstance(lora.content, Path):
        return Source(str(lora.content), "", formats.detect(state_dict))
    return Source(lora.label)


def apply(lora: GraphLora, model: Any, clip: Any, strength_model: float, strength_clip: float) -> tuple[Any, Any]:
    """Patch a LoRA into a model and its text encoders, see `apply_with_dropped`.

    Returns:
        The patched MODEL and CLIP.
    """
    return apply_with_dropped(lora, model, clip, strength_model, strength_clip)[:2]


def apply_with_dropped(
    lora: GraphLora, model: Any, clip: Any, strength_model: float, strength_clip: float
) -> tuple[Any, Any, tuple[str, ...]]:
    """Patch a LoRA into a model and its text encoders with the stock loader, from the tensors Save LoRA would write.

    Names that only other hosts read are renamed first, as for a merge.

    Returns:
        The patched MODEL and CLIP, and the keys that the stock loader does not use, with the reason. A LoRA that
        changes nothing, or of strength 0, leaves both as they are.

    Raises:
        MergeError: No layer of the LoRA fits, a strength is not finite, or the LoRA has a start or an end step.
        FormatError: NaN or infinity in the LoRA, which the stock loader would sample with.
    """
    strength_model, strength_clip = strength_model * lora.strength_model, strength_clip * lora.strength_clip
    if not (math.isfinite(strength_model) and math.isfinite(strength_clip)):
        raise MergeError(
            "A strength is not a finite number.",
            file=lora.label,
            expected="e.g. 0.8",
            found=[strength_model, strength_clip],
        )
    if lora.is_empty or (strength_model == 0 and strength_clip == 0):
        return model, clip, ()
    require_all_steps([lora])
    tensors, _ = open_lora(lora)
    file = str(lora.content) if isinstance(lora.content, Path) else lora.label
    for key, tensor in tensors.items():
        check_finite(tensor, key, file)
    layers = _ModelLayers(model, clip)
    state_dict = layers.readable_names(tensors)
    applied = comfy.sd.load_lora_for_models(model, clip, state_dict, strength_model, strength_clip)
    if _patch_count(*applied) == _patch_count(model, clip):
        raise MergeError(
            "Nothing of the LoRA fits the model.",
            file=lora.label,
            expected="a LoRA of the model's architecture",
            found=f"keys like {name_some(state_dict, 3)}",
            remedy=layers.remedy(),
        )
    return *applied, layers.not_applied(lora, state_dict)


def _patch_count(model: Any, clip: Any) -> int:
    patchers = [model, *([] if clip is None else [clip.patcher])]
    return sum(len(patches) for patcher in patchers for patches in patcher.patches.values())
