"""Run by ComfyUI's own Python: weights patched by our nodes, compared with weights patched by the stock loader.

Usage: weights.py <ComfyUI> <base directory>. Prints one JSON object: case -> measurements.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMFY, BASE = (Path(argument) for argument in sys.argv[1:3])
sys.argv = [sys.argv[0], "--cpu"]
sys.path[0:0] = [str(COMFY), str(BASE / "custom_nodes")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.lora  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from legomole.core.adapter import Adapter  # noqa: E402
from legomole.core.merge.engine import merge  # noqa: E402
from legomole.core.recipes.method_settings import build_method  # noqa: E402
from legomole.nodes.comfy import lora_loader  # noqa: E402
from legomole.nodes.graph_lora import GraphLora  # noqa: E402
from legomole.nodes.loaded_loras import LoadedLoras  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

LORAS = BASE / "models" / "loras"


def model(name: str) -> Any:
    return comfy.sd.load_diffusion_model(str(BASE / f"models/diffusion_models/{name}.safetensors"))


def checkpoint() -> tuple[Any, Any]:
    return comfy.sd.load_checkpoint_guess_config(str(BASE / "models/checkpoints/sd15_nano.safetensors"), False)[:2]


def patched(patcher: Any) -> dict[str, torch.Tensor]:
    """Return every patched weight as ComfyUI computes it, but with weights in float64; the updates are float32."""
    weights = patcher.model_state_dict()
    return {
        key: comfy.lora.calculate_weight(patches, weights[key].double(), key, intermediate_dtype=torch.float32)
        for key, patches in patcher.patches.items()
    }


def difference(ours: Any, stock: Any, base: Any) -> float:
    """Return the largest difference over all weights, relative to the largest change of that weight."""
    a, b, weights = patched(ours), patched(stock), base.model_state_dict()
    assert set(a) == set(b), sorted(set(a) ^ set(b))
    return max(float((a[key] - b[key]).abs().max() / (b[key] - weights[key].double()).abs().max()) for key in a)


def lora(name: str, strength: float = 1.0, convert_rank: int = 0) -> GraphLora:
    return GraphLora(LORAS / f"{name}.safetensors", name, strength, strength, convert_rank)


def merged(loras: list[GraphLora], base: Any, clip: Any, method: str, **settings: Any) -> tuple[Adapter, LoadedLoras]:
    loaded = lora_loader.read(loras, base, clip)
    result = merge(loaded.adapters, build_method(method, settings), [value.strength_model for value in loras])
    return loaded.finish(result.adapter), loaded


def stock_chain(loras: list[GraphLora], base: Any, clip: Any) -> tuple[Any, Any]:
    for value in loras:
        state = load_file(value.content)
        base, clip = comfy.sd.load_lora_for_models(base, clip, state, value.strength_model, value.strength_clip)
    return base, clip


def exact(base: Any, pair: tuple[str, str], stock_names: tuple[str, ...] = (), clip: Any = None) -> Callable[[], Any]:
    """LEGO at full rank (k = P) without reweighting, compared with a chain of stock loaders on the same LoRAs."""

    def case() -> Any:
        loras = [lora(pair[0], 0.7), lora(pair[1], -1.3)]
        off = {"parameter_reweight": False, "output_reweight": False}
        readable = [lora(file, value.strength_model) for file, value in zip(stock_names or pair, loras, strict=True)]
        stock, stock_clip = stock_chain(readable, base, clip)
        measured: dict[str, Any] = {}
        for geometry in ("rank-one", "paper"):
            adapter, loaded = merged(loras, base, clip, "lego", rank=12, geometry=geometry, centroid="sum", **off)
            ours, our_clip = lora_loader.apply(GraphLora(adapter, "merged"), base, clip, 1.0, 1.0)
            measured[geometry] = difference(ours, stock, base)
            if clip is not None:
                measured[f"{geometry} text encoder"] = difference(our_clip.patcher, stock_clip.patcher, clip.patcher)
        return {**measured, "dropped": loaded.dropped, "modules": sorted(adapter.modules)}

    return case


def converted(name: str, rank: int) -> Callable[[], Any]:
    """An update that is not low rank, approximated at its full rank, compared with the stock loader's."""

    def case() -> Any:
        base = FLUX
        adapter, loaded = merged([lora(name, 1.0, rank)], base, None, "concat")
        ours, _ = lora_loader.apply(GraphLora(adapter, "merged"), base, None, 1.0, 1.0)
        stock, _ = stock_chain([lora(name)], base, None)
        return {"difference": difference(ours, stock, base), "notes": loaded.notes}

    return case


def summed_differences() -> Any:
    """Full differences at half strength beside low-rank updates of the same layers, without an approximation."""
    loras = [lora("full", 0.5), lora("flux_kohya", 2.0), lora("full", -0.25)]
    adapter, loaded = merged(loras, FLUX, None, "concat")
    ours, _ = lora_loader.apply(GraphLora(adapter, "merged"), FLUX, None, 1.0, 1.0)
    stock, _ = stock_chain(loras, FLUX, None)
    return {"difference": difference(ours, stock, FLUX), "notes": loaded.notes, "diffs": sorted(adapter.diffs)}


