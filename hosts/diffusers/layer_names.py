"""diffusers: what the layers of a LoRA file are called there, learnt from diffusers' own loaders.

A loader is handed a *probe* instead of the weights: an ``up`` factor that numbers the rows of all modules, a ``down``
factor that numbers the modules. What comes out says which rows of which module make up each target, so every renaming,
split and permutation the library knows becomes exact plain data (a `KeyMap`), for any rank and any values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import lora_pipeline, single_file_utils
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from torch import Tensor

from ...core.adapter import Adapter
from ...core.errors import MergeError, name_some
from ...core.formats import FORMATS
from ...core.formats.suffixes import classify
from ...core.layers.keymap import KeyMap, MappedRows, Spans, apply_key_map, rows_to_spans

_PATCHED_BLOCKS = SimpleNamespace(layers_per_block=2)  # all of Stability's U-Nets
_STYLES = (("lora_A", "lora_B", False), ("lora_down", "lora_up", True), ("lora_down", "lora_up", False))
_MAX_SPANS = 64

Rows = Mapping[str, int]  # module -> number of output rows
Converter = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def key_map(adapters: Sequence[Adapter]) -> KeyMap:
    """The diffusers names of the adapters' modules.

    Modules that diffusers cannot convert, or only by changing their values, are not in the map (see
    `core.layers.keymap.unmapped_modules`) and keep their names.

    Args:
        adapters: LoRAs of one base model, in any dialects.
    """
    known: dict[str, tuple[MappedRows, ...]] = {}
    for adapter in adapters:
        rows = _rows(adapter)
        known.update({name: (MappedRows(target),) for name in rows if (target := _own_name(name)) is not None})
        rest = {name: count for name, count in rows.items() if name not in known}
        text = {name: count for name, count in rest.items() if _TEXT.match(name)}
        model = {name: count for name, count in rest.items() if name not in text}
        known.update(_convert(text, _load_with("StableDiffusionXLLoraLoaderMixin"), _spell_text))
        architecture = _architecture(adapter)
        if architecture == "sd3":
            known.update(_sd3(model, adapter))
        elif architecture == "flux-onetrainer":
            known.update(_underscored_flux(model))
        elif architecture is not None:
            loader, spell = _ROUTES[architecture]
            known.update(_convert(model, _load_with(loader), spell))
    return known


def to_diffusers(adapter: Adapter) -> Adapter:
    """The adapter under diffusers' names, ready to be saved in that format.

    Raises:
        MergeError: Layers diffusers has no name for.
    """
    known = key_map([adapter])
    lost = sorted(set(adapter.modules) - set(known))
    if lost:
        raise MergeError(
            "diffusers has no names for some layers.",
            file=adapter.source.path or None,
            found=name_some(lost, 3),
            remedy="keep the format of the inputs, or save as comfy",
        )
    return apply_key_map(adapter, known)


def to_kohya(adapter: Adapter) -> Adapter:
    """The adapter under kohya's names, ready to be saved in that format. Stable Diffusion's U-Nets only.

    Raises:
        MergeError: Another architecture, whose kohya names fuse layers or are not known.
    """
    adapter = (
        adapter if all(FORMATS["kohya"].is_native_name(name) for name in adapter.modules) else to_diffusers(adapter)
    )
    rows = {name: count for name, count in _rows(adapter).items() if "." in name}
    foreign = [name for name in rows if not name.startswith(("unet.", "text_encoder.", "text_encoder_2."))]
    if foreign:
        raise MergeError(
            "kohya names are known for Stable Diffusion 1, 2 and XL only.",
            file=adapter.source.path or None,
            found=name_some(foreign, 3),
            remedy="save as comfy or diffusers",
        )
    if not any(name.startswith("text_encoder_2.") or _is_sdxl(name, adapter) for name in rows):
        prefix = "lora_te"  # the only text encoder has no number
    else:
        prefix = "lora_te1"
    known = _convert(rows, convert_state_dict_to_kohya, lambda name: name, fits=FORMATS["kohya"].is_native_name)
    return apply_key_map(
        adapter,
        {
            name: tuple(MappedRows(re.sub("^lora_te1(?=_)", prefix, piece.target), piece.rows) for piece in pieces)
            for name, pieces in known.items()
        },
    )


def _is_sdxl(name: str, adapter: Adapter) -> bool:
    return name.endswith("attn2.to_k") and name in adapter.modules and adapter.modules[name].d_in == 2048


def _rows(adapter: Adapter) -> dict[str, int]:
    rows = {name.rpartition(".")[0]: tensor.shape[0] for name, tensor in adapter.diffs.items() if tensor.ndim == 1}
    return {**rows, **{name: part.d_out for name, part in adapter.modules.items()}}


# --- which loader -----------------------------------------------------------------------------------------------------

_TEXT = re.compile(r"lora_te\d?_text_(model|projection)|text_encoders\.clip_[lg]\.transformer\.text_")
_UNET_ROOTS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "time_embedding.", "add_embedding.")
_DIT_ROOTS = ("transformer_blocks.", "single_transformer_blocks.")


def _own_name(name: str) -> str | None:
    """The full name of a module that already is in diffusers' dialect."""
    if name.startswith("transformer.") and re.match(r"transformer\.(double|single|joint)_blocks\.", name):
        return None
    if FORMATS["diffusers"].is_native_name(name):
        return name
    if name.startswith(_UNET_ROOTS):
        return f"unet.{name}"
    if name.startswith(_DIT_ROOTS):
        return f"transformer.{name}"
    return None


