"""Mixtures on diffusers pipelines, compared with diffusers' own LoRA loading, encoders and samplers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.formats import load, save
from legomole.core.lowrank import LowRank
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.record import Record
from legomole.core.mole.trained import Expert, TrainedGates
from legomole.hosts.base_model import base_model_name
from legomole.hosts.diffusers.layer_names import to_kohya
from legomole.hosts.diffusers.mixing import denoising_model, experts, load_gates, mixed, prompt_rows, routed
from torch import Tensor

from ...core.mole.mixtures import gradients, random_detector
from . import tiny_pipelines as tiny

# deprecations inside the libraries, and PEFT's notice that `proj_out` also matches the end of another layer's name
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")

SIZE = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}


def sample(pipe: Any, prompt: str | list[str] = "a heart in ember", **options: Any) -> Tensor:
    """Sample latents from a fixed seed."""
    return pipe(prompt, generator=torch.Generator().manual_seed(1), **SIZE, **options).images


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_gates_equal_diffusers_own_lora_loading(name: str, tmp_path: Path) -> None:
    """One open gate equals that LoRA alone, two equal both; detaching restores the base model bit for bit."""
    pipe = tiny.build(name)
    loras = [tiny.lora(pipe, 1, kinds=(*tiny.LAYERS, "proj_in", "conv1")), tiny.lora(pipe, 2, rank=2)]
    paths = [save(lora, tmp_path / f"{i}", format="diffusers") for i, lora in enumerate(loras)]
    base = sample(pipe)
    with attach(denoising_model(pipe), Mixture(experts(pipe, [load(path) for path in paths]))) as attachment:
        both = sample(pipe)
        with attachment.hold([0.0, 1.0]):
            second = sample(pipe)
    assert torch.equal(sample(pipe), base)
    for i, path in enumerate(paths):
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name=str(i))
    pipe.set_adapters(["0", "1"])
    assert_near(both, sample(pipe))
    pipe.set_adapters(["1"])
    assert_near(second, sample(pipe))
    assert float((second - base).abs().max()) > 1e-2 * float(base.abs().max())


def kohya_sd(pipe: Any) -> Adapter:
    return to_kohya(tiny.lora(pipe, 1))


def kohya_flux(pipe: Any) -> Adapter:
    """The fused layers of kohya's Flux files: one of them covers three of the model's."""
    g = torch.Generator().manual_seed(1)
    rows = {"lora_unet_double_blocks_0_img_attn_qkv": 48, "lora_unet_double_blocks_0_txt_attn_proj": 16}
    return Adapter(
        {
            name: LowRank(torch.randn(2, 16, generator=g), torch.randn(n, 2, generator=g), 1.0)
            for name, n in rows.items()
        }
    )


@pytest.mark.parametrize(
    ("name", "made"), [("SD 1.5", kohya_sd), ("SDXL", kohya_sd), ("Flux", kohya_flux)], ids=["SD 1.5", "SDXL", "Flux"]
)
def test_kohya_files(name: str, made: Any, tmp_path: Path) -> None:
    pipe = tiny.build(name)
    path = save(made(pipe), tmp_path / "x", format="kohya")
    with attach(denoising_model(pipe), Mixture(experts(pipe, [load(path)]))):
        found = sample(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert_near(found, sample(pipe))


def test_text_encoder_layers_are_reported_not_dropped() -> None:
    pipe = tiny.build("SD 1.5")
    lora = tiny.lora(pipe, 1)
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    text = LowRank(torch.ones(1, 8), torch.ones(16, 1))
    with pytest.warns(UserWarning, match="adapter: 1 layers belong to text encoders and are not mixed"):
        found = experts(pipe, [Adapter({**lora.modules, layer: text})])
    with attach(pipe.unet, Mixture(found)) as attachment:
        (left,) = attachment.left_out
    assert left == f"{layer} of adapter: it belongs to a text encoder"
    with pytest.raises(MergeError, match="text encoders only"):
        experts(pipe, [Adapter({layer: text})])


@pytest.mark.parametrize("wrong", ["another architecture", "unknown layer"])
def test_a_lora_for_another_model_is_refused(wrong: str) -> None:
    pipe = tiny.build("SD 1.5")
    lora = tiny.lora(tiny.build("Flux"), 1) if wrong == "another architecture" else tiny.lora(pipe, 1)
    if wrong == "unknown layer":
        lora = Adapter({**lora.modules, "lora_unet_no_such_layer": LowRank(torch.ones(1, 8), torch.ones(8, 1))})
    with pytest.raises(MergeError, match=r"another base model[\s\S]*layers of UNet2DConditionModel"):
        experts(pipe, [lora])


def text_gates(features: int, quiet: bool = False, **settings: Any) -> GateSet:
    """One random gate for the whole model, reading the text conditioning.

    Args:
        features: Width of the text conditioning.
        quiet: Whether its detector finds no concept (a presence of at most 0.5) in any of the prompts of these tests.
        settings: Settings of the gates.
    """
    chosen = GateSettings(granularity="network", **settings)
    detector = random_detector(2, features) if chosen.reads == "text" else None
    if detector is not None and quiet:
        detector.bias.sub_(4.5)
    gate = Gate(features if detector is None else 2, 2, chosen)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(0)))
        gate.weight.mul_(10 if detector is not None and quiet else 1)
    return GateSet(2, chosen, {"": gate}, detector)


@pytest.mark.parametrize("reads", ["text", "text-mean"])
def test_each_row_of_a_guided_batch_has_its_own_gates(reads: str) -> None:
    """Negative prompts come first in the batch. Without `prompt_rows` each row's gates read its own conditioning."""
    pipe = tiny.build("SD 1.5")
    mixture = Mixture([tiny.lora(pipe, 1), tiny.lora(pipe, 2)], text_gates(8, quiet=True, reads=reads))
    whole, positive = Record(), Record(rows=prompt_rows(pipe))
    with attach(pipe.unet, mixture) as attachment:
        with attachment.watch(whole):
            found = sample(pipe, ["a heart", "ember"], negative_prompt=["blur", "x"])
        with attachment.watch(positive):
            sample(pipe, ["a heart", "ember"])
        texts = torch.cat([pipe.encode_prompt(p, "cpu", 1, False)[0] for p in ("blur", "x", "a heart", "ember")])
        f = texts.mean(1) if mixture.gates.detector is None else mixture.gates.detector(texts)
        assert (
            reads == "text-mean" or float(f.detach().max()) < 0.5
        )  # no concept is named, not by the negative prompts either
        expected = mixture.gates[""](f)
        for one in whole.passes:
            torch.testing.assert_close(one[""], expected)
        assert all(torch.equal(one[""], whole.passes[0][""][2:]) for one in positive.passes)
        with attachment.hold(expected.detach()):
            assert_near(found, sample(pipe, ["a heart", "ember"], negative_prompt=["blur", "x"]))
        with attachment.hold(expected.detach()[2:].repeat(2, 1)):
            following = sample(pipe, ["a heart", "ember"], negative_prompt=["blur", "x"])
    assert float((expected[2] - expected[3]).detach().abs().max()) > 0.05
    with attach(pipe.unet, mixture, prompt_rows=prompt_rows(pipe)):
        assert_near(sample(pipe, ["a heart", "ember"], negative_prompt=["blur", "x"]), following)


