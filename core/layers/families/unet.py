"""Stable Diffusion 1, 2 and XL: U-Nets, whose canonical names are those of Stability's code.

diffusers numbers blocks and the layers within them; Stability numbers all layers along the network. With two residual
blocks per resolution, layer `i` of block `x` is ``input_blocks[1 + 3 x + i]`` on the way down, ``output_blocks[3 x +
i]`` on the way up.
"""

from __future__ import annotations

from collections.abc import Sequence

from .encoders import clip
from .table import Component, Family, Naming, dialect

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}
_ATTENTION = (
    "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0 "
    "ff.net.0.proj ff.net.2 norm1 norm2 norm3"
)
_OUTER = "proj_in proj_out norm"
_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
_ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def _unet(down: Sequence[bool], up: Sequence[bool], *, added: bool, kohya: str) -> Component:
    """A U-Net.

    Args:
        down: For each resolution on the way down, whether there is attention.
        up: The same on the way up.
        added: Whether there is an embedding of further conditions.
        kohya: Naming that kohya's programs use, ``diffusers`` or ``""`` for Stability's.
    """
    names: dict[str, tuple[str, dict[str, str]]] = {"": ("", {**_TOP, **(_ADDED if added else {})})}

    def attention(block: str, canonical: str) -> None:
        names[block] = canonical, {_OUTER: "="}
        names[f"{block}.transformer_blocks.#"] = f"{canonical}.transformer_blocks.#", {_ATTENTION: "="}

    for x, attends in enumerate(down):
        for i in range(2):
            names[f"down_blocks.{x}.resnets.{i}"] = f"input_blocks.{1 + 3 * x + i}.0", _RESNET
            if attends:
                attention(f"down_blocks.{x}.attentions.{i}", f"input_blocks.{1 + 3 * x + i}.1")
        if x < len(down) - 1:
            names[f"down_blocks.{x}.downsamplers.0"] = f"input_blocks.{3 * x + 3}.0", {"conv": "op"}
    attention("mid_block.attentions.0", "middle_block.1")
    for i in range(2):
        names[f"mid_block.resnets.{i}"] = f"middle_block.{2 * i}", _RESNET
    for x, attends in enumerate(up):
        for i in range(3):
            names[f"up_blocks.{x}.resnets.{i}"] = f"output_blocks.{3 * x + i}.0", _RESNET
            if attends:
                attention(f"up_blocks.{x}.attentions.{i}", f"output_blocks.{3 * x + i}.1")
        if x < len(up) - 1:
            names[f"up_blocks.{x}.upsamplers.0"] = f"output_blocks.{3 * x + 2}.{1 + attends}", {"conv": "conv"}
    layers = {
        block: " ".join(
            name if target == "=" else target for aliases, target in table.items() for name in aliases.split()
        )
        for block, table in names.values()
    }
    naming: Naming = names
    flat, flat_diffusers = "comfy", "comfy"
    if kohya == "diffusers":
        flat_diffusers += " kohya"
    else:
        flat += " kohya"
    return Component(
        "diffusion_model.",
        layers,
        (
            # kohya's spelling of diffusers' names goes first, because all programs of users read it
            dialect("lora_unet_", "diffusers", readers=flat_diffusers),
            dialect("lora_unet_", readers=flat),
            dialect("diffusion_model.", readers="comfy"),
            dialect("lycoris_", "diffusers", readers="comfy"),
            dialect("unet.", "diffusers", readers="diffusers"),
            dialect("", "diffusers"),
            dialect("unet."),  # OneTrainer
        ),
        {"diffusers": naming},
    )


_SD1 = _unet((True, True, True, False), (False, True, True, True), added=False, kohya="diffusers")
_SDXL = _unet((False, True, True), (True, True, False), added=True, kohya="")

SD1 = Family(
    "sd1",
    _SD1,
    (clip("clip_l", kohya="lora_te_", diffusers="text_encoder."),),
    widths={"attn2.to_k": (768,)},
    hints=("sd_v1", "stable-diffusion-v1"),
)
SD2 = Family(
    "sd2",
    _SD1,
    (clip("clip_h", kohya="lora_te_", diffusers="text_encoder."),),
    widths={"attn2.to_k": (1024,)},
    hints=("sd_v2", "stable-diffusion-v2"),
)
SDXL = Family(
    "sdxl",
    _SDXL,
    (
        clip("clip_l", kohya="lora_te1_", diffusers="text_encoder.", others=("clip_l.",)),
        clip("clip_g", kohya="lora_te2_", diffusers="text_encoder_2.", others=("clip_g.",)),
    ),
    widths={"attn2.to_k": (2048,)},
    hints=("sdxl", "stable-diffusion-xl"),
)