def _architecture(adapter: Adapter) -> str | None:
    """The base model's family, told from names and, where two families share names, from shapes."""
    flat = {name.replace(".", "_"): part for name, part in adapter.modules.items()}
    text = " ".join(flat)

    def ratio(suffix: str) -> float:
        return next((part.d_out / part.d_in for name, part in flat.items() if name.endswith(suffix)), 0.0)

    if "joint_blocks_" in text:
        return "sd3"
    if "double_blocks_" in text or "single_blocks_" in text:
        if re.search(r"img_mlp_fc|img_mod_linear|token_refiner|double_blocks_19_|single_blocks_3[89]_", text):
            return "hunyuan"
        if ratio("_linear1") == 9 or ratio("img_mlp_0") == 6 or "stream_modulation" in text:
            return "flux2"
        return "flux"
    if "lora_transformer_" in text:
        return "flux-onetrainer"
    if re.search(r"(^|_| )blocks_\d+_(self_attn|cross_attn|ffn)", text):
        return "wan"
    if re.search(r"layers_\d+_(attention|feed_forward|adaLN)", text):
        return "lumina2" if ratio("attention_qkv") == 3840 / 2304 else "z-image"
    if "transformer_blocks_" in text and re.search(r"(input|output|down|up|middle|mid)_blocks?_", text) is None:
        return "ltx" if "attn1" in text else "qwen"
    if re.search(r"(input|output|down|up)_blocks_|mid(dle)?_block_", text):
        return "unet"
    return None


def _bare(name: str) -> str:
    """A dotted or underscored native name without the prefix of its file's dialect."""
    for prefix in ("diffusion_model.", "transformer.", "unet.", "lora_unet__", "lora_unet_"):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _spell_kohya(name: str) -> str:
    return name if ".processor." in name else "lora_unet_" + _bare(name).replace(".", "_")


def _spell_dotted(name: str) -> str:
    return name if name.startswith("lora_") else "diffusion_model." + _bare(name)


def _spell_wan(name: str) -> str:
    path = re.sub(r"^blocks_(\d+)_", r"blocks.\1.", _bare(name))
    path = re.sub(r"(?<=\.)(self_attn|cross_attn)_", r"\1.", path)
    return "diffusion_model." + re.sub(r"(?<=\.)ffn_(?=\d)", "ffn.", path)


def _spell_hunyuan(name: str) -> str:
    return _bare(name)


def _spell_text(name: str) -> str:
    for prefix, number in (("text_encoders.clip_l.transformer.", "1"), ("text_encoders.clip_g.transformer.", "2")):
        if name.startswith(prefix):
            return f"lora_te{number}_" + name.removeprefix(prefix).replace(".", "_")
    return name