def test_checkpointing_recomputes_blocks_and_changes_no_gradient() -> None:
    pipe = tiny.build("SD 1.5")
    mixture = Mixture([tiny.lora(pipe, 1), tiny.lora(pipe, 2)], text_gates(8))
    text = pipe.encode_prompt("a heart", "cpu", 1, False)[0].detach()
    runs: list[int] = []
    layer = next(module for name, module in pipe.unet.named_modules() if name.endswith("attn1.to_q"))
    layer.register_forward_hook(lambda *_: runs.append(1))
    t = torch.tensor([500])
    found: list[Tensor] = []
    for checkpointing, expected in ((False, 1), (True, 2)):
        runs.clear()
        with mixed(pipe, mixture, checkpointing=checkpointing) as attachment:
            found += gradients(
                attachment,
                lambda: pipe.unet(torch.ones(1, 4, 8, 8), t, encoder_hidden_states=text).sample.square().mean(),
            ).values()
        assert len(runs) == expected
    for plain, recomputed in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        torch.testing.assert_close(recomputed, plain)
        assert float(plain.abs().max()) > 0


# ---- the prompt router


def recorded(pipe: Any, mixture: Mixture, prompt: str | list[str], **options: Any) -> list[list[list[float]]]:
    """Gates of every forward pass under the router, per row."""
    record = Record()
    with routed(pipe, mixture, [["ember", "burning"], ["heart"]]) as attachment, attachment.watch(record):
        sample(pipe, prompt, **options)
    return [next(iter(one.values())).tolist() for one in record.passes]


OFF, EMBER, HEART, BOTH = [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "SD3"])
def test_the_router_opens_the_gates_each_prompt_names(name: str) -> None:
    pipe = tiny.build(name)
    mixture = Mixture([tiny.lora(pipe, 1), tiny.lora(pipe, 2)])
    assert recorded(pipe, mixture, "a heart", negative_prompt="ember, x") == [[BOTH, HEART]] * 2  # it names the other
    rows = recorded(pipe, mixture, ["a Heart", "ember hearts", "hearts"], num_images_per_prompt=2)
    passes = [HEART, HEART, EMBER, EMBER, OFF, OFF] * 2  # negative prompts, which follow the prompts, then the prompts
    assert rows == [passes] * 2
    together = torch.tensor(recorded(pipe, mixture, "burning heart", guidance_scale=1.0))
    torch.testing.assert_close(together, torch.full((2, 1, 2), 1.2))  # several LoRAs in a prompt are louder
    assert recorded(pipe, mixture, "x", negative_prompt="heart") == [[HEART, OFF]] * 2  # it names the LoRA itself
    assert recorded(pipe, mixture, "heart", negative_prompt="x") == [[HEART, HEART]] * 2
    assert "encode_prompt" not in pipe.__dict__
    assert not denoising_model(pipe)._forward_pre_hooks


