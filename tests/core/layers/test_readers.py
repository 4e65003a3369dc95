"""Names by reader, and the exactness of splitting and fusing, on values by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.errors import MergeError, SaveError
from legomole.core.layers.align import align
from legomole.core.layers.families.table import Reader
from legomole.core.layers.readers import rename_for
from legomole.core.layers.resolve import copies, resolve
from legomole.core.lowrank import LowRank
from legomole.core.recipes.output import name_output
from torch import Tensor

QKV = "layers.0.attention.qkv"
SPLIT = [f"transformer.layers.0.attention.to_{x}" for x in "qkv"]


def part(d_out: int, d_in: int = 4, rank: int = 2, seed: int = 0, alpha: float | None = 3.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), alpha)


def named(adapter: Adapter, reader: Reader) -> Adapter:
    renamed = rename_for(adapter, reader)
    assert renamed is not None
    return renamed


def delta(adapter: Adapter, *names: str) -> Tensor:
    return torch.cat([adapter.modules[name].delta() for name in names])


def test_a_fused_layer_is_split_for_diffusers_and_fused_again_at_the_same_rank() -> None:
    fused = Adapter({f"diffusion_model.{QKV}": part(12)})
    split = named(fused, "diffusers")
    assert list(split.modules) == SPLIT
    assert torch.equal(delta(split, *SPLIT), delta(fused, f"diffusion_model.{QKV}"))
    kept = named(split, "comfy")
    assert kept is split  # ComfyUI reads these names too
    back = rename_for(split, "comfy", accepts=lambda name: name.startswith("lora_unet_"))
    assert back is not None
    assert back.modules[f"lora_unet_{QKV.replace('.', '_')}"].rank == 2
    assert torch.equal(delta(back, *back.modules), delta(fused, *fused.modules))


def test_parts_of_different_factors_become_blocks() -> None:
    parts = [part(4, seed=i, alpha=float(i + 1)) for i in range(3)]
    split = Adapter({f"lora_unet_layers_0_attention_to_{x}": p for x, p in zip("qkv", parts, strict=True)})
    fused = rename_for(split, "comfy", accepts=lambda name: "to_" not in name)
    assert fused is not None
    (update,) = fused.modules.values()
    assert update.rank == 6
    torch.testing.assert_close(update.delta(), torch.cat([p.delta() for p in parts]))


def test_a_missing_part_is_zero() -> None:
    only_k = Adapter({SPLIT[1]: part(4)})
    fused = rename_for(only_k, "comfy", accepts=lambda name: "to_" not in name)
    assert fused is not None
    (update,) = fused.modules.values()
    expected = torch.cat([torch.zeros(4, 4), only_k.modules[SPLIT[1]].delta(), torch.zeros(4, 4)])
    assert torch.equal(update.delta(), expected)


def test_halves_are_exchanged_where_programs_order_them_differently() -> None:
    """diffusers has scale before shift. Without another name the family could be any with such a layer."""
    modules = {"lora_unet_final_layer_adaLN_modulation_1": part(8), "lora_unet_double_blocks_0_img_mod_lin": part(24)}
    original = Adapter(modules)
    renamed = named(original, "diffusers")
    swapped = renamed.modules["transformer.norm_out.linear"].delta()
    assert torch.equal(swapped, modules["lora_unet_final_layer_adaLN_modulation_1"].delta().roll(4, 0))


def test_biases_go_with_their_rows_and_comfyui_gets_them_under_the_whole_layer() -> None:
    """It ignores biases of parts."""
    bias = torch.arange(4.0)
    adapter = Adapter({SPLIT[0]: part(4)}, {f"{SPLIT[0]}.bias": bias})
    renamed = named(adapter, "comfy")
    assert torch.equal(renamed.diffs[f"diffusion_model.{QKV}.bias"], torch.cat([bias, torch.zeros(8)]))


def test_layers_without_a_name_are_refused_by_name() -> None:
    adapter = Adapter({f"diffusion_model.{QKV}": part(12), "diffusion_model.layers.0.new_layer": part(4)})
    with pytest.raises(SaveError, match=r"ComfyUI has no names[\s\S]*layers.0.new_layer[\s\S]*family z_image"):
        rename_for(adapter, "comfy")
    text = Adapter({"lora_unet_layers_0_attention_qkv": part(12), "lora_te_layers_0_mlp_up_proj": part(4)})
    with pytest.raises(SaveError, match=r"diffusers has no names[\s\S]*lora_te_layers_0_mlp_up_proj"):
        rename_for(text, "diffusers")


def test_peft_names_layers_within_one_model() -> None:
    assert list(named(Adapter({f"diffusion_model.{QKV}": part(12)}), "peft").modules) == [
        name.removeprefix("transformer.") for name in SPLIT
    ]
    two = Adapter(
        {
            "lora_unet_down_blocks_1_attentions_0_proj_in": part(4),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": part(4),
        }
    )
    with pytest.raises(SaveError, match="belongs to one model"):
        rename_for(two, "peft")


def test_unknown_families_are_left_to_others() -> None:
    assert rename_for(Adapter({"model.layers.0.self_attn.q_proj": part(4)}), "comfy") is None


def test_names_that_could_be_of_two_families_are_those_that_comfyui_reads_in_both() -> None:
    """It reads diffusers' names for Flux, but not for HunyuanVideo."""
    fused = Adapter({"diffusion_model.double_blocks.0.img_attn.qkv": part(12)})
    split = Adapter({f"transformer.transformer_blocks.0.attn.to_{x}": part(4, seed=i) for i, x in enumerate("qkv")})
    a, b = align([fused, split])
    assert a.modules.keys() == b.modules.keys() == split.modules.keys()
    both = name_output(b, first_format="comfy", inputs=[fused, split], renamed=True)
    assert (list(both[0].modules), both[1]) == (list(fused.modules), "comfy")
    hinted = replace(fused, metadata={"ss_base_model_version": "flux1"})
    flux = name_output(b, first_format="comfy", inputs=[hinted, split], renamed=True)
    assert (flux[0].modules.keys(), flux[1]) == (split.modules.keys(), "diffusers")


