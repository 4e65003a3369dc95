"""Regions and steps in whole pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import legomole
import pytest
import torch
from legomole.core.errors import MergeError
from torch import Tensor

from .tiny_pipelines import OF_LANGUAGE_MODELS, PIPELINES, build, ddim, lora

# deprecations inside the libraries
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

KINDS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "conv1", "proj_in", "net.0.proj", "linear_1", "linear")
LEFT = torch.zeros(32, 32)
LEFT[:, :16] = 1


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def sample(pipe: Any, mixture: legomole.Mixture, *, inputs: dict[str, Any] | None = None, **options: Any) -> Tensor:
    g = torch.Generator().manual_seed(5)
    size = ({"height": 32, "width": 32} if hasattr(pipe, "transformer") else {}) | (inputs or {})
    with legomole.mixed(pipe, mixture, **options):
        return pipe(
            ["heart in ember style"], num_inference_steps=3, generator=g, output_type="latent", **size
        ).images  # fmt: skip


def two_experts(pipe: Any) -> legomole.Mixture:
    return legomole.Mixture(legomole.experts(pipe, [lora(pipe, seed, kinds=KINDS) for seed in (1, 2)]))


@pytest.mark.parametrize("name", [*PIPELINES, *OF_LANGUAGE_MODELS])
def test_ones_zeros_and_halves(name: str) -> None:
    """Ones equal no map bit for bit, zeros the LoRA switched off; halves are neither."""
    pipe = build(name)
    mixture = two_experts(pipe)
    plain, off = sample(pipe, mixture), sample(pipe, mixture.without(0))
    assert torch.equal(sample(pipe, mixture, regions=[torch.ones(8, 8), torch.ones(3, 5)]), plain)
    near(sample(pipe, mixture, regions=[torch.zeros(8, 8), None]), off)
    half = sample(pipe, mixture, regions=[LEFT, 1 - LEFT])
    for other in (plain, off):
        assert (half - other).abs().mean() > 1e-3 * other.abs().mean()


def controlnet(pipe: Any) -> Any:
    """A ControlNet of the pipeline's model, with random weights where its residuals leave it."""
    if hasattr(pipe, "transformer"):
        net = diffusers.SD3ControlNetModel.from_transformer(
            pipe.transformer, num_layers=1, num_extra_conditioning_channels=0
        )
    else:
        net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    g = torch.Generator().manual_seed(4)
    for path, parameter in net.named_parameters():
        if path.startswith("controlnet_") and path.endswith("weight"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)
    return net


CONTROLLED: dict[str, tuple[Any, str]] = {
    "SD 1.5": (diffusers.StableDiffusionControlNetPipeline, "image"),
    "SD3": (diffusers.StableDiffusion3ControlNetPipeline, "control_image"),
}


@pytest.mark.parametrize("name", CONTROLLED)
def test_ones_zeros_and_halves_beside_a_controlnet(name: str) -> None:
    """A ControlNet's residuals are added everywhere, also where no LoRA acts."""
    pipe, (kind, argument) = build(name), CONTROLLED[name]
    # in float64, because the residuals magnify rounding: in float32 it is 1.3e-4 on processors with matrix units
    controlled = kind(**pipe.components, controlnet=controlnet(pipe)).to(torch.float64)
    picture = {argument: torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))}
    mixture = two_experts(pipe)
    plain, off = (sample(controlled, m, inputs=picture) for m in (mixture, mixture.without(0)))
    without = sample(controlled, mixture, inputs={**picture, "controlnet_conditioning_scale": 0.0})
    assert not torch.allclose(plain, without, atol=1e-3)
    assert torch.equal(sample(controlled, mixture, inputs=picture, regions=[torch.ones(8, 8), torch.ones(3, 5)]), plain)
    near(sample(controlled, mixture, inputs=picture, regions=[torch.zeros(8, 8), None]), off)
    half = sample(controlled, mixture, inputs=picture, regions=[LEFT, 1 - LEFT])
    for other in (plain, off):
        assert (half - other).abs().mean() > 1e-3 * other.abs().mean()


@pytest.mark.parametrize("name", ["SD 1.5", "SD3", "Lumina2"])
def test_steps_switch_loras_on_and_off(name: str) -> None:
    """A LoRA that begins at the end of the run, or acts in no step, is off; a part of the steps is neither."""
    pipe = build(name, ddim() if name == "SD 1.5" else None)
    mixture = two_experts(pipe)
    plain, off = sample(pipe, mixture), sample(pipe, mixture.without(0))
    for part in ((1.0, 1.0), (0.5, 0.5)):
        found = sample_with_steps(pipe, mixture, [part, (0, 1)])
        near(found, off)
    first = sample_with_steps(pipe, mixture, [(0, 0.3), (0, 1)])
    assert (first - off).abs().mean() > 1e-3
    assert (first - plain).abs().mean() > 1e-3


def sample_with_steps(pipe: Any, mixture: legomole.Mixture, parts: list[tuple[float, float]]) -> Tensor:
    return sample(pipe, legomole.Mixture(mixture.experts, steps=parts))


def test_a_language_model_has_no_regions() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    layer = model.model.layers[0].self_attn.q_proj
    part = legomole.LowRank(torch.zeros(1, 8), torch.zeros(layer.weight.shape[0], 1))
    mixture = legomole.Mixture([legomole.Adapter({"model.layers.0.self_attn.q_proj": part})])
    with pytest.raises(MergeError, match="Regions and steps are for pictures"):
        legomole.mixed(model, mixture, regions=[LEFT])
