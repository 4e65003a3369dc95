"""``lora_adapter_metadata``: the configuration that diffusers stores in a file's metadata, with the layers' scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from ..adapter import Adapter, Source, is_text_encoder
from ..errors import FormatError
from ..json_text import from_json
from .base_weights import BaseWeights
from .peft_config import PeftScale
from .reading import AlphaLookup, assemble
from .suffixes import role_of

KEY = "lora_adapter_metadata"
_NETWORKS = ("unet", "transformer", "transformer_2", "prior")  # components of diffusers' pipelines


def assemble_with_metadata(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: Source,
    convert_rank: int | None,
    base: BaseWeights | None = None,
) -> Adapter:
    """Assemble the tensors of a file; layers without an alpha key have the scale in the metadata.

    diffusers applies that scale and ComfyUI does not, so a scale other than 1 is noted.

    Raises:
        FormatError: See `reading.assemble`; or the configuration in the metadata is not valid.
    """
    alpha_of = _alpha_lookup(metadata, source, allow_dora=base is not None)
    adapter = assemble(tensors, metadata, source, convert_rank=convert_rank, alpha_of=alpha_of, base=base)
    if alpha_of is None:
        return adapter
    with_alpha = {module for key in tensors for module, role in [role_of(key) or ("", "")] if role == "alpha"}
    scales = {part.scale for name, part in adapter.modules.items() if name not in with_alpha} - {1.0}
    if not scales:
        return adapter
    text = f"{min(scales):g}" if len(scales) == 1 else f"{min(scales):g} to {max(scales):g}"
    note = (
        f"{adapter.label}: its scale, {text}, is in {KEY} alone. It was applied, as diffusers does; ComfyUI ignores it "
        f"and loads {adapter.label} with scale 1. The result has the scale in its tensors and no such entry"
    )
    return replace(adapter, notes=(*adapter.notes, note))


def _alpha_lookup(metadata: Mapping[str, str], source: Source, *, allow_dora: bool) -> AlphaLookup | None:
    """Alphas by the configuration: one flat JSON object, whose keys are prefixed by the component."""
    if KEY not in metadata:
        return None
    try:
        flat = cast("dict[str, Any]", from_json(metadata[KEY]))
        components = {key.split(".", 1)[0] for key in flat}
        scales = {
            name: PeftScale.from_config(
                {key.split(".", 1)[1]: value for key, value in flat.items() if key.startswith(f"{name}.")},
                source,
                allow_dora=allow_dora,
            )
            for name in components
        }
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            "The adapter configuration in the file's metadata cannot be read.",
            file=source.path or None,
            module=KEY,
            found=str(error),
        ) from error
    networks = [name for name in scales if name in _NETWORKS]

    def alpha_of(module: str, rank: int) -> float | None:
        component, _, path = module.partition(".")
        if component in scales:
            return scales[component](path, rank)
        other = component in _NETWORKS or is_text_encoder(module)
        if len(networks) == 1 and not other:  # diffusion_model.<path>, or the path alone
            return scales[networks[0]](module.removeprefix("diffusion_model."), rank)
        return None

    return alpha_of
