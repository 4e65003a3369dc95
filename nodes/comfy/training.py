"""Gate training and calibration inside ComfyUI: loading the model for them, and resuming an interrupted training."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from comfy.quant_ops import QUANT_ALGOS
from torch import Tensor

from ...core.digest import digest, identity, some_of
from ...core.errors import MergeError
from ...core.merge.statistics import Statistics
from ...core.mole.attach import attach
from ...core.mole.bank import Bank
from ...core.mole.gates import GateSet
from ...core.progress import Progress
from ...core.train import Images, Prompt, TrainingResult, TrainSettings, check_training, train
from ...core.train.measure import MAX_MOMENT_BYTES, CalibrationSettings, measure_statistics
from .denoiser import ComfyDenoiser, Conditioning
from .detectors import fitted_detector
from .mixture import ComfyMixture
from .sampling import encode


@dataclass(frozen=True, eq=False)
class SamplingSetup:
    """What gate training and calibration sample images with.

    Args:
        mix: The mixture, with untrained gates.
        model: The MODEL it was built for.
        clip: The CLIP, as connected.
        patched_clip: The CLIP, with the experts' text encoder modules merged into it.
        latent: Samples of a LATENT of the size to sample at.
        prompts: The prompts, see `core.train.prompts_for`.
        concepts: Per expert, the words that name it.
        cfg: Guidance scale.
        steps: Number of sampling steps.
    """

    mix: ComfyMixture
    model: Any
    clip: Any
    patched_clip: Any
    latent: Tensor
    prompts: Sequence[Prompt]
    concepts: Sequence[Sequence[str]]
    cfg: float
    steps: int

    def encode_prompts(self) -> list[Conditioning]:
        """Encode the prompts. Call it before the model is loaded: a small GPU does not hold both."""
        return [encode(self.patched_clip, prompt.text) for prompt in self.prompts]

    def fingerprint(self) -> str:
        """Return what distinguishes the trained model from others: weights, patches, LoRAs, gates and sizes."""
        mixture = self.mix.mixture
        experts, gates = [*map(identity, mixture.experts)], mixture.gates.settings.model_dump()
        shape = list(self.latent.shape[1:])
        return json.dumps([model_digest(self.model), experts, gates, mixture.strengths, shape, self.cfg, self.steps])


def model_digest(model: Any) -> str:
    """Return what distinguishes a MODEL from others: a hash of its weights and patches."""
    weights = model.model_state_dict()
    patches = repr([(key, len(patches)) for key, patches in sorted(model.patches.items())])
    return digest(some_of([weights[name] for name in sorted(weights)]), patches)


def train_gates(
    setup: SamplingSetup,
    settings: TrainSettings,
    *,
    checkpointing: bool,
    images: Mapping[int, Tensor],
    captions: Mapping[int, Conditioning],
    folder: Path,
    progress: Progress,
    keep: Callable[[TrainingResult], None],
) -> tuple[TrainingResult, tuple[str, ...]]:
    """Train the gates of a mixture on its model.

    Returns:
        The result, and sentences on concepts that the text encoders hardly tell from other words.

    Args:
        setup: The mixture, the model and the prompts.
        settings: See `core.train.train`.
        checkpointing: Recompute blocks in the backward pass, to save memory.
        images: Expert -> samples of a LATENT of its images, for the denoising objective.
        captions: Expert -> conditioning that describes its images; default the prompts that name it alone.
        folder: Folder for the state of unfinished trainings.
        progress, keep: See `core.train.train`.

    Raises:
        MergeError, FormatError: See `core.train.train`; also a model that cannot be copied.
    """
    check_training(setup.mix.mixture, setup.concepts, settings, has_images=bool(images))
    setup, notes = _with_detector(setup, progress)
    training_id = setup.fingerprint()
    training_id += digest([*images.values(), *(caption[0][0] for caption in captions.values())])
    prompts = setup.prompts
    key = [training_id, settings.model_dump(), [prompt.text for prompt in prompts], [*map(list, setup.concepts)]]
    state = folder / digest([], json.dumps(key))[:16]
    encoded = setup.encode_prompts()
    if images:  # captions come first, because the last prompt must be the empty one
        prompts = [*(Prompt(f"caption {i + 1}", (i,)) for i in captions), *prompts]
        encoded = [*captions.values(), *encoded]
    with (
        torch.inference_mode(False),
        _trainable(setup.model) as patcher,
        _denoiser(setup, patcher, encoded, checkpointing=checkpointing) as denoiser,
    ):
        result = train(
            denoiser.attachment,
            setup.mix.mixture,
            denoiser,
            prompts,
            setup.concepts,
            settings,
            base=setup.mix.base,
            identity=training_id,
            images=_images_with_prompts(images, captions, prompts, denoiser),
            folder=state,
            progress=progress,
            keep=keep,
        )
    if state.is_dir() and not any(state.iterdir()):
        state.rmdir()
    return result, notes


def _with_detector(setup: SamplingSetup, progress: Progress) -> tuple[SamplingSetup, tuple[str, ...]]:
    """Give gates that read ``text`` a concept detector; returns sentences on concepts that are hard to detect too."""
    gates = setup.mix.mixture.gates
    if gates.settings.reads != "text":
        return setup, ()
    texts = [prompt.text for prompt in setup.prompts]
    fitted = fitted_detector(
        setup.mix, setup.model, setup.clip, setup.patched_clip, setup.concepts, texts, progress=progress
    )
    mixture = replace(setup.mix.mixture, gates=GateSet(gates.experts, gates.settings, detector=fitted.detector))
    return replace(setup, mix=replace(setup.mix, mixture=mixture)), fitted.notes


def calibrate(setup: SamplingSetup, settings: CalibrationSettings, progress: Progress) -> Statistics:
    """Measure the statistics that a calibrated merge of a mixture's LoRAs needs.

    Args:
        setup: The mixture, the model and the prompts.
        settings, progress: See `measure_statistics`.

    Raises:
        MergeError: See `measure_statistics`.
    """
    mixture = setup.mix.mixture
    modules = {name: rows.key for name, rows in mixture.targets.items()}
    encoded = setup.encode_prompts()
    with _loaded(setup, settings.batch) as patcher, _denoiser(setup, patcher, encoded) as denoiser:
        return measure_statistics(
            denoiser.attachment,
            denoiser,
            setup.prompts,
            modules,
            settings,
            adapters=[*map(identity, mixture.experts)],
            strengths=mixture.strengths,
            progress=progress,
        )


@contextmanager
def _denoiser(
    setup: SamplingSetup, patcher: Any, prompts: Sequence[Conditioning], *, checkpointing: bool = False
) -> Generator[ComfyDenoiser]:
    """Attach the mixture to a loaded model, and yield the denoiser that runs it."""
    network = patcher.model.diffusion_model
    bank = Bank(network, setup.mix.mixture, dtype=patcher.model.get_dtype_inference()).to(patcher.load_device)
    with attach(network, bank, checkpointing=checkpointing) as attachment:
        yield ComfyDenoiser(patcher, attachment, prompts, setup.latent, setup.cfg, setup.steps)


@contextmanager
def _loaded(setup: SamplingSetup, batch: int) -> Generator[Any]:
    """Load the model as for sampling a batch, with memory left for the statistics."""
    patcher = setup.model.clone()
    shape = (batch, *comfy.sample.fix_empty_latent_channels(patcher, setup.latent).shape[1:])
    models = [patcher, *patcher.get_nested_additional_models()]
    comfy.model_management.load_models_gpu(models, memory_required=patcher.memory_required(shape) + MAX_MOMENT_BYTES)
    try:
        yield patcher
    finally:
        patcher.cleanup()


@contextmanager
def _trainable(model: Any) -> Generator[Any]:
    """Load a copy of the model whose tensors allow gradients, in a dtype in which gradients do not vanish."""
    try:
        patcher = model.clone(force_deepcopy=True)
    except RuntimeError as error:  # ComfyUI reads the file again, and cannot if another pack's node loaded it
        raise MergeError(
            "This model cannot be copied for training.",
            found=str(error),
            remedy="load it with one of ComfyUI's own loaders",
        ) from error
    if patcher.model.get_dtype_inference() == torch.float16:
        bf16 = comfy.model_management.should_use_bf16(patcher.load_device)
        patcher.set_model_compute_dtype(torch.bfloat16 if bf16 else torch.float32)
    patcher.model.requires_grad_(False)
    comfy.model_management.load_models_gpu([patcher], memory_required=1e20, force_full_load=True)
    _dequantise_without_backward(patcher.model)
    comfy.model_management.in_training = True  # without it ComfyUI uses kernels that have no backward pass
    try:
        with torch.enable_grad():
            yield patcher
    finally:
        comfy.model_management.in_training = False
        patcher.detach()


def _dequantise_without_backward(model: torch.nn.Module) -> None:
    """Let layers dequantise their weights before use if ComfyUI's kernel for their format has no backward pass.

    These are the formats that quantise weights but not inputs: int8, and packed int4. A layer dequantises its weight
    if it has a function to apply to it.
    """
    for module in model.modules():
        format = QUANT_ALGOS.get(getattr(module, "quant_format", ""), {})
        if not format.get("quantize_input", True):
            module.weight_function = [*module.weight_function, lambda weight: weight]  # type: ignore[assignment,misc]


def _images_with_prompts(
    images: Mapping[int, Tensor],
    captions: Mapping[int, Conditioning],
    prompts: Sequence[Prompt],
    denoiser: ComfyDenoiser,
) -> Images | None:
    """Join all experts' images, each with its caption or, in turn, with the prompts that name the expert alone."""
    if not images:
        return None
    latents: list[Tensor] = []
    numbers: list[int] = []
    for expert, samples in images.items():
        matching = [i for i, prompt in enumerate(prompts) if prompt.named == (expert,)]
        matching = matching[:1] if expert in captions else matching  # the caption is the first of them
        latents.append(denoiser.latents(samples.clone()).float().cpu())
        numbers += [matching[i % len(matching)] for i in range(len(samples))]
    return Images(torch.cat(latents), numbers)
