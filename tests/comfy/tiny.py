"""The smallest models that the stock loaders accept, with seeded random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HIDDEN = 128  # of Flux, one attention head
CONTEXT = 768
CLIP_LAYERS = 12
BUSY_CLIP_LAYERS = (0, CLIP_LAYERS - 1)  # the others are identities, which `idle_layers` skips


class Weights(dict[str, Tensor]):
    """A state dict of seeded random weights."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def noise(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator) * scale

    def layer(self, name: str, d_out: int, d_in: int, *kernel: int, bias: bool = True) -> None:
        fan_in = d_in * (kernel[0] * kernel[1] if kernel else 1)
        self[f"{name}.weight"] = self.noise(d_out, d_in, *kernel, scale=fan_in**-0.5)
        if bias:
            self[f"{name}.bias"] = self.noise(d_out, scale=0.02)

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"], self[f"{name}.bias"] = torch.ones(width), torch.zeros(width)


def flux(depth: int = 1, single: int = 1) -> dict[str, Tensor]:
    """Return a Flux transformer (schnell) in BFL's layout."""
    w, h = Weights(1), HIDDEN
    for name, width in (("img_in", 64), ("txt_in", CONTEXT)):
        w.layer(name, h, width)
    for name, width in (("time_in", 256), ("vector_in", CONTEXT)):
        w.layer(f"{name}.in_layer", h, width)
        w.layer(f"{name}.out_layer", h, h)
    for i in range(depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            w.layer(f"{block}_mod.lin", 6 * h, h)
            w.layer(f"{block}_attn.qkv", 3 * h, h)
            w.layer(f"{block}_attn.proj", h, h)
            w.layer(f"{block}_mlp.0", 4 * h, h)
            w.layer(f"{block}_mlp.2", h, 4 * h)
            for norm in ("query_norm", "key_norm"):
                w[f"{block}_attn.norm.{norm}.scale"] = torch.ones(128)
    for i in range(single):
        block = f"single_blocks.{i}"
        w.layer(f"{block}.linear1", 7 * h, h)
        w.layer(f"{block}.linear2", h, 5 * h)
        w.layer(f"{block}.modulation.lin", 3 * h, h)
        for norm in ("query_norm", "key_norm"):
            w[f"{block}.norm.{norm}.scale"] = torch.ones(128)
    w.layer("final_layer.linear", 64, h)
    w.layer("final_layer.adaLN_modulation.1", 2 * h, h)
    return dict(w)


def sd15() -> dict[str, Tensor]:
    """Return an SD1.5 U-Net with one level, in ComfyUI's layout."""
    w, c = Weights(2), 320

    def resnet(name: str, d_in: int = c) -> None:
        w.norm(f"{name}.in_layers.0", d_in)
        w.layer(f"{name}.in_layers.2", c, d_in, 3, 3)
        w.layer(f"{name}.emb_layers.1", c, 4 * c)
        w.norm(f"{name}.out_layers.0", c)
        w.layer(f"{name}.out_layers.3", c, c, 3, 3)
        if d_in != c:
            w.layer(f"{name}.skip_connection", c, d_in, 1, 1)

    def transformer(name: str) -> None:
        block = f"{name}.transformer_blocks.0"
        w.norm(f"{name}.norm", c)
        w.layer(f"{name}.proj_in", c, c, 1, 1)
        for attn, width in (("attn1", c), ("attn2", CONTEXT)):
            w.layer(f"{block}.{attn}.to_q", c, c, bias=False)
            w.layer(f"{block}.{attn}.to_k", c, width, bias=False)
            w.layer(f"{block}.{attn}.to_v", c, width, bias=False)
            w.layer(f"{block}.{attn}.to_out.0", c, c)
        w.layer(f"{block}.ff.net.0.proj", 8 * c, c)
        w.layer(f"{block}.ff.net.2", c, 4 * c)
        for i in (1, 2, 3):
            w.norm(f"{block}.norm{i}", c)
        w.layer(f"{name}.proj_out", c, c, 1, 1)

    w.layer("time_embed.0", 4 * c, c)
    w.layer("time_embed.2", 4 * c, 4 * c)
    w.layer("input_blocks.0.0", c, 4, 3, 3)
    for i in (1, 2):
        resnet(f"input_blocks.{i}.0")
        transformer(f"input_blocks.{i}.1")
    resnet("middle_block.0")
    transformer("middle_block.1")
    resnet("middle_block.2")
    for i in (0, 1, 2):
        resnet(f"output_blocks.{i}.0", 2 * c)
        transformer(f"output_blocks.{i}.1")
    w.norm("out.0", c)
    w.layer("out.2", 4, c, 3, 3)
    return {name: tensor.half() for name, tensor in w.items()}


def sd3() -> dict[str, Tensor]:
    """Return an SD3 transformer of depth 1, in ComfyUI's layout."""
    w, h = Weights(5), 64
    w.layer("x_embedder.proj", h, 16, 2, 2)
    w["pos_embed"] = w.noise(1, 36864, h, scale=0.1)
    for name, width in (("t_embedder", 256), ("y_embedder", 2048)):
        w.layer(f"{name}.mlp.0", h, width)
        w.layer(f"{name}.mlp.2", h, h)
    w.layer("context_embedder", h, 4096)
    block = "joint_blocks.0"
    w.layer(f"{block}.x_block.adaLN_modulation.1", 6 * h, h)
    w.layer(f"{block}.x_block.attn.qkv", 3 * h, h)
    w.layer(f"{block}.x_block.attn.proj", h, h)
    w.layer(f"{block}.x_block.mlp.fc1", 4 * h, h)
    w.layer(f"{block}.x_block.mlp.fc2", h, 4 * h)
    w.layer(f"{block}.context_block.adaLN_modulation.1", 2 * h, h)
    w.layer(f"{block}.context_block.attn.qkv", 3 * h, h)
    w.layer("final_layer.linear", 64, h)
    w.layer("final_layer.adaLN_modulation.1", 2 * h, h)
    return dict(w)


def clip_l() -> dict[str, Tensor]:
    """Return a CLIP-L text encoder in float16. Two of its layers change the states."""
    w, c = Weights(3), CONTEXT
    w["text_model.embeddings.token_embedding.weight"] = w.noise(49408, c)  # tokens dominate, as in trained encoders
    w["text_model.embeddings.position_embedding.weight"] = w.noise(77, c, scale=0.2)
    for i in range(CLIP_LAYERS):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            w.layer(f"{layer}.self_attn.{name}", c, c)
        w.layer(f"{layer}.mlp.fc1", 4 * c, c)
        w.layer(f"{layer}.mlp.fc2", c, 4 * c)
        if i not in BUSY_CLIP_LAYERS:
            for name in ("self_attn.out_proj", "mlp.fc2"):
                w[f"{layer}.{name}.weight"].zero_(), w[f"{layer}.{name}.bias"].zero_()
        w.norm(f"{layer}.layer_norm1", c)
        w.norm(f"{layer}.layer_norm2", c)
    w.norm("text_model.final_layer_norm", c)
    return {name: tensor.half() for name, tensor in w.items()}


def taesd(latent_channels: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return encoder and decoder of a tiny VAE."""
    torch_state = torch.get_rng_state()
    torch.manual_seed(4)

    def conv(d_in: int, d_out: int, **kwargs: object) -> nn.Conv2d:
        return nn.Conv2d(d_in, d_out, 3, padding=1, **kwargs)  # type: ignore[arg-type]

    def block() -> nn.Module:
        module = nn.Module()
        module.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))
        return module

    def level(**kwargs: object) -> list[nn.Module]:
        return [conv(64, 64, bias=False, **kwargs), block(), block(), block()]

    encoder = nn.Sequential(
        conv(3, 64), block(), *level(stride=2), *level(stride=2), *level(stride=2), conv(64, latent_channels)
    )
    up = [[block(), block(), block(), nn.Identity(), conv(64, 64, bias=False)] for _ in range(3)]
    decoder = nn.Sequential(
        nn.Identity(), conv(latent_channels, 64), nn.Identity(), *up[0], *up[1], *up[2], block(), conv(64, 3)
    )
    torch.set_rng_state(torch_state)
    with torch.no_grad():  # for images that are not almost black
        decoder[-1].weight.mul_(20)  # type: ignore[operator]
        decoder[-1].bias.fill_(0.5)  # type: ignore[operator]
    return dict(encoder.state_dict()), dict(decoder.state_dict())


def checkpoint() -> dict[str, Tensor]:
    """Return U-Net, text encoder and VAE as one SD1.5 checkpoint."""
    encoder, decoder = taesd(4)
    parts = {
        "model.diffusion_model.": sd15(),
        "cond_stage_model.transformer.": clip_l(),
        "first_stage_model.taesd_encoder.": encoder,
        "first_stage_model.taesd_decoder.": decoder,
    }
    return {f"{prefix}{name}": tensor for prefix, part in parts.items() for name, tensor in part.items()}


def write_models(folder: Path) -> None:
    """Write all of these models to the base directory of a server."""
    encoder, decoder = taesd(16)
    for name, weights in {
        "checkpoints/sd15_nano": checkpoint(),
        "diffusion_models/flux_nano": flux(),
        "diffusion_models/sd3_nano": sd3(),
        "vae_approx/taef1_encoder": encoder,
        "vae_approx/taef1_decoder": decoder,
    }.items():
        _save(weights, folder / "models" / f"{name}.safetensors")


def _save(weights: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