def everything() -> Any:
    """Bias and norm differences, replaced values and unusable keys, in a file as the stock trainer writes it."""
    base = model("sd3_nano")
    name = "diffusion_model.joint_blocks.0.x_block"
    noise = torch.Generator().manual_seed(0)
    state = {
        f"{name}.attn.qkv.lora_up.weight": torch.randn(192, 2, generator=noise),
        f"{name}.attn.qkv.lora_down.weight": torch.randn(2, 64, generator=noise),
        f"{name}.attn.qkv.alpha": torch.tensor(1.0),
        f"{name}.attn.qkv.diff_b": torch.randn(192, generator=noise),
        "diffusion_model.final_layer.linear.set_weight": torch.randn(64, 64, generator=noise),
        "diffusion_model.no_such_layer.lora_up.weight": torch.ones(4, 2),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 2),
    }
    adapter, loaded = merged([GraphLora(state, "trained")], base, None, "concat")
    ours, _ = lora_loader.apply(GraphLora(adapter, "merged"), base, None, 1.0, 1.0)
    stock, _ = comfy.sd.load_lora_for_models(base, None, dict(state), 1.0, 1.0)
    return {"difference": difference(ours, stock, base), "dropped": loaded.dropped, "keys": sorted(ours.patches)}


def replaced_rows() -> Any:
    """A value set for some rows of a fused layer is set for those rows."""
    state = {"transformer.transformer_blocks.0.attn.to_k.set_weight": torch.eye(128)}
    single = "lora_unet_single_blocks_0_linear2"
    state[f"{single}.lora_up.weight"], state[f"{single}.lora_down.weight"] = torch.ones(128, 1), torch.ones(1, 640)
    adapter, _ = merged([GraphLora(state, "set")], FLUX, None, "concat")
    ours, _ = lora_loader.apply(GraphLora(adapter, "merged"), FLUX, None, 1.0, 1.0)
    stock, _ = comfy.sd.load_lora_for_models(FLUX, None, dict(state), 1.0, 1.0)
    return {"difference": difference(ours, stock, FLUX)}


def unnamed_rows() -> Any:
    """Rows of a fused layer without a name are fused into the whole layer."""
    base = FLUX
    noise = torch.Generator().manual_seed(1)

    def state(name: str, d_out: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.lora_up.weight": torch.randn(d_out, 2, generator=noise),
            f"{name}.lora_down.weight": torch.randn(2, 128, generator=noise),
        }

    loras = [
        GraphLora(state("diffusion_model.single_blocks.0.linear1", 7 * 128), "whole"),
        GraphLora(state("diffusion_model.single_blocks.0.linear1_qkv", 3 * 128), "first rows"),
    ]
    names = lora_loader._ModelLayers(base, None).names
    names._names = {t: name for t, name in names._names.items() if not (isinstance(t, tuple) and t[1] == 0)}
    original, lora_loader.LoaderNames = lora_loader.LoaderNames, lambda key_map: names
    try:
        adapter, _ = merged(loras, base, None, "concat")
    finally:
        lora_loader.LoaderNames = original
    ours, _ = lora_loader.apply(GraphLora(adapter, "merged"), base, None, 1.0, 1.0)
    stock = base
    for value in loras:
        stock, _ = comfy.sd.load_lora_for_models(stock, None, dict(value.content), 1.0, 1.0)
    return {"difference": difference(ours, stock, base), "modules": sorted(adapter.modules)}


def patched_base() -> Any:
    """A DoRA's update is computed from the model's own weights, also while another LoRA is patched into them."""
    base = FLUX
    clean, _ = merged([lora("dora", 1.0, 128)], base, None, "concat")
    other, _ = stock_chain([lora("flux_kohya")], base, None)
    other.patch_model()
    try:
        patched_in, _ = merged([lora("dora", 1.0, 128)], other, None, "concat")
    finally:
        other.unpatch_model()
    (a,), (b,) = clean.modules.values(), patched_in.modules.values()
    return {"difference": float((a.delta() - b.delta()).abs().max() / a.delta().abs().max())}


FLUX = model("flux_nano")
SD15, CLIP = checkpoint()
print(
    json.dumps(
        {
            "flux": exact(FLUX, ("flux_kohya", "flux_split"))(),
            "sd15": exact(SD15, ("sd15_kohya", "sd15_diffusers"), ("sd15_kohya", "sd15_respelled"), CLIP)(),
            "sd3": exact(model("sd3_nano"), ("sd3_kohya", "sd3_split"))(),
            "fused alone": exact(FLUX, ("flux_kohya", "flux_kohya_2"))(),
            "loha": converted("loha", 128)(),
            "lokr": converted("lokr", 128)(),
            "dora": converted("dora", 128)(),
            "full": converted("full", 128)(),
            "summed differences": summed_differences(),
            "glora": converted("glora", 128)(),
            "oft": converted("oft", 128)(),
            "boft": converted("boft", 128)(),
            "everything": everything(),
            "replaced rows": replaced_rows(),
            "unnamed rows": unnamed_rows(),
            "patched base": patched_base(),
        }
    )
)
