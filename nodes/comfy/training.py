"""Gate training and calibration inside ComfyUI: the model loaded for it, its memory, its state on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from torch import Tensor

from ...core.digest import digest, identity, some_of
from ...core.errors import MergeError
from ...core.merge.statistics import Statistics
from ...core.mole.attach import attach
from ...core.mole.bank import Bank
from ...core.train import Images, Prompt, TrainingResult, TrainSettings, train
from ...core.train.measure import MAX_MOMENT_BYTES, CalibrationSettings, measure_statistics
from .denoiser import ComfyDenoiser, Conditioning
from .mixes import Mix
from .sampling import encode


def train_gates(
    mix: Mix,
    model: Any,
    clip: Any,
    latent: Tensor,
    prompts: Sequence[Prompt],
    concepts: Sequence[Sequence[str]],
    settings: TrainSettings,
    *,
    cfg: float,
    sampling_steps: int,
    checkpointing: bool,
    images: Mapping[int, Tensor],
    captions: Mapping[int, Conditioning],
    folder: Path,
    progress: Callable[[int, int, str], None],
    keep: Callable[[TrainingResult], None],
) -> TrainingResult:
    """Train the gates of a mix on its model.

    Args:
        mix: Of untrained gates. model: The MODEL it was built for. clip: The CLIP, with the experts' parts.
        latent: A LATENT's samples of the size to train at.
        prompts, concepts, settings: See `core.train`.
        cfg: Guidance of the pictures the models paint. sampling_steps: Their steps.
        checkpointing: Save memory by computing blocks twice.
        images: Expert -> its pictures as latents, for the denoising objective.
        captions: Expert -> the conditioning that describes its pictures; default prompts that name it alone.
        folder: Where unfinished trainings are kept.
        progress: See `core.train.train`. keep: Also.
    """
    told = _identity(model, mix, latent, cfg, sampling_steps)
    told += digest([*images.values(), *(caption[0][0] for caption in captions.values())])
    key = json.dumps([told, settings.model_dump(), [p.text for p in prompts], [list(c) for c in concepts]])
    state = folder / digest([], key)[:16]
    encoded = _encoded(clip, prompts)
    if images:  # described in front: the last prompt is the empty one
        prompts = [*(Prompt(f"caption {i + 1}", (i,)) for i in captions), *prompts]
        encoded = [*captions.values(), *encoded]
    with (
        torch.inference_mode(False),
        _trainable(model) as patcher,
        _mixed(mix, patcher, encoded, latent, cfg, sampling_steps, checkpointing=checkpointing) as denoiser,
    ):
        done = train(
            denoiser.attachment,
            mix.mixture,
            denoiser,
            prompts,
            concepts,
            settings,
            base=mix.base,
            identity=told,
            images=_images(images, captions, prompts, denoiser),
            folder=state,
            progress=progress,
            keep=keep,
        )
    if state.is_dir() and not any(state.iterdir()):
        state.rmdir()
    return done


def calibrate(
    mix: Mix,
    model: Any,
    clip: Any,
    latent: Tensor,
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    *,
    cfg: float,
    sampling_steps: int,
    progress: Callable[[int, int, str], None],
) -> Statistics:
    """Measure what a calibrated merge of a mix's LoRAs needs; arguments as for `train_gates`."""
    modules = {name: place.key for name, place in mix.mixture.targets.items()}
    encoded = _encoded(clip, prompts)
    with (
        _loaded(model, latent, settings.batch) as patcher,
        _mixed(mix, patcher, encoded, latent, cfg, sampling_steps) as denoiser,
    ):
        return measure_statistics(
            denoiser.attachment, denoiser, prompts, modules, settings,
            adapters=list(map(identity, mix.mixture.experts)), strengths=mix.mixture.strengths, progress=progress,
        )  # fmt: skip