def test_names_for_diffusers_that_depend_on_the_family_are_refused_where_it_is_not_sure() -> None:
    adapter = Adapter({"transformer.time_in.mlp.0": part(4)})
    with pytest.raises(SaveError, match=r"time_in.mlp.0[\s\S]*hunyuan_video or hunyuan_video15"):
        rename_for(adapter, "diffusers")


def test_comfyui_gets_a_file_rather_than_a_folder() -> None:
    names = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    bare = Adapter(dict.fromkeys(names, part(4)), metadata={"ss_base_model_version": "flux1"})
    assert name_output(bare, first_format="peft", reader="comfy")[1] == "comfy"
    assert name_output(bare, first_format="peft")[1] == "peft"


def test_own_names_are_kept_where_no_others_are_sure() -> None:
    """Flux, Qwen-Image and others have such a layer, and fuse it or not."""
    adapter = Adapter({"transformer.transformer_blocks.0.attn.to_q": part(4)})
    assert named(adapter, "comfy") is adapter


def test_one_layer_twice_in_a_file_is_counted_once() -> None:
    fused = part(12)
    copies_of_parts = {name: LowRank(fused.A, fused.B[4 * i : 4 * i + 4], fused.alpha) for i, name in enumerate(SPLIT)}
    twice = Adapter({f"diffusion_model.{QKV}": fused, **copies_of_parts}, source=Source("x.safetensors"))
    (aligned,) = align([twice])
    assert list(aligned.modules) == SPLIT
    assert copies([twice]) == [f"x holds 1 layers a second time under other names; counted once: diffusion_model.{QKV}"]
    different = Adapter({f"diffusion_model.{QKV}": fused, SPLIT[0]: part(4, seed=9)})
    with pytest.raises(MergeError, match=r"two different updates of one layer"):
        align([different])


def test_different_families_and_sizes_are_refused() -> None:
    wan = Adapter({"diffusion_model.blocks.0.self_attn.q": part(4)})
    flux = Adapter({"lora_unet_double_blocks_0_img_attn_qkv": part(12)})
    with pytest.raises(MergeError, match=r"no layer in common[\s\S]*wan[\s\S]*flux"):
        align([wan, flux])
    with pytest.raises(MergeError, match=r"different base models[\s\S]*12 and 15"):
        align([Adapter({f"diffusion_model.{QKV}": part(12)}), Adapter({SPLIT[0]: part(5)})])


def test_parts_of_one_family_need_no_layer_in_common() -> None:
    text = Adapter({"text_encoders.qwen3_06b.transformer.model.layers.0.mlp.up_proj": part(4)})
    model = Adapter({"lora_unet_blocks_0_self_attn_q_proj": part(4)})
    assert align([text, model]) == [text, model]


def test_control_loras_keep_what_widens_the_input() -> None:
    control = Adapter(
        {"img_in": part(4, d_in=8), "double_blocks.0.img_attn.qkv": part(12)},
        {},
        {
            "single_blocks.0.norm.key_norm.scale": torch.ones(3),
            "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(3),
        },
    )
    style = Adapter({"lora_unet_img_in": part(4, d_in=5), "lora_unet_double_blocks_0_img_attn_qkv": part(12)})
    a, b = align([control, style])
    wide = b.modules["diffusion_model.img_in"].delta()
    assert torch.equal(wide, torch.cat([style.modules["lora_unet_img_in"].delta(), torch.zeros(4, 3)], 1))
    extras = named(a, "comfy").extras
    assert extras["diffusion_model.img_in.reshape_weight"].tolist() == [4, 8]
    assert "diffusion_model.single_blocks.0.norm.key_norm.set_weight" in extras


def test_the_family_is_told_by_sizes_spelling_and_metadata() -> None:
    def family(names: dict[str, LowRank], **metadata: str) -> str:
        resolution = resolve([Adapter(names, metadata=metadata)])
        assert resolution is not None
        return resolution.family.name

    assert family({"lora_unet_single_blocks_0_linear1": part(28)}) == "flux"
    assert family({"lora_unet_single_blocks_0_linear1": part(36)}) == "flux2"
    assert family({"diffusion_model.layers.0.attention.qkv": part(12)}) == "z_image"
    assert family({"diffusion_model.layers.0.attention.qkv": part(20, d_in=12)}) == "lumina2"
    ambiguous = {"lora_unet_double_blocks_0_img_attn_qkv": part(12)}
    assert family(ambiguous) == "flux"
    assert family(ambiguous, **{"modelspec.architecture": "hunyuan-video/lora"}) == "hunyuan_video"
    assert family({f"lora_unet_double_blocks_{i}_img_attn_qkv": part(12) for i in range(20)}) == "hunyuan_video"
    query = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert family({query: part(4, d_in=768)}) == "sd1"
    assert family({query: part(4, d_in=1024)}) == "sd2"
    assert family({query: part(4, d_in=2048)}) == "sdxl"
