"""LoRA files for the tiny models, in the dialects of several trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, Sequence[int]]  # module -> (d_out, d_in, *kernel)

H = 128
FLUX_FUSED: Shapes = {  # kohya: q, k and v fused, as in BFL's model
    "lora_unet_double_blocks_0_img_attn_qkv": (3 * H, H),
    "lora_unet_double_blocks_0_img_mlp_0": (4 * H, H),
    "lora_unet_single_blocks_0_linear1": (7 * H, H),
    "lora_unet_single_blocks_0_linear2": (H, 5 * H),
    "lora_unet_final_layer_adaLN_modulation_1": (2 * H, H),
}
FLUX_SPLIT: Shapes = {  # diffusers: q, k and v split
    **{f"transformer.transformer_blocks.0.attn.to_{x}": (H, H) for x in "qkv"},
    "transformer.transformer_blocks.0.ff.net.0.proj": (4 * H, H),
    **{f"transformer.single_transformer_blocks.0.attn.to_{x}": (H, H) for x in "qkv"},
    "transformer.single_transformer_blocks.0.proj_mlp": (4 * H, H),
    "transformer.single_transformer_blocks.0.proj_out": (H, 5 * H),
    "transformer.norm_out.linear": (2 * H, H),  # the two layouts have its halves in different order
}
SD3_FUSED: Shapes = {
    "lora_unet_joint_blocks_0_x_block_attn_qkv": (192, 64),
    "lora_unet_joint_blocks_0_context_block_attn_qkv": (192, 64),
    "lora_unet_final_layer_adaLN_modulation_1": (128, 64),
}
SD3_SPLIT: Shapes = {
    **{f"transformer.transformer_blocks.0.attn.to_{x}": (64, 64) for x in "qkv"},
    "transformer.transformer_blocks.0.attn.add_k_proj": (64, 64),
    "transformer.norm_out.linear": (128, 64),
}
_KOHYA = "lora_unet_down_blocks_0_attentions_0"
_DIFFUSERS = "unet.down_blocks.0.attentions.0"
SD15_KOHYA: Shapes = {
    f"{_KOHYA}_proj_in": (320, 320, 1, 1),
    f"{_KOHYA}_transformer_blocks_0_attn1_to_q": (320, 320),
    f"{_KOHYA}_transformer_blocks_0_attn1_to_out_0": (320, 320),
    f"{_KOHYA}_transformer_blocks_0_attn2_to_k": (320, 768),
    f"{_KOHYA}_transformer_blocks_0_ff_net_0_proj": (2560, 320),
    "lora_unet_down_blocks_0_resnets_0_conv1": (320, 320, 3, 3),
}
SD15_DIFFUSERS: Shapes = {
    f"{_DIFFUSERS}.transformer_blocks.0.attn1.to_q": (320, 320),
    f"{_DIFFUSERS}.transformer_blocks.0.attn1.to_out.0": (320, 320),
    f"{_DIFFUSERS}.transformer_blocks.0.attn2.to_k": (320, 768),
    f"{_DIFFUSERS}.transformer_blocks.0.ff.net.0.proj": (2560, 320),
}
TE_KOHYA: Shapes = {"lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768)}
TE_DIFFUSERS: Shapes = {"text_encoder.text_model.encoder.layers.0.mlp.fc1": (3072, 768)}


def kohya(shapes: Shapes, rank: int, alpha: float, seed: int, size: float = 4.0) -> dict[str, Tensor]:
    """Return ``lora_down``, ``lora_up`` and ``alpha``. `size` is about the spectral norm of every delta."""
    state: dict[str, Tensor] = {}
    for name, (A, B) in _factors(shapes, rank, seed, size * rank / alpha).items():
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = A, B
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def peft(shapes: Shapes, rank: int, seed: int, size: float = 4.0) -> dict[str, Tensor]:
    """Return ``lora_A`` and ``lora_B``, without alpha."""
    state: dict[str, Tensor] = {}
    for name, (A, B) in _factors(shapes, rank, seed, size).items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = A, B
    return state


def _factors(shapes: Shapes, rank: int, seed: int, size: float) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (d_out, d_in, *kernel) in shapes.items():
        A = torch.randn(rank, d_in, *kernel, generator=generator)
        B = torch.randn(d_out, rank, *(1 for _ in kernel), generator=generator)
        factors[name] = A / A.flatten(1).norm(dim=1).max(), size * B / B.flatten(1).norm(dim=0).max()
    return factors


def loha(shapes: Shapes, rank: int, seed: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, (a, b) in _factors(shapes, rank, seed, 1.0).items():
        state[f"{name}.hada_w1_a"], state[f"{name}.hada_w1_b"] = b, a
        state[f"{name}.hada_w2_a"], state[f"{name}.hada_w2_b"] = 3 * b.flip(0), 3 * a.flip(1)
        state[f"{name}.alpha"] = torch.tensor(float(rank))
    return state


def lokr(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Return a LoKr whose factors are not decomposed, so that alpha has no effect."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, (d_out, d_in) in shapes.items():
        state[f"{name}.lokr_w1"] = 0.3 * torch.randn(4, 4, generator=generator)
        state[f"{name}.lokr_w2"] = 0.1 * torch.randn(d_out // 4, d_in // 4, generator=generator)
    return state


def dora(shapes: Shapes, rank: int, seed: int) -> dict[str, Tensor]:
    state = kohya(shapes, rank, float(rank), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, (d_out, *_) in shapes.items():
        state[f"{name}.dora_scale"] = 1 + 0.3 * torch.rand(d_out, 1, generator=generator)
    return state


def glora(shapes: Shapes, rank: int, seed: int) -> dict[str, Tensor]:
    """Return a GLoRA, whose update depends on the weight W: W A + B."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, (d_out, d_in) in shapes.items():
        for factor, shape in {"a1": (d_in, rank), "a2": (rank, d_in), "b1": (d_out, rank), "b2": (rank, d_in)}.items():
            state[f"{name}.{factor}.weight"] = 0.1 * torch.randn(shape, generator=generator)
        state[f"{name}.alpha"] = torch.tensor(float(rank))
    return state