def _encoded(clip: Any, prompts: Sequence[Prompt]) -> list[Conditioning]:
    """Before the model is loaded: on a small GPU the text encoders make room for it."""
    return [encode(clip, prompt.text) for prompt in prompts]


@contextmanager
def _mixed(
    mix: Mix, patcher: Any, prompts: Sequence[Conditioning], latent: Tensor, cfg: float, steps: int, *,
    checkpointing: bool = False,
) -> Generator[ComfyDenoiser]:  # fmt: skip
    """A loaded model with the mix on it, as the engine sees a model; arguments as for `train_gates`."""
    network = patcher.model.diffusion_model
    bank = Bank(network, mix.mixture, dtype=patcher.model.get_dtype_inference()).to(patcher.load_device)
    with attach(network, bank, checkpointing=checkpointing) as attachment:
        yield ComfyDenoiser(patcher, attachment, prompts, latent, cfg, steps)


def _identity(model: Any, mix: Mix, latent: Tensor, cfg: float, steps: int) -> str:
    """What tells this training from others beside the settings: the model's weights (patches too), LoRAs, sizes."""
    weights = model.model_state_dict()
    patches = repr([(key, len(patches)) for key, patches in sorted(model.patches.items())])
    told = digest(some_of([weights[name] for name in sorted(weights)]), patches)
    experts = list(map(identity, mix.mixture.experts))
    chosen = mix.mixture.gates.settings.model_dump()
    return json.dumps([told, experts, chosen, mix.mixture.strengths, list(latent.shape[1:]), cfg, steps])


@contextmanager
def _loaded(model: Any, latent: Tensor, batch: int) -> Generator[Any]:
    """The model itself, loaded as for sampling such a batch, with room for what is measured."""
    patcher = model.clone()
    shape = (batch, *comfy.sample.fix_empty_latent_channels(patcher, latent).shape[1:])
    models = [patcher, *patcher.get_nested_additional_models()]
    comfy.model_management.load_models_gpu(models, memory_required=patcher.memory_required(shape) + MAX_MOMENT_BYTES)
    try:
        yield patcher
    finally:
        patcher.cleanup()


@contextmanager
def _trainable(model: Any) -> Generator[Any]:
    """A copy of the model whose tensors gradients may pass by, loaded, in a number format that gradients survive."""
    try:
        patcher = model.clone(force_deepcopy=True)
    except RuntimeError as error:  # ComfyUI loads the file again for it, and cannot where another pack loaded it
        raise MergeError(
            "This model cannot be copied for training.",
            found=str(error),
            remedy="load it with one of ComfyUI's own loaders",
        ) from error
    if patcher.model.get_dtype_inference() == torch.float16:  # small gradients vanish in it
        bf16 = comfy.model_management.should_use_bf16(patcher.load_device)
        patcher.set_model_compute_dtype(torch.bfloat16 if bf16 else torch.float32)
    patcher.model.requires_grad_(False)
    comfy.model_management.load_models_gpu([patcher], memory_required=1e20, force_full_load=True)
    comfy.model_management.in_training = True  # some of ComfyUI's kernels have no backward
    try:
        with torch.enable_grad():
            yield patcher
    finally:
        comfy.model_management.in_training = False
        patcher.detach()


def _images(
    images: Mapping[int, Tensor],
    captions: Mapping[int, Conditioning],
    prompts: Sequence[Prompt],
    denoiser: ComfyDenoiser,
) -> Images | None:
    """The pictures of all experts, each with its caption, else with the prompts that name the expert alone, in turn."""
    if not images:
        return None
    latents: list[Tensor] = []
    numbers: list[int] = []
    for expert, own in images.items():
        alone = [i for i, prompt in enumerate(prompts) if prompt.named == (expert,)]
        alone = alone[:1] if expert in captions else alone  # it comes first
        latents.append(denoiser.latents(own.clone()).float().cpu())
        numbers += [alone[i % len(alone)] for i in range(len(own))]
    return Images(torch.cat(latents), numbers)
