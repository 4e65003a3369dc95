"""Train the gates of a mixture on a diffusers pipeline."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ...core.errors import MergeError
from ...core.mole.attach import Attachment, attach
from ...core.mole.gates import GateSet
from ...core.mole.mixture import Mixture
from ...core.mole.record import Record
from ...core.mole.router import check_concepts, concepts_in
from ...core.progress import Progress
from ...core.train import Devices, Images, Prompt, TrainingResult, TrainSettings, fit_detector, prompts_for, train
from ...core.train.frozen import frozen
from ..base_model import base_model_name, weights_digest
from ..hub import split_revision
from ..loading import format_errors
from .clip import PipelineClip
from .denoiser import PipelineDenoiser, PipelinePromptEncoder
from .mixing import denoising_model


@dataclass(frozen=True, eq=False)
class PipelineTraining(TrainingResult):
    """Result of a training on a pipeline: trained gates, losses, and the gates' values per prompt.

    Args:
        prompts: The training prompts.
        scopes: The parts of the model that have a gate.
        values: ``(prompts, scopes, N)`` float32, gate values per prompt at the first sampling step.
        left_out: Parts of the adapters that are not mixed, each with the reason.
        notes: Sentences on concepts that the text encoders hardly tell from other words.
    """

    prompts: tuple[Prompt, ...]
    scopes: tuple[str, ...]
    values: Tensor
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def load_pipeline(path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Load a pipeline from a folder, or by its name from the local Hugging Face cache. Downloads nothing.

    Args:
        path: Folder, or name: ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` with a branch, tag or commit.
        device: Device the pipeline is moved to.
        dtype: Dtype of its weights.

    Raises:
        FormatError: The folder or name does not exist, or is damaged.
    """
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with (
        format_errors(
            "The pipeline cannot be loaded.",
            path,
            expected="a folder in diffusers' format (with model_index.json), or a name that is in the local cache",
            remedy="save it with pipe.save_pretrained(FOLDER), or download it first",
        ),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # later versions of diffusers rename torch_dtype
        name, revision = (str(path), None) if Path(path).is_dir() else split_revision(str(path))
        pipe = DiffusionPipeline.from_pretrained(
            name, revision=revision, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def train_gates(
    pipe: Any,
    mixture: Mixture,
    concepts: Sequence[Sequence[str]],
    texts: Sequence[str] = (),
    settings: TrainSettings | None = None,
    *,
    images: Sequence[tuple[Any, str]] = (),
    clip: tuple[Any, Any] | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    sampling_steps: int = 12,
    checkpointing: bool = False,
    folder: Path | None = None,
    devices: Devices | None = None,
    progress: Progress | None = None,
    keep: Callable[[TrainingResult], None] | None = None,
) -> PipelineTraining:
    """Train the gates of a mixture on a pipeline. The pipeline is left unchanged.

    Args:
        pipe: The pipeline; `PipelineDenoiser` lists the supported classes.
        mixture: A mixture with untrained gates, whose settings say which gates are trained.
        concepts: Per expert, the words that name it in a prompt.
        texts: Training prompts, see `prompts_for`.
        settings: Training settings.
        images: For the objective ``denoise``: pairs of a Pillow image and a prompt that describes it.
        clip: For the objective ``clip``: a `transformers.CLIPModel` and its `CLIPProcessor`.
        size: Height and width in pixels of the images that are sampled to learn from, see `PipelineDenoiser`.
        guidance: Their guidance scale, see `PipelineDenoiser`.
        sampling_steps: Number of sampling steps per image.
        checkpointing: Recompute blocks in the backward pass to save memory.
        folder, devices, progress, keep: See `core.train.train`.

    Raises:
        MergeError: The settings, adapters, words or images cannot be used for training.
        FormatError: `folder` holds another training.
    """
    settings = settings or TrainSettings()
    check_concepts(concepts, len(mixture.experts))
    prompts = prompts_for(concepts, texts)
    captions = _captions(images, concepts)
    _check_captions(captions, mixture, concepts)
    prompts = list(dict.fromkeys([*prompts, *captions]))
    model = denoising_model(pipe)
    notes: tuple[str, ...] = ()
    if mixture.gates.settings.reads == "text" and mixture.gates.detector is None:
        texts = [prompt.text for prompt in prompts]
        detector, notes = fit_detector(concepts, PipelinePromptEncoder(pipe), texts, progress=progress)
        mixture = replace(mixture, gates=GateSet(len(mixture.experts), mixture.gates.settings, detector=detector))
    with (
        frozen([*pipe.components.values(), *(clip or ())]),
        attach(model, mixture, checkpointing=checkpointing) as attachment,
    ):
        denoiser = PipelineDenoiser(pipe, [p.text for p in prompts], size=size, guidance=guidance, steps=sampling_steps)
        training_images = None
        if images:
            latents = torch.cat([denoiser.encode([image]).cpu() for image, _ in images])
            training_images = Images(latents, [prompts.index(caption) for caption in captions])
        height, width = denoiser.family.pixels
        result = train(
            attachment,
            mixture,
            denoiser,
            prompts,
            concepts,
            settings,
            base=base_model_name(model),
            identity=json.dumps([weights_digest(model), height, width, denoiser.family.guidance, sampling_steps]),
            images=training_images,
            clip=None if clip is None else PipelineClip(denoiser, *clip),
            folder=folder,
            devices=devices,
            progress=progress,
            keep=keep,
        )
        scopes, values = _gate_values(attachment, denoiser, len(prompts), settings)
    return PipelineTraining(result.gates, result.fit, tuple(prompts), scopes, values, attachment.left_out, notes)


def _captions(images: Sequence[tuple[Any, str]], concepts: Sequence[Sequence[str]]) -> list[Prompt]:
    """The images' descriptions as prompts."""
    texts = [text.strip() for _, text in images]
    rows = concepts_in(texts, concepts).tolist()
    return [Prompt(text, tuple(i for i, hit in enumerate(row) if hit)) for text, row in zip(texts, rows, strict=True)]


def _check_captions(captions: Sequence[Prompt], mixture: Mixture, concepts: Sequence[Sequence[str]]) -> None:
    """Raise MergeError unless every caption names a LoRA and every LoRA is named; no captions at all are fine."""
    if not captions:
        return
    nameless = [caption.text for caption in captions if not caption.named]
    if nameless:
        raise MergeError(
            "An image's description names none of the LoRAs.",
            expected="the words of the LoRA that the image is for",
            found=repr(nameless[0]),
            remedy="add these words to the description",
        )
    for i, label in enumerate(mixture.labels):
        if not any(i in caption.named for caption in captions):
            raise MergeError(
                "A LoRA has no images to learn from, so its gates would only learn to close.",
                file=label,
                expected=f"some images described with {' or '.join(map(repr, concepts[i]))}",
                found="none",
                remedy="give images for every LoRA, or use the objective distil, which needs none",
            )


def _gate_values(
    attachment: Attachment, denoiser: PipelineDenoiser, prompts: int, settings: TrainSettings
) -> tuple[tuple[str, ...], Tensor]:
    """Gate values at the first sampling step: the scopes, and ``(prompts, scopes, N)`` float32 on the CPU."""
    record = Record()
    starts = range(0, prompts, settings.batch)
    with torch.no_grad(), attachment.watch(record):
        for start in starts:
            numbers = range(start, min(start + settings.batch, prompts))
            denoiser.predict(denoiser.noise(len(numbers), settings.seed), torch.ones(len(numbers)), numbers)
    rows: list[Tensor] = []
    for gates, start in zip(record.passes, starts, strict=True):
        count = min(settings.batch, prompts - start)
        rows.append(torch.stack([gates[scope].expand(count, -1) for scope in record.scopes], 1).float().cpu())
    return tuple(record.scopes), torch.cat(rows)