def test_the_router_with_guidance_in_two_passes() -> None:
    pipe = tiny.build("Flux")
    mixture = Mixture([tiny.lora(pipe, 1), tiny.lora(pipe, 2)])
    assert recorded(pipe, mixture, "a heart", negative_prompt="", true_cfg_scale=2.0) == [[HEART], [HEART]] * 2
    assert recorded(pipe, mixture, "a heart", negative_prompt="ember", true_cfg_scale=2.0) == [[HEART], [BOTH]] * 2


def test_the_router_equals_held_gates() -> None:
    pipe = tiny.build("SD 1.5")
    mixture = Mixture([tiny.lora(pipe, 1), tiny.lora(pipe, 2)], text_gates(8))
    with routed(pipe, mixture, [["ember"], ["heart"]]):
        found = sample(pipe, "a heart")
    with attach(pipe.unet, mixture) as attachment, attachment.hold(HEART):
        assert_near(found, sample(pipe, "a heart"))


def test_the_router_gives_shares_for_softmax_gates() -> None:
    pipe = tiny.build("SD 1.5")
    null = Mixture([tiny.lora(pipe, 1), tiny.lora(pipe, 2)], GateSet(2, GateSettings(activation="softmax-null")))
    assert recorded(pipe, null, "burning heart") == [[[0.5, 0.5], [0.5, 0.5]]] * 2


def test_the_router_refuses_unknown_conditioning_and_compiled_models() -> None:
    pipe = tiny.build("SD 1.5")
    mixture = Mixture([tiny.lora(pipe, 1), tiny.lora(pipe, 2)])
    text = torch.randn(1, tiny.TOKENS, 8)
    with routed(pipe, mixture, [["ember"], ["heart"]]), pytest.raises(MergeError, match="which prompt"):
        sample(pipe, None, prompt_embeds=text, negative_prompt_embeds=text)  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="2 lists"), routed(pipe, mixture, [["ember"]]):
        pass
    pipe.unet.compile(backend="eager")
    with pytest.raises(MergeError, match="compiled"), routed(pipe, mixture, [["ember"], ["heart"]]):
        pass


# ---- gate files, offloading


def test_gate_files_match_adapters_and_model(tmp_path: Path) -> None:
    pipe = tiny.build("SD 1.5")
    paths = [save(to_kohya(tiny.lora(pipe, i)), tmp_path / f"{i}") for i in (1, 2)]
    loras = experts(pipe, [load(path) for path in paths])
    gates = text_gates(8)
    TrainedGates(gates, tuple(map(Expert.of, loras)), base_model_name(pipe.unet)).save(tmp_path / "gates.safetensors")
    turned = load_gates(pipe, tmp_path / "gates.safetensors", loras[::-1])
    assert torch.equal(turned[""].weight, gates[""].weight.flip(0))
    with pytest.raises(
        MergeError, match=r"another kind of model[\s\S]*UNet2DConditionModel[\s\S]*SD3Transformer2DModel"
    ):
        load_gates(tiny.build("SD3"), tmp_path / "gates.safetensors", loras)
    with pytest.raises(MergeError, match="other LoRAs"):
        load_gates(pipe, tmp_path / "gates.safetensors", [tiny.lora(pipe, 3)])


@pytest.mark.parametrize("order", ["attached first", "offloaded first"])
def test_gates_work_on_every_call_of_an_offloaded_pipeline(order: str) -> None:
    """diffusers removes and reinstalls its hooks after each call."""
    pipe = tiny.build("SD 1.5")
    mixture = Mixture([tiny.lora(pipe, 1), tiny.lora(pipe, 2)], text_gates(8))
    prompts: Sequence[str] = ("a heart", "ember", "x")
    base = sample(pipe)
    with attach(pipe.unet, mixture):
        expected = [sample(pipe, prompt) for prompt in prompts]
    if order == "offloaded first":
        pipe.enable_model_cpu_offload(device="cpu")
    with attach(pipe.unet, mixture):
        if order == "attached first":
            pipe.enable_model_cpu_offload(device="cpu")
        found = [sample(pipe, prompt) for prompt in prompts]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(sample(pipe), base)
    pipe.remove_all_hooks()
    assert torch.equal(sample(pipe), base)


def test_a_pipeline_without_a_model_is_refused() -> None:
    with pytest.raises(MergeError, match="neither"):
        denoising_model(diffusers.DiffusionPipeline())
