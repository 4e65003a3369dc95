"""Train the gates of a mixture: one function over everything in this folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..digest import digest
from ..errors import MergeError
from ..mole.attach import Attachment
from ..mole.gates import GateSet
from ..mole.mixture import Mixture
from ..mole.router import check_concepts, concepts_in, route_gates
from ..mole.trained import Expert
from ..progress import Progress
from .denoiser import Denoiser
from .examples import Examples, Images, make_examples
from .features import scale_features, standardise_features
from .fit import Devices, FitRecord, read_state
from .learn import TrainingResult, check_trainable, learn
from .objectives import Clip, ClipGuidance, Regression
from .prompts import Prompt, prompts_for
from .settings import FitSettings, TrainSettings
from .texts import Text, train_on_texts

__all__ = [
    "Clip", "Denoiser", "Devices", "FitSettings", "Images", "Prompt", "Text", "TrainSettings", "TrainingResult",
    "prompts_for", "train", "train_on_texts",
]  # fmt: skip

_CALIBRATED_ON = 64  # examples


def train(
    attachment: Attachment,
    mixture: Mixture,
    denoiser: Denoiser,
    prompts: Sequence[Prompt],
    concepts: Sequence[Sequence[str]],
    settings: TrainSettings,
    *,
    base: str = "",
    identity: str = "",
    images: Images | None = None,
    clip: Clip | None = None,
    folder: Path | None = None,
    devices: Devices | None = None,
    progress: Progress | None = None,
    keep: Callable[[TrainingResult], None] | None = None,
) -> TrainingResult:
    """Train gates for a mixture. The base model and the LoRAs are not changed.

    Args:
        attachment: The mixture on the model.
        mixture: The same mixture. denoiser: Runs the model; its prompts are `prompts`, in order.
        prompts: See `prompts_for`. concepts: Per expert, the words that name it.
        settings: The objective, and how to train.
        base: The kind of model, for the gates' file. identity: What else tells this training from others (the model's
            file, the size of the pictures).
        images: For ``denoise``. clip: For ``clip``.
        folder: Where examples and state are kept, so that an interrupted training goes on where it was. It is emptied
            of them at the end.
        devices: See `fit`.
        progress: Called with (done, in all, what is going on). May raise to cancel.
        keep: Called with what was learnt so far when the training is interrupted.

    Raises:
        MergeError: Nothing to learn from (images, a CLIP model or a LoRA missing), or numbers that are not finite.
        FormatError: `folder` holds another training.
    """
    _check(mixture, concepts, settings, images, clip)
    experts = tuple(Expert.of(adapter) for adapter in mixture.experts)
    record = {
        "settings": settings.model_dump(),
        "prompts": [prompt.text for prompt in prompts],
        "concepts": [list(words) for words in concepts],
        "strengths": [strength * mixture.scale for strength in mixture.strengths],
    }
    described = json.dumps(
        [record, [e.sha256 for e in experts], mixture.gates.settings.model_dump(), mixture.mixing, base, identity]
        + ([] if images is None else [digest([images.latents]), list(images.prompt)])
    )
    key = digest([], described)

    trained = partial(TrainingResult.of, experts=experts, base=base, record=record)
    if settings.objective == "router":
        gates = _routed(attachment, denoiser, prompts, concepts, settings, progress)
        attachment.use(gates)
        return trained(gates, FitRecord())
    if folder is not None:
        read_state(folder, key)  # another training's folder is refused before anything is painted
    examples = _examples(attachment, denoiser, prompts, settings, images, folder, key, devices, progress)
    rows = list(range(min(len(examples), _CALIBRATED_ON)))
    standardise_features(attachment, _predicting(denoiser, examples, rows, settings.batch))
    if settings.objective == "distil" and mixture.gates.settings.reads == "text":
        # from even gates the few directions in which prompts differ are found late or never
        attachment.use(scale_features(_routed(attachment, denoiser, prompts, concepts, settings, progress)))
    if settings.objective == "clip":
        assert clip is not None
        objective = ClipGuidance(denoiser, examples, prompts, concepts, clip)
    else:
        objective = Regression(denoiser, examples)
    return learn(
        attachment, objective, settings, trained,
        key=key, folder=folder, devices=devices, progress=progress, keep=keep,
    )  # fmt: skip


def _check(
    mixture: Mixture,
    concepts: Sequence[Sequence[str]],
    settings: TrainSettings,
    images: Images | None,
    clip: Clip | None,
) -> None:
    check_concepts(concepts, len(mixture.experts))
    check_trainable(mixture)
    if settings.objective == "denoise" and images is None:
        raise MergeError(
            "The denoising objective needs pictures.",
            expected="some images (latents) per LoRA, each with its prompt",
            found="none",
            remedy="give some, or use the objective distil, which needs none",
        )
    if settings.objective == "clip" and clip is None:
        raise MergeError(
            "CLIP guidance needs a CLIP model.", found="none", remedy="give one, or use the objective distil"
        )


def _examples(
    attachment: Attachment,
    denoiser: Denoiser,
    prompts: Sequence[Prompt],
    settings: TrainSettings,
    images: Images | None,
    folder: Path | None,
    key: str,
    devices: Devices | None,
    progress: Progress | None,
) -> Examples:
    path = None if folder is None else folder / "examples.safetensors"
    if path is not None and (kept := Examples.load(path, key)) is not None:
        return kept
    made = make_examples(attachment, denoiser, prompts, settings, images=images, progress=progress)
    if path is not None and (devices is None or devices.rank == 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path, key)
    return made


def _predicting(denoiser: Denoiser, examples: Examples, rows: Sequence[int], batch: int) -> Callable[[], None]:
    def run() -> None:
        for i in range(0, len(rows), batch):
            part = rows[i : i + batch]
            denoiser.predict(examples.noisy[part], examples.t[part], examples.prompt[part].tolist())

    return run


def _routed(
    attachment: Attachment,
    denoiser: Denoiser,
    prompts: Sequence[Prompt],
    concepts: Sequence[Sequence[str]],
    settings: TrainSettings,
    progress: Progress | None,
) -> GateSet:
    """Every prompt once through the model, to see its conditioning; then least squares."""
    seen: list[Tensor] = []
    scopes = list(dict.fromkeys(scope.name for scope in attachment.bank.scopes.values()))

    def collect(scope: str, f: Tensor, owner: Tensor | None) -> None:
        if scope == scopes[0]:
            seen.append(f.float().cpu())

    latents: Tensor | None = None
    for i in range(len(prompts)):  # one at a time: a host may run prompts of other lengths in another order
        if latents is None:
            with torch.no_grad(), attachment.hold([0.0] * attachment.bank.experts):
                latents = denoiser.sample([i], settings.seed)  # any picture will do
        with torch.no_grad(), attachment.watch_inputs(collect):
            denoiser.predict(latents, torch.full((1,), 0.5), [i])
        if progress is not None:
            progress(i + 1, len(prompts), "reading the prompts")
    asked = concepts_in([prompt.text for prompt in prompts], concepts)
    return route_gates(torch.cat(seen), asked, attachment.bank.gates.settings, scopes)