_ROUTES: dict[str, tuple[str, Callable[[str], str]]] = {
    "unet": ("StableDiffusionXLLoraLoaderMixin", _spell_kohya),
    "flux": ("FluxLoraLoaderMixin", _spell_kohya),
    "flux2": ("Flux2LoraLoaderMixin", _spell_dotted),
    "hunyuan": ("HunyuanVideoLoraLoaderMixin", _spell_hunyuan),
    "wan": ("WanLoraLoaderMixin", _spell_wan),
    "qwen": ("QwenImageLoraLoaderMixin", _spell_dotted),
    "z-image": ("ZImageLoraLoaderMixin", _spell_dotted),
    "lumina2": ("Lumina2LoraLoaderMixin", _spell_dotted),
    "ltx": ("LTXVideoLoraLoaderMixin", _spell_dotted),
}


def _load_with(loader: str) -> Converter:
    def converter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        # a loader this diffusers is too old for fails like one that refuses the file
        mixin: Any = getattr(lora_pipeline, loader)
        result: Any = mixin.lora_state_dict(state, unet_config=_PATCHED_BLOCKS)
        return result[0] if isinstance(result, tuple) else result

    return converter


# --- probing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    """Numbers that tell every row of every module apart: module i holds ``starts[i] .. starts[i + 1]``."""

    names: tuple[str, ...]
    starts: Tensor

    @staticmethod
    def of(rows: Rows) -> _Probe:
        counts = torch.tensor([0, *rows.values()])
        return _Probe(tuple(rows), counts.cumsum(0) + 1)  # no zeros: loaders drop factors that are all zero

    def up(self, index: int) -> Tensor:
        """``(d_out, 1)`` float64, exact up to 2^53."""
        return torch.arange(int(self.starts[index]), int(self.starts[index + 1]), dtype=torch.float64)[:, None]

    def down(self, index: int) -> Tensor:
        """``(1, 3)``: anything a loader does to the input side shows."""
        return torch.tensor([[index + 1.0, -(index + 1.0), 7.0]], dtype=torch.float64)

    def decode(self, up: Tensor) -> tuple[int, Spans] | None:
        """The module and the rows that a converted `up` is made of; ``None`` for anything but whole rows of one."""
        if up.ndim != 2 or up.shape[1] != 1 or not up.numel():
            return None
        values = up[:, 0].double()
        numbers = values.long()
        if not bool((numbers == values).all()) or int(numbers.min()) < 1 or int(numbers.max()) >= int(self.starts[-1]):
            return None
        index = int(torch.searchsorted(self.starts, numbers[:1], right=True)) - 1
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        if int(numbers.min()) < start or int(numbers.max()) >= stop:
            return None
        spans = rows_to_spans(numbers - start)
        return (index, spans) if len(spans) <= _MAX_SPANS else None


def _convert(
    rows: Rows,
    converter: Converter,
    spell: Callable[[str], str],
    fits: Callable[[str], bool] = FORMATS["diffusers"].is_native_name,
) -> dict[str, tuple[MappedRows, ...]]:
    """Run a converter over probes of all modules; where it refuses, over fewer, so that a bad key costs only itself."""
    if not rows:
        return {}
    best: dict[str, tuple[MappedRows, ...]] = {}
    for style in _STYLES:
        try:
            found = _run(rows, converter, spell, style, fits)
        except Exception:
            continue
        if len(found) > len(best):
            best = found
        if len(best) == len(rows):
            return best
    if not best and len(rows) > 1:
        names = list(rows)
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            best.update(_convert({name: rows[name] for name in half}, converter, spell, fits))
    return best


