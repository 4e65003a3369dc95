"""Gate training on diffusers pipelines. The denoiser is compared with the pipelines' own sampling loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from legomole.core.errors import MergeError
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import TrainSettings
from legomole.hosts.diffusers.clip import PipelineClip
from legomole.hosts.diffusers.denoiser import PipelineDenoiser
from legomole.hosts.diffusers.training import train_gates
from PIL import Image
from torch import Tensor, nn

from ...core.mole.mixtures import random_detector
from . import tiny_pipelines as tiny

# deprecations inside the libraries
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

WORDS = [["ember"], ["heart"]]
FEW = {"examples": 32, "samples": 24, "batch": 4, "warmup": 2, "learning_rate": 0.1}


def mixed(pipe: Any, **settings: Any) -> Mixture:
    return Mixture([tiny.lora(pipe, 1), tiny.lora(pipe, 2)], GateSet(2, GateSettings(**settings)))


# ---- the denoiser

QUARTERS = [1.0, 0.75, 0.5, 0.25]
SCHEDULES = {
    "SD 1.5, noise": ("SD 1.5", tiny.ddim, {}),
    "SD 1.5, v": ("SD 1.5", lambda: tiny.ddim(prediction_type="v_prediction"), {}),
    "SDXL": ("SDXL", tiny.ddim, {}),
    "SD3, shifted": ("SD3", lambda: None, {"sigmas": QUARTERS}),
    "Flux, shifted by size": ("Flux", lambda: None, {"sigmas": QUARTERS}),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_it_samples_what_the_pipeline_samples(case: str) -> None:
    """Guidance, conditioning, times and solver equal those of diffusers' loop (DDIM is Euler's method)."""
    name, scheduler, options = SCHEDULES[case]
    pipe = tiny.build(name, scheduler())
    prompts = ["a heart", "", "ember"]
    denoiser = PipelineDenoiser(pipe, prompts, size=(16, 24), steps=4)
    with torch.no_grad():
        found = denoiser.sample([2, 0], seed=3)
    expected = pipe(
        ["ember", "a heart"], latents=denoiser.noise(2, 3), height=16, width=24, num_inference_steps=4,
        output_type="latent", **options,
    ).images  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("case", SCHEDULES)
def test_noise_goal_and_clean_agree(case: str) -> None:
    name, scheduler, _ = SCHEDULES[case]
    denoiser = PipelineDenoiser(tiny.build(name, scheduler()), [""], size=(16, 16))
    x, n = denoiser.noise(4, 0), denoiser.noise(4, 1)
    t = torch.tensor([0.04, 0.3, 0.7, 1.0])
    noisy, goal = denoiser.noised(x, t, n), denoiser.goal(x, t, n)
    torch.testing.assert_close(denoiser.clean(noisy, t, goal), x, rtol=1e-4, atol=1e-5)
    if case == "SD 1.5, noise":
        torch.testing.assert_close(goal, n)
    if name in ("SD3", "Flux"):
        torch.testing.assert_close(goal, n - x)
        torch.testing.assert_close(noisy[3], n[3])


def test_times_follow_the_scheduler() -> None:
    """Hand-computed: shift 3 maps 1/2 to ``3 / 2 / (1 + 2 / 2) = 3/4``; DDIM's alpha at the last of 1000 steps."""
    flow = PipelineDenoiser(tiny.build("SD3"), [""], size=(16, 16)).schedule
    assert flow.timestep(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0, 750, 1000])
    noise = PipelineDenoiser(tiny.build("SD 1.5"), [""], size=(16, 16)).schedule
    assert noise.timestep(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 499, 999]
    assert noise.coefficients(torch.tensor([1.0]))[0].item() == pytest.approx(0.0047**0.5, rel=0.01)


def test_the_default_size_is_the_pipelines_own() -> None:
    assert PipelineDenoiser(tiny.build("SD 1.5"), [""]).family.pixels == (16, 16)
    assert PipelineDenoiser(tiny.build("SDXL"), [""]).family.pixels == (16, 16)
    with pytest.raises(MergeError, match="multiples of 4"):
        PipelineDenoiser(tiny.build("Flux"), [""], size=(16, 18))


