"""Mixes compared with stock loaders, gradients with diffusers; see mixing.py, which ComfyUI's own Python runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import legomole
import pytest
import torch
from legomole.core.layers.keymap import MappedRows, apply_key_map
from legomole.core.mole.attach import attach
from legomole.core.mole.mixture import Mixture
from safetensors.torch import load_file
from torch import Tensor, nn

from . import tiny
from .server import Server

pytestmark = pytest.mark.comfy

ROUNDING = 3e-5  # relative to the largest change of the latent by the LoRAs


@pytest.fixture(scope="module")
def measured(measure: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return measure("mixing.py")


@pytest.mark.parametrize("base", ["flux", "sd15", "sd3"])
def test_even_gates_give_the_latent_of_the_stock_chain(measured: dict[str, Any], base: str) -> None:
    """Two trainers' names, different ranks, fused and split q, k, v, convolutions; strengths 0.7 and -1.3."""
    assert measured[base]["even"] < ROUNDING
    assert measured[base]["again"] == 0


@pytest.mark.parametrize("base", ["flux", "sd15", "sd3"])
@pytest.mark.parametrize("case", ["first alone", "second alone", "output mixing, one left"])
def test_last_expert_gives_the_latent_of_its_loader(measured: dict[str, Any], base: str, case: str) -> None:
    assert measured[base][case] < ROUNDING


@pytest.mark.parametrize("base", ["flux", "sd15", "sd3"])
def test_the_model_is_restored_bit_for_bit(measured: dict[str, Any], base: str) -> None:
    assert measured[base]["base after"] == 0
    assert measured[base]["left on base"] == 0


@pytest.mark.parametrize("base", ["flux", "sd15", "sd3"])
def test_trained_gates_follow_their_loras(measured: dict[str, Any], base: str) -> None:
    """In any order of the sockets; and the gates have an effect."""
    assert measured[base]["other order"] < ROUNDING
    assert measured[base]["gates matter"] > 0.05


@pytest.mark.parametrize(
    "case", ["loader before", "loader after", "two mixes", "bypass before", "bypass after", "hook"]
)
def test_a_mix_works_together_with(measured: dict[str, Any], case: str) -> None:
    assert measured["among others"][case] < ROUNDING


@pytest.mark.parametrize(
    "case",
    [
        *("after unloading", "after another mix", "clone", "after a clone is gone", "base after"),
        *("left when the mix is gone", "base when the mix is gone"),
    ],
)
def test_nothing_changes(measured: dict[str, Any], case: str) -> None:
    assert measured["among others"][case] == 0


def test_torch_compile_in_both_orders(measured: dict[str, Any]) -> None:
    assert measured["compiled"]["compiled, then mixed"] < ROUNDING
    assert measured["compiled"]["mixed, then compiled"] < ROUNDING
    assert measured["compiled"]["compiled base after"] == 0


def test_gates_of_the_prompt_are_recorded_not_of_the_negative_one(measured: dict[str, Any]) -> None:
    assert measured["recorded"]["difference"] < 1e-5
    assert measured["recorded"]["passes"] == 2  # as many as sampling steps
    assert measured["recorded"]["scopes"] == ["", "double_blocks.0", "single_blocks.0"]


@pytest.mark.parametrize("base", ["flux", "sd15"])
def test_the_negative_prompt_uses_the_gates_of_the_prompt(measured: dict[str, Any], base: str) -> None:
    """The same as with constant gates, whether or not both prompts share a batch."""
    case = measured[f"guided {base}"]
    assert case["one batch"] < ROUNDING
    assert case["two passes"] < ROUNDING
    assert case["it matters"] > 0.02


@pytest.mark.parametrize("base", ["flux", "sd15"])
@pytest.mark.parametrize("guider", ["PerpNeg", "DualCFG", "DualCFG nested", "DualModel", "negative prompt first"])
def test_all_prompts_of_a_guider_use_the_gates_of_the_positive_one(
    measured: dict[str, Any], base: str, guider: str
) -> None:
    case = measured[f"guided {base}"]
    assert case[guider] < ROUNDING
    assert case[f"{guider}, one by one"] < ROUNDING


@pytest.mark.parametrize("base", ["flux", "sd15"])
def test_a_negative_prompt_that_names_a_lora_uses_its_own_gate(measured: dict[str, Any], base: str) -> None:
    assert measured[f"guided {base}"]["negative prompt names a LoRA"] > 100 * ROUNDING


def test_prompts_of_different_lengths_have_their_own_gates(measured: dict[str, Any]) -> None:
    assert measured["lengths"]["difference"] < 1e-5
    assert measured["lengths"]["clean"] < 1e-5


# ---- gradients