def _run(
    rows: Rows,
    converter: Converter,
    spell: Callable[[str], str],
    style: tuple[str, str, bool],
    fits: Callable[[str], bool],
) -> dict[str, tuple[MappedRows, ...]]:
    probe = _Probe.of(rows)
    down, up, alpha = style
    state: dict[str, Tensor] = {}
    for index, name in enumerate(probe.names):
        spelled = spell(name)
        if ".processor." in spelled:
            state[f"{spelled}.down.weight"], state[f"{spelled}.up.weight"] = probe.down(index), probe.up(index)
            continue
        state[f"{spelled}.{down}.weight"], state[f"{spelled}.{up}.weight"] = probe.down(index), probe.up(index)
        if alpha:
            state[f"{spelled}.alpha"] = torch.tensor(1.0, dtype=torch.float64)
    converted = converter(state)
    targets: dict[str, tuple[int, Spans]] = {}
    for module, keys in classify(converted)[0].items():
        if module.startswith("diffusion_model.") or not {"down", "up"} <= set(keys):
            continue  # passed through as it was
        # loaders leave some layers outside the blocks without the component's name, and then lose them
        target = module if fits(module) or module.startswith("lora_") else f"transformer.{module}"
        if not fits(target):
            continue
        found = probe.decode(converted[keys["up"]])
        if found is not None and torch.equal(converted[keys["down"]].double(), probe.down(found[0])):
            targets[target] = found
    return _pieces(probe, rows, targets)


def _pieces(probe: _Probe, rows: Rows, targets: Mapping[str, tuple[int, Spans]]) -> dict[str, tuple[MappedRows, ...]]:
    """The map, of those modules whose every row arrives exactly once."""
    pieces: dict[str, list[tuple[str, Spans]]] = {}
    for target, (index, spans) in targets.items():
        pieces.setdefault(probe.names[index], []).append((target, spans))
    return {
        name: tuple(MappedRows(target, None if spans == ((0, rows[name]),) else spans) for target, spans in found)
        for name, found in pieces.items()
        if _covers([span for _, spans in found for span in spans], rows[name])
    }


def _covers(spans: Iterable[tuple[int, int]], count: int) -> bool:
    position = 0
    for start, stop in sorted(spans):
        if start != position:
            return False
        position = stop
    return position == count


# --- from models and checkpoints where the loaders fall short ---------------------------------------------------------


def _underscored_flux(rows: Rows) -> dict[str, tuple[MappedRows, ...]]:
    """OneTrainer's names: diffusers' own with underscores. The loader knows only some of them, the model knows all."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    flat = {f"lora_transformer_{name.replace('.', '_')}": name for name, _ in model.named_modules()}
    return {name: (MappedRows(f"transformer.{flat[name]}"),) for name in rows if name in flat}


class _Checkpoint(dict[str, Tensor]):
    """A checkpoint that has every key the converter asks for, and remembers them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.asked: list[str] = []

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(6, 1, dtype=torch.float64)  # may be cut in two or three

    def pop(self, key: str, *default: Any) -> Tensor:
        self.asked.append(key)
        return super().pop(key, self[key])


def _sd3(rows: Rows, adapter: Adapter) -> dict[str, tuple[MappedRows, ...]]:
    """The map of native SD3 names, by the checkpoint converter run on probes for weights."""
    flat = {_bare(name).replace(".", "_"): name for name in rows}
    # the last block is converted in its own way, so their number matters: SD3 has one per 64 channels
    hidden = next((p.d_in for n, p in adapter.modules.items() if re.search(r"(attn.qkv|mlp.fc1)$", n)), 0)
    highest = max(int(match[1]) for name in flat if (match := re.search(r"joint_blocks_(\d+)_", name)))
    depth = max(hidden // 64, highest + 1)
    blocks = [f"joint_blocks.{i}.x_block.attn.qkv.weight" for i in range(depth)]
    blocks += [f"joint_blocks.{m[1]}.x_block.attn2.qkv.weight" for n in flat if (m := re.search(r"_(\d+)_.*attn2_", n))]
    filler = torch.zeros(6, 1, dtype=torch.float64)
    dry = _Checkpoint(dict.fromkeys(blocks, filler))
    single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(dry)
    native = {key.removesuffix(".weight").replace(".", "_"): key for key in dry.asked if key.endswith(".weight")}
    known = {name: count for name, count in rows.items() if _bare(name).replace(".", "_") in native}
    probe = _Probe.of(known)
    real = _Checkpoint(dict.fromkeys(blocks, filler))
    for index, name in enumerate(probe.names):
        real[native[_bare(name).replace(".", "_")]] = probe.up(index)
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(real)
    targets = {
        f"transformer.{key.removesuffix('.weight')}": found
        for key, tensor in converted.items()
        if key.endswith(".weight") and (found := probe.decode(tensor)) is not None
    }
    return _pieces(probe, known, targets)
