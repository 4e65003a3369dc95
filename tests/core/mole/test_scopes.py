"""Scopes: blocks and layers found in module trees of several model families."""

from __future__ import annotations

import torch
from legomole.core.mole.scopes import NETWORK, Scope, scopes, uncompiled
from torch import nn

from .models import InPlace, Transformer, UNet


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def names(model: nn.Module, granularity: str) -> dict[str, str]:
    return {path: scope.name for path, scope in scopes(model, layers(model), granularity).items()}


def test_a_transformer():
    found = scopes(Transformer(), ["inp", "blocks.1.attn.to_q", "blocks.1.attn.to_out.0", "blocks.1.ff.2"], "layer")
    assert found == {
        "inp": Scope(NETWORK, ""),
        "blocks.1.attn.to_q": Scope("blocks.1.attn", "blocks.1"),
        "blocks.1.attn.to_out.0": Scope("blocks.1.attn", "blocks.1"),
        "blocks.1.ff.2": Scope("blocks.1.ff", "blocks.1"),
    }


def test_granularities():
    model = Transformer()
    paths = layers(model)
    assert set(names(model, "network").values()) == {NETWORK}
    assert set(names(model, "block").values()) == {NETWORK, "blocks.0", "blocks.1"}
    assert names(model, "matrix") == {path: path for path in paths}
    assert scopes(model, paths, "matrix")["blocks.0.attn.to_q"].block == "blocks.0"
    assert set(names(model, "layer").values()) == {
        NETWORK, "blocks.0.attn", "blocks.0.ff", "blocks.1.attn", "blocks.1.ff",
    }  # fmt: skip


def test_a_u_net_has_blocks_within_blocks():
    model = UNet()
    block = names(model, "block")
    inner = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert block["conv_in"] == NETWORK
    assert block["down_blocks.0.resnets.0.conv1"] == "down_blocks.0.resnets.0"
    assert block["down_blocks.0.attentions.0.proj_in"] == "down_blocks.0.attentions.0"
    assert block[f"{inner}.attn.to_out.0"] == inner
    assert block["down_blocks.0.downsamplers.0.0"] == "down_blocks.0"  # a module with one layer is not a block
    layer = names(model, "layer")
    assert layer["down_blocks.0.resnets.0.conv1"] == "down_blocks.0.resnets.0"
    assert layer[f"{inner}.ff.0"] == f"{inner}.ff"
    assert layer["down_blocks.0.downsamplers.0.0"] == "down_blocks.0.downsamplers"


def test_streams_of_a_double_block():
    layer = names(InPlace(), "layer")
    assert layer["double_blocks.1.img.qkv"] == "double_blocks.1.img"
    assert layer["double_blocks.1.txt.mlp.0"] == "double_blocks.1.txt"
    assert names(InPlace(), "block")["double_blocks.1.txt.mlp.0"] == "double_blocks.1"


def test_a_wrapped_feed_forward():
    """``ff.net.0.proj`` as in diffusers, and ``x_block.attn.qkv`` as in ComfyUI's SD3."""

    def holding(**children: nn.Module) -> nn.Module:
        module = nn.Module()
        for name, child in children.items():
            module.add_module(name, child)
        return module

    net = nn.ModuleList([holding(proj=nn.Linear(2, 2)), nn.Identity(), nn.Linear(2, 2)])
    block = holding(ff=holding(net=net), x_block=holding(attn=holding(qkv=nn.Linear(2, 2), proj=nn.Linear(2, 2))))
    model = nn.Module()
    model.joint_blocks = nn.ModuleList([block])
    layer = names(model, "layer")
    assert layer["joint_blocks.0.ff.net.0.proj"] == layer["joint_blocks.0.ff.net.2"] == "joint_blocks.0.ff"
    assert layer["joint_blocks.0.x_block.attn.qkv"] == "joint_blocks.0.x_block.attn"


def test_a_compiled_model_is_unwrapped():
    model = Transformer()
    assert uncompiled(torch.compile(model, backend="eager")) is model
    assert uncompiled(model) is model
