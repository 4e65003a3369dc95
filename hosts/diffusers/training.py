"""Training the gates of a mixture on a diffusers pipeline."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ...core.digest import digest, some_of
from ...core.errors import FormatError, MergeError
from ...core.mole.attach import Attachment, attach
from ...core.mole.mixture import Mixture
from ...core.mole.record import Record
from ...core.mole.router import check_concepts, concepts_in
from ...core.mole.trained import TrainedGates
from ...core.progress import Progress
from ...core.train import Devices, Images, Prompt, TrainingResult, TrainSettings, prompts_for, train
from ...core.train.fit import FitRecord
from ...core.train.frozen import frozen
from .clip import PipelineClip
from .denoiser import PipelineDenoiser
from .mixing import base_of, model_of


@dataclass(frozen=True, eq=False)
class PipelineTraining:
    """Trained gates, how it went, and what they do.

    Args:
        gates: For `TrainedGates.save`. fit: Losses and entropies, step by step.
        prompts: What was trained on. scopes: The parts of the model with a gate.
        values: ``(prompts, scopes, N)``, the gates for each prompt at the first step of a picture.
        left_out: Parts of the LoRAs that are not mixed, each with the reason.
    """

    gates: TrainedGates
    fit: FitRecord
    prompts: tuple[Prompt, ...]
    scopes: tuple[str, ...]
    values: Tensor
    left_out: tuple[str, ...]


def load_pipeline(path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline from a folder, or under its name from the local cache. Nothing is downloaded.

    Raises:
        FormatError: There is none.
    """
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the number format goes by another name in later versions
            pipe = DiffusionPipeline.from_pretrained(
                str(path), torch_dtype=dtype, local_files_only=True, use_safetensors=True
            )
    except Exception as error:  # of a damaged file its parsers raise errors of every kind
        raise FormatError(
            "The pipeline cannot be loaded.",
            file=path,
            expected="a folder in diffusers' format (with model_index.json), or a name that is in the local cache",
            found=f"{type(error).__name__}: {error}".partition("\n")[0],
            remedy="save it with pipe.save_pretrained(FOLDER), or download it first",
        ) from error
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
    paint_steps: int = 12,
    checkpointing: bool = False,
    folder: Path | None = None,
    devices: Devices | None = None,
    progress: Progress | None = None,
    keep: Callable[[TrainingResult], None] | None = None,
) -> PipelineTraining:
    """Train the gates of a mixture on a pipeline, which is left as it was.

    Args:
        pipe: See `PipelineDenoiser` for those that are supported.
        mixture: Of untrained gates; their settings say what is trained.
        concepts: Per expert, the words that name it in a prompt. texts: Prompts to train on, see `prompts_for`.
        settings: How to train.
        images: For the objective ``denoise``: Pillow images, each with a prompt that describes it.
        clip: For the objective ``clip``: a `transformers.CLIPModel` and its `CLIPProcessor`.
        size, guidance, paint_steps: Of the pictures that are painted to learn from, see `PipelineDenoiser`.
        checkpointing: Save memory by computing blocks twice.
        folder, devices, progress, keep: See `core.train.train`.

    Raises:
        MergeError: Settings, LoRAs, words or pictures that cannot be trained with.
        FormatError: `folder` holds another training.
    """
    settings = settings or TrainSettings()
    check_concepts(concepts, len(mixture.experts))
    prompts = prompts_for(concepts, texts)
    captions = [Prompt(text, tuple(i for i, hit in enumerate(row) if hit)) for text, row in _named(images, concepts)]
    _check_images(captions, mixture, concepts)
    prompts = list(dict.fromkeys([*prompts, *captions]))
    model = model_of(pipe)
    with (
        frozen([*pipe.components.values(), *(clip or ())]),
        attach(model, mixture, checkpointing=checkpointing) as attachment,
    ):
        denoiser = PipelineDenoiser(pipe, [p.text for p in prompts], size=size, guidance=guidance, steps=paint_steps)
        own = None
        if images:
            latents = torch.cat([denoiser.encode([picture]).cpu() for picture, _ in images])
            own = Images(latents, [prompts.index(caption) for caption in captions])
        height, width = denoiser.family.pixels
        done = train(
            attachment,
            mixture,
            denoiser,
            prompts,
            concepts,
            settings,
            base=base_of(pipe),
            identity=json.dumps(
                [digest(some_of(list(model.parameters()))), height, width, denoiser.family.guidance, paint_steps]
            ),
            images=own,
            clip=None if clip is None else PipelineClip(denoiser, *clip),
            folder=folder,
            devices=devices,
            progress=progress,
            keep=keep,
        )
        scopes, values = _values(attachment, denoiser, len(prompts), settings)
    return PipelineTraining(done.gates, done.fit, tuple(prompts), scopes, values, attachment.left_out)


def _named(images: Sequence[tuple[Any, str]], concepts: Sequence[Sequence[str]]) -> list[tuple[str, list[bool]]]:
    texts = [text.strip() for _, text in images]
    return list(zip(texts, concepts_in(texts, concepts).tolist(), strict=True))


def _check_images(captions: Sequence[Prompt], mixture: Mixture, concepts: Sequence[Sequence[str]]) -> None:
    if not captions:
        return
    nameless = [caption.text for caption in captions if not caption.named]
    if nameless:
        raise MergeError(
            "A picture's description names none of the LoRAs.",
            expected="the words of the LoRA that the picture is for",
            found=repr(nameless[0]),
            remedy="put the words into it",
        )
    for i, label in enumerate(mixture.labels):
        if not any(i in caption.named for caption in captions):
            raise MergeError(
                "A LoRA has no pictures to learn from, so its gates would only learn to shut.",
                file=label,
                expected=f"some pictures described with {' or '.join(map(repr, concepts[i]))}",
                found="none",
                remedy="give pictures for every LoRA, or use the objective distil, which needs none",
            )


def _values(
    attachment: Attachment, denoiser: PipelineDenoiser, prompts: int, settings: TrainSettings
) -> tuple[tuple[str, ...], Tensor]:
    """The gates at the first step of a picture, per prompt: scopes, and ``(prompts, scopes, N)``."""
    record = Record()
    with torch.no_grad(), attachment.watch(record):
        for i in range(0, prompts, settings.batch):
            numbers = range(i, min(i + settings.batch, prompts))
            denoiser.predict(denoiser.noise(len(numbers), settings.seed), torch.ones(len(numbers)), numbers)
    rows: list[Tensor] = []
    for one, start in zip(record.passes, range(0, prompts, settings.batch), strict=True):
        count = min(settings.batch, prompts - start)
        rows.append(torch.stack([one[scope].expand(count, -1) for scope in record.scopes], 1).float().cpu())
    return tuple(record.scopes), torch.cat(rows)
