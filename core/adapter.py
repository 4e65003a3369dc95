"""Adapter: one whole LoRA, module by module, with all other content of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import FormatError
from .fields import Converted, ReadOnly, read_only
from .json_text import from_json
from .lowrank import LowRank

CONFIG_KEY = "adapter_config"  # metadata key of the configuration of an adapter from a PEFT folder


@dataclass(frozen=True)
class Source:
    """The origin of an adapter.

    Args:
        path: The file or folder as the user named it.
        sha256: Hash of the weight file's bytes, ``""`` if there is no file.
        format: The format's name in ``FORMATS``.
        convert_rank: Rank at which updates of the file that are not low rank were approximated; 0 if it has none.
    """

    path: str = ""
    sha256: str = ""
    format: str = ""
    convert_rank: int = 0


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA in the engine. Immutable; the tensors may be views of a memory-mapped file.

    Args:
        modules: Module name -> its update. Names are those of the file until a key map renames them.
        diffs: Full tensors that are ADDED to the model, by parameter name (``<module>.bias``, ``<norm>.weight``).
            They are linear like a delta, so a merge may sum them.
        extras: Tensors that are not additive (embeddings, replaced weights), by the file's key; a merge carries them
            unchanged.
        metadata: The file's string metadata.
        source: The origin.
        notes: Sentences for reports on anything that reading changed or assumed, e.g. what an approximation cut off.
    """

    modules: Converted[Mapping[str, LowRank], Mapping[str, LowRank]] = Converted(read_only)
    diffs: ReadOnly[str, Tensor] = Converted(read_only, None)
    extras: ReadOnly[str, Tensor] = Converted(read_only, None)
    metadata: ReadOnly[str, str] = Converted(read_only, None)
    source: Source = Source()
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """A short name for reports: the file's stem, or ``adapter``."""
        return (
            self.source.path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].removesuffix(".safetensors") or "adapter"
        )

    @property
    def layers(self) -> list[str]:
        """Names of all layers that are changed: those with a low-rank update, then those with a diff alone."""
        return list(dict.fromkeys([*self.modules, *(name.rpartition(".")[0] for name in self.diffs)]))

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the factors."""
        dtypes = [part.dtype for part in self.modules.values()]
        widest = dtypes[0] if dtypes else torch.float32
        for dtype in dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        return widest

    def sourced(self, **changes: str) -> Adapter:
        """The same adapter, with other values in its `Source`."""
        return replace(self, source=replace(self.source, **changes))

    def check_finite(self) -> None:
        """Raise if any factor or diff holds NaN or infinity.

        Raises:
            FormatError: Names the file, the module and the factor.
        """
        for module, part in self.modules.items():
            for name, factor in (("A", part.A), ("B", part.B)):
                check_finite(factor, f"{module} (factor {name})", self.source.path)
        for name, tensor in self.diffs.items():
            check_finite(tensor, name, self.source.path)


# Prefixes of text encoder modules in the dialects (kohya lora_te*_, diffusers text_encoder*., ComfyUI ..).
_TEXT_ENCODER_PREFIXES = ("lora_te", "lora_prior_te", "text_encoder", "clip_l.", "clip_g.", "t5xxl.", "t5.")


def base_model(metadata: Mapping[str, str]) -> str | None:
    """The base model that a file's or folder's metadata names, verbatim; ``None`` if it names none."""
    name = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version")
    if name or CONFIG_KEY not in metadata:
        return name or None
    try:
        name = from_json(metadata[CONFIG_KEY])["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(name) if name else None


def is_text_encoder(module: str) -> bool:
    """Whether a module name belongs to a text encoder rather than the diffusion model."""
    return module.startswith(_TEXT_ENCODER_PREFIXES)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # NaN or infinity always makes the sum non-finite: one pass without a temporary tensor; the exact test runs rarely
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def check_finite(tensor: Tensor, module: str, file: str) -> None:
    """Raise FormatError if a tensor holds NaN or infinity."""
    if not is_finite(tensor):
        tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
        raise FormatError(
            "The file contains NaN or infinite numbers.",
            file=file or None,
            module=module,
            expected="finite numbers",
            found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} are not",
            remedy="the LoRA is broken (often because training diverged): use another checkpoint of it",
        )