def flux_of_diffusers() -> nn.Module:
    """Return the tiny Flux in diffusers: fused layers are split, the halves of the last modulation are swapped."""
    model = pytest.importorskip("diffusers").FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=1,
        attention_head_dim=128,
        joint_attention_dim=768,
        pooled_projection_dim=768,
        guidance_embeds=False,
    )
    w, h = tiny.flux(), tiny.HIDDEN
    state: dict[str, Tensor] = {}

    def put(target: str, source: str, start: int | None = None, stop: int | None = None) -> None:
        for kind in ("weight", "bias"):
            state[f"{target}.{kind}"] = w[f"{source}.{kind}"][start:stop]

    put("x_embedder", "img_in"), put("context_embedder", "txt_in")
    for name, target in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder")):
        put(f"time_text_embed.{target}.linear_1", f"{name}.in_layer")
        put(f"time_text_embed.{target}.linear_2", f"{name}.out_layer")
    block, own = "transformer_blocks.0", "double_blocks.0"
    put(f"{block}.norm1.linear", f"{own}.img_mod.lin"), put(f"{block}.norm1_context.linear", f"{own}.txt_mod.lin")
    for stream, names in {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}.items():
        for i, name in enumerate(names):
            put(f"{block}.attn.{name}", f"{own}.{stream}_attn.qkv", i * h, (i + 1) * h)
    put(f"{block}.attn.to_out.0", f"{own}.img_attn.proj"), put(f"{block}.attn.to_add_out", f"{own}.txt_attn.proj")
    for target, stream in (("ff", "img"), ("ff_context", "txt")):
        (
            put(f"{block}.{target}.net.0.proj", f"{own}.{stream}_mlp.0"),
            put(f"{block}.{target}.net.2", f"{own}.{stream}_mlp.2"),
        )
    block, own = "single_transformer_blocks.0", "single_blocks.0"
    put(f"{block}.norm.linear", f"{own}.modulation.lin"), put(f"{block}.proj_out", f"{own}.linear2")
    for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
        put(f"{block}.{name}", f"{own}.linear1", i * h, (i + 1) * h)
    put(f"{block}.proj_mlp", f"{own}.linear1", 3 * h, 7 * h)
    put("proj_out", "final_layer.linear")
    for kind in ("weight", "bias"):
        shift, scale = w[f"final_layer.adaLN_modulation.1.{kind}"].chunk(2)
        state[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("norm_" in name and "weight" in name for name in missing)  # the norms of q and k are ones in both
    return model


# diffusers splits this layer only at the widths of the real Flux
_SINGLE, _H = "transformer.single_transformer_blocks.0", tiny.HIDDEN
NARROW_FLUX = {
    "lora_unet_single_blocks_0_linear1": (
        *(MappedRows(f"{_SINGLE}.attn.to_{x}", ((i * _H, (i + 1) * _H),)) for i, x in enumerate("qkv")),
        MappedRows(f"{_SINGLE}.proj_mlp", ((3 * _H, 7 * _H),)),
    )
}


def sd3_of_diffusers() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    model = diffusers.SD3Transformer2DModel(
        sample_size=128,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=64,
        joint_attention_dim=4096,
        caption_projection_dim=64,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=192,
    )
    model.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(tiny.sd3()))
    return model


def run_flux(model: nn.Module, x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
    b, c, height, width = x.shape
    packed = x.view(b, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(height / 2), torch.arange(width / 2))
    out = model(
        hidden_states=packed,
        encoder_hidden_states=context,
        pooled_projections=y,
        timestep=t,
        img_ids=ids,
        txt_ids=torch.zeros(context.shape[1], 3),
    ).sample
    return out.view(b, height // 2, width // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def run_sd3(model: nn.Module, x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
    return model(hidden_states=x, encoder_hidden_states=context, pooled_projections=y, timestep=t).sample


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # raised inside the libraries
@pytest.mark.parametrize("base", ["flux", "sd3"])
def test_gradients_agree_with_diffusers(comfy: Server, measured: dict[str, Any], base: str) -> None:
    """The same weights, LoRAs, inputs and gates in another implementation; ComfyUI's Flux has in-place operations."""
    pytest.importorskip("diffusers")
    from legomole.hosts.diffusers.layer_names import key_map

    saved = load_file(comfy.base / f"gradients_{base}.safetensors")
    model = (flux_of_diffusers() if base == "flux" else sd3_of_diffusers()).requires_grad_(False)
    loras = [legomole.load(comfy.loras / f"{base}_{kind}.safetensors") for kind in ("kohya", "split")]
    names = {**key_map(loras), **(NARROW_FLUX if base == "flux" else {})}
    g = torch.tensor([[0.8, 0.3], [0.2, 1.1]], requires_grad=True)
    with attach(model, Mixture(tuple(apply_key_map(lora, names) for lora in loras))) as attachment, attachment.hold(g):
        run = run_flux if base == "flux" else run_sd3
        out = run(model, saved["x"], saved["t"], saved["context"], saved["y"])
    loss = (out - saved["target"]).square().mean()
    loss.backward()
    for checkpointing in (False, True):
        torch.testing.assert_close(loss.detach(), saved[f"loss {checkpointing}"], rtol=1e-4, atol=0)
        expected = saved[f"gradient {checkpointing}"]
        assert (g.grad - expected).abs().max() < 1e-4 * expected.abs().max()