def oft(shapes: Shapes, blocks: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """Return an OFT, which rotates blocks of the output, or a BOFT, which has several layers of rotations.

    Args:
        blocks: ``(blocks,)``, or ``(layers, blocks)`` for BOFT.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, (d_out, _) in shapes.items():
        size = d_out // blocks[-1]
        state[f"{name}.oft_blocks"] = 0.05 * torch.randn(*blocks, size, size, generator=generator)
        state[f"{name}.alpha"] = torch.tensor(0.0)  # limit of the rotation; 0 for none
    return state


def write_all(folder: Path) -> dict[str, str]:
    """Write the tests' LoRAs, of several ranks, dialects and kinds of update; returns short name -> file name."""
    img_mlp, img_qkv = "lora_unet_double_blocks_0_img_mlp_0", "lora_unet_double_blocks_0_img_attn_qkv"
    diffusers = peft({**SD15_DIFFUSERS, **TE_DIFFUSERS}, 8, 14)
    states = {
        "flux_kohya": kohya(FLUX_FUSED, 4, 2.0, 10),
        "flux_kohya_2": kohya(FLUX_FUSED, 8, 8.0, 11),
        "flux_split": peft(FLUX_SPLIT, 8, 12),
        "sd15_kohya": kohya({**SD15_KOHYA, **TE_KOHYA}, 4, 2.0, 13),
        "sd15_diffusers": diffusers,
        # the stock loader reads lora_unet_x_y, not diffusers' unet.x.y
        "sd15_respelled": {_respelled(key): tensor for key, tensor in diffusers.items()},
        "sd3_kohya": kohya(SD3_FUSED, 4, 2.0, 19),
        "sd3_split": peft(SD3_SPLIT, 8, 20),
        "loha": loha({img_mlp: (512, 128)}, 2, 15),
        "lokr": lokr({img_qkv: (384, 128)}, 16),
        "full": {
            f"{img_mlp}.diff": 0.1 * torch.randn(512, 128, generator=torch.Generator().manual_seed(18)),
            "transformer.transformer_blocks.0.attn.to_k.diff": 0.1 * torch.eye(128),
        },
        "dora": dora({img_mlp: (512, 128)}, 4, 17),
        "glora": glora({img_mlp: (512, 128)}, 4, 21),
        "oft": oft({img_mlp: (512, 128), img_qkv: (384, 128)}, (16,), 22),
        "boft": oft({img_mlp: (512, 128)}, (2, 64), 23),
    }
    return {name: write(folder / f"{name}.safetensors", state) for name, state in states.items()}


def _respelled(key: str) -> str:
    module, factor = key.split(".lora_")
    return f"{module.replace('unet.', 'lora_unet_').replace('.', '_') if 'unet' in module else module}.lora_{factor}"


def write(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> str:
    """Save a LoRA; returns the file name, as a loader's combo offers it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, path)
    return path.name