def test_models_with_a_guidance_input_run_one_pass() -> None:
    """As for LCM: no second pass, and another scale gives other samples."""
    pipe = tiny.build("SD 1.5")
    pipe.unet = tiny.unet(cross_attention_dim=8, time_cond_proj_dim=8).eval()
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append(len(kwargs["sample"])), with_kwargs=True)
    x = [PipelineDenoiser(pipe, [""], size=(16, 16), steps=2, guidance=scale).sample([0], 0) for scale in (2.0, 8.0)]
    assert calls == [1] * 4
    assert not torch.equal(*x)


def test_long_and_short_prompts_share_a_batch() -> None:
    """Text encoders pad and truncate all prompts to one length."""
    pipe = tiny.build("Flux")
    denoiser = PipelineDenoiser(pipe, ["", "heart " * 200], size=(16, 16))
    x, t = denoiser.noise(2, 0), torch.tensor([0.5, 0.5])
    together = denoiser.predict(x, t, [0, 1])
    apart = torch.cat([denoiser.predict(x[i : i + 1], t[:1], [i]) for i in (0, 1)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_other_pipelines_and_schedulers_are_refused() -> None:
    with pytest.raises(MergeError, match=r"this pipeline[\s\S]*StableDiffusionXLPipeline[\s\S]*DDPMPipeline"):
        PipelineDenoiser(diffusers.DDPMPipeline(None, tiny.ddim()), [""])
    with pytest.raises(MergeError, match=r"this scheduler[\s\S]*prediction type sample"):
        PipelineDenoiser(tiny.build("SD 1.5", tiny.ddim(prediction_type="sample")), [""])


@pytest.mark.parametrize("name", ["SD 1.5", "Flux"])
def test_images_are_encoded_and_decoded_as_in_the_pipeline(name: str) -> None:
    pipe = tiny.build(name)
    denoiser = PipelineDenoiser(pipe, [""], size=(16, 16))
    latents = denoiser.noise(2, 0)
    found = pipe(
        ["", ""], latents=latents, height=16, width=16, num_inference_steps=1, output_type="latent"
    ).images  # the clean latents of the last step
    decoded = pipe(["", ""], latents=latents, height=16, width=16, num_inference_steps=1, output_type="pt").images
    torch.testing.assert_close((denoiser.decode(found) / 2 + 0.5).clamp(0, 1), decoded, rtol=1e-4, atol=1e-5)
    # the tiny VAE's encoder does not invert its decoder, so the expected latents of one image are computed by hand
    image = Image.new("RGB", (16, 16), (255, 0, 128))
    x = torch.tensor([1.0, -1.0, 2 * 128 / 255 - 1]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    z = pipe.vae.encode(x).latent_dist.mode()
    z = (z - (pipe.vae.config.shift_factor or 0)) * 0.5
    if name == "Flux":
        z = z.reshape(1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(1, 16, 4)
    torch.testing.assert_close(denoiser.encode([image]), z)


# ---- training


def weights(pipe: Any) -> dict[str, Tensor]:
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
    return {f"{k}.{n}": t.clone() for k, part in parts.items() for n, t in part.state_dict().items()}


@pytest.mark.parametrize("name", ["SD 1.5", "Flux"])
def test_training_lowers_the_loss(name: str) -> None:
    """Of gates that start evenly; those that read text start near the goal."""
    pipe = tiny.build(name)
    mixture = mixed(pipe, reads="hidden")
    few = {**FEW, "examples": 8, "batch": 8, "learning_rate": 0.05}  # every step sees all examples
    settings = TrainSettings(**few, steps=40)
    result = train_gates(pipe, mixture, WORDS, settings=settings, size=(16, 16), sampling_steps=2)
    losses = torch.tensor(result.fit.losses)
    assert float(losses[-4:].mean()) < 0.7 * float(losses[:4].mean())


@pytest.mark.parametrize("name", ["SD 1.5", "Flux"])
def test_training_changes_nothing_but_gates(name: str) -> None:
    pipe = tiny.build(name)
    before, mixture = weights(pipe), mixed(pipe)
    factors = [part.A.clone() for lora in mixture.experts for part in lora.modules.values()]
    model = getattr(pipe, tiny.component(pipe))
    model.train()
    settings = TrainSettings(**FEW, steps=20)
    result = train_gates(pipe, mixture, WORDS, settings=settings, size=(16, 16), sampling_steps=2)
    assert result.gates.base == type(model).__name__
    # a LoRA's gates are larger for prompts that name it than for prompts that name the other
    alone = [result.values[[p.named == (i,) for p in result.prompts]].mean((0, 1)) for i in (0, 1)]
    assert float(alone[0][0] - alone[1][0]) > 0.1
    after = weights(pipe)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert not pipe.vae.training
    now = [part.A for lora in mixture.experts for part in lora.modules.values()]
    assert all(torch.equal(a, b) for a, b in zip(now, factors, strict=True))


@pytest.mark.parametrize("reads", ["text", "text-mean"])
def test_values_are_the_gates_outputs_per_prompt(reads: str) -> None:
    pipe = tiny.build("SD 1.5")
    settings = TrainSettings(**FEW, steps=3)
    result = train_gates(
        pipe, mixed(pipe, reads=reads), WORDS, ["ember and heart"], settings, size=(16, 16), sampling_steps=1
    )
    for prompt, values in zip(result.prompts, result.values, strict=True):
        text = pipe.encode_prompt(prompt.text, "cpu", 1, False)[0]
        f = text.mean(1) if reads == "text-mean" else result.gates.gates.detector(text)
        for scope, value in zip(result.scopes, values, strict=True):
            torch.testing.assert_close(result.gates.gates[scope](f)[0], value)
    assert result.prompts[0].named == (0, 1)


@pytest.mark.parametrize(
    ("reads", "checkpointing"), [("experts", False), ("hidden", True)], ids=["experts", "hidden, checkpointing"]
)
def test_other_kinds_of_gates_train(reads: str, checkpointing: bool) -> None:
    pipe = tiny.build("SD 1.5")
    settings = TrainSettings(**FEW, steps=4)
    mixture = mixed(pipe, reads=reads, granularity="block", activation="softmax")
    result = train_gates(
        pipe, mixture, WORDS, settings=settings, size=(16, 16), sampling_steps=1, checkpointing=checkpointing
    )
    torch.testing.assert_close(result.values.sum(-1), torch.ones(result.values.shape[:2]))
    assert float(result.values.std()) > 0


def test_images_are_learnt_from_by_their_noise() -> None:
    """The targets of the user's images are the noise added to them; a description may be a new prompt."""
    pipe = tiny.build("SD 1.5")
    g = torch.Generator().manual_seed(0)
    pixels = [Image.fromarray(torch.randint(256, (20, 16, 3), generator=g).byte().numpy()) for _ in range(2)]
    images = list(zip(pixels, ["the old ember", "heart"], strict=True))
    settings = TrainSettings(**FEW, steps=6, objective="denoise")
    result = train_gates(pipe, mixed(pipe), WORDS, settings=settings, images=images, size=(16, 16), sampling_steps=1)
    assert [p.named for p in result.prompts if p.text in ("the old ember", "heart")] == [(1,), (0,)]
    # the tiny model predicts almost nothing, so the loss is about the noise's variance on two of three examples
    assert result.fit.losses[0] == pytest.approx(2 / 3, rel=0.5)
    with pytest.raises(MergeError, match=r"no images to learn from[\s\S]*'heart'"):
        train_gates(pipe, mixed(pipe), WORDS, settings=settings, images=images[:1], size=(16, 16))
    with pytest.raises(MergeError, match="names none of the LoRAs"):
        train_gates(pipe, mixed(pipe), WORDS, settings=settings, images=[(pixels[0], "a dog")], size=(16, 16))


def test_the_models_dtype_is_kept() -> None:
    """A bfloat16 model gets bfloat16 inputs; latents, losses and gates are float32."""
    pipe = tiny.build("SD 1.5").to(torch.bfloat16)
    dtypes: set[torch.dtype] = set()
    pipe.unet.register_forward_pre_hook(lambda _, __, kwargs: dtypes.add(kwargs["sample"].dtype), with_kwargs=True)
    result = train_gates(
        pipe, mixed(pipe), WORDS, settings=TrainSettings(**FEW, steps=2), size=(16, 16), sampling_steps=1
    )
    assert dtypes == {torch.bfloat16}
    assert pipe.unet.dtype == torch.bfloat16
    assert {p.dtype for p in result.gates.gates.parameters()} == {torch.float32}
    assert torch.isfinite(torch.tensor(result.fit.losses)).all()


def test_words_that_the_text_encoders_hardly_know_have_a_note() -> None:
    pipe = tiny.build("SD 1.5")  # with random text encoders
    settings = TrainSettings(objective="router")
    result = train_gates(pipe, mixed(pipe), WORDS, settings=settings, size=(16, 16), sampling_steps=1)
    assert any("hardly tell 'heart' from other words" in note for note in result.notes)
    assert result.gates.gates.detector is not None
    assert result.gates.gates.detector.words == (("ember",), ("heart",))
    others = train_gates(pipe, mixed(pipe, reads="text-mean"), WORDS, settings=settings, size=(16, 16))
    assert others.notes == ()
    assert others.gates.gates.detector is None


def test_a_detector_that_the_mixture_has_is_used() -> None:
    pipe = tiny.build("SD 1.5")
    detector = random_detector(2, 8, words=[["ember"], ["love"]])
    loras = [tiny.lora(pipe, 1), tiny.lora(pipe, 2)]
    mixture = Mixture(loras, GateSet(2, GateSettings(), detector=detector))
    result = train_gates(pipe, mixture, WORDS, settings=TrainSettings(objective="router"), size=(16, 16))
    found = result.gates.gates.detector
    assert found is not None
    assert found.words == (("ember",), ("love",))
    assert torch.equal(found.weight, detector.weight)
    assert result.notes == ()


def test_every_lora_needs_words() -> None:
    pipe = tiny.build("SD 1.5")
    with pytest.raises(MergeError, match=r"words[\s\S]*2 lists"):
        train_gates(pipe, mixed(pipe), [["ember"]])


# ---- CLIP guidance


def test_clip_inputs_equal_its_processors() -> None:
    pipe = tiny.build("SD 1.5")
    denoiser = PipelineDenoiser(pipe, [""], size=(12, 12))
    model, processor = tiny.clip()
    clip = PipelineClip(denoiser, model, processor)
    latents = denoiser.noise(2, 0).requires_grad_()
    found = clip.images(latents)
    images = (denoiser.decode(latents).detach() / 2 + 0.5).clamp(0, 1)
    pixels = processor.image_processor(
        images=list(images), do_rescale=False, do_resize=False, return_tensors="pt"
    ).pixel_values
    features = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found, nn.functional.normalize(features, dim=-1), rtol=1e-3, atol=1e-4)
    found[:, 0].sum().backward()
    assert float(latents.grad.abs().max()) > 0
    tokens = processor.tokenizer(["a heart in ember"], return_tensors="pt")
    text = nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    for _ in range(2):  # the second time from the cache
        torch.testing.assert_close(clip.texts(["x", "a heart in ember"])[1:], text, rtol=1e-4, atol=1e-5)


def test_clip_guidance_changes_gates_only() -> None:
    pipe, clip = tiny.build("SD 1.5"), tiny.clip()
    before = weights(pipe) | {f"clip.{k}": v.clone() for k, v in clip[0].state_dict().items()}
    settings = TrainSettings(**FEW, steps=4, objective="clip")
    result = train_gates(pipe, mixed(pipe), WORDS, settings=settings, clip=clip, size=(12, 12), sampling_steps=1)
    assert all(0 < loss < 4 for loss in result.fit.losses)
    assert float((result.values - 1).abs().max()) > 1e-3
    after = weights(pipe) | {f"clip.{k}": v for k, v in clip[0].state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert all(p.grad is None for p in clip[0].parameters())


def test_gradients_reach_gates_only() -> None:
    """diffusers leaves requires_grad on for the model; `train_gates` turns it off meanwhile."""
    pipe = tiny.build("SD 1.5")
    required: list[bool] = []
    pipe.unet.register_forward_pre_hook(
        lambda *_: required.append(any(p.requires_grad for p in pipe.unet.parameters()))
    )
    train_gates(pipe, mixed(pipe), WORDS, settings=TrainSettings(**FEW, steps=1), size=(16, 16), sampling_steps=1)
    assert required
    assert not any(required)
    mixture = mixed(pipe)
    with attach(pipe.unet, mixture) as attachment:
        assert all(p.requires_grad for p in attachment.bank.parameters_of_gates)
