"""Train the gates of a diffusion model: by distillation, on a user's images, by CLIP guidance, or by the router."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..digest import digest
from ..errors import MergeError
from ..mole.attach import Attachment
from ..mole.gates import READS_TEXT, GateSet
from ..mole.mixture import Mixture
from ..mole.router import check_concepts, concepts_in, route_gates, route_mean_gates
from ..progress import Progress
from .denoiser import Denoiser
from .examples import Examples, Images, make_examples
from .features import MEASURED_EXAMPLES, scale_features, standardise_features
from .fit import Devices, FitRecord
from .objectives import Clip, ClipGuidance, Regression
from .prompts import Prompt
from .settings import TrainSettings
from .training import EXAMPLES_FILE, TrainingResult, TrainingRun, check_trainable


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
        attachment: The mixture on the model. mixture: The same mixture. Gates that read ``text`` need its concept
            detector, see `fit_detector`.
        denoiser: Runs the model; its prompts are `prompts`, in order.
        prompts: See `prompts_for`.
        concepts: Per expert, the words that name it.
        settings: The objective and the settings of the fit.
        base: The kind of model, for the gates' file.
        identity: Anything else that distinguishes this training from others (model file, image size).
        images: For the objective ``denoise``. clip: For the objective ``clip``.
        folder: Folder for examples and state, so that an interrupted training can be resumed; they are removed at the
            end.
        devices: See `fit`.
        progress: Called with (done, total, description). May raise an exception to cancel.
        keep: Called with the result so far if the training is interrupted.

    Raises:
        MergeError: Missing images, CLIP model or LoRA, or values that are not finite.
        FormatError: `folder` holds another training.
    """
    _check(mixture, concepts, settings, images, clip)
    record = {
        "settings": settings.model_dump(),
        "prompts": [prompt.text for prompt in prompts],
        "concepts": [list(words) for words in concepts],
    }
    run = TrainingRun(
        attachment, mixture, settings, record,
        base=base, identity=identity, folder=folder, devices=devices, progress=progress, keep=keep,
    )  # fmt: skip
    data = [] if images is None else [digest([images.latents]), list(images.prompt)]
    key = digest([], json.dumps(run.description + data))
    if settings.objective == "router":
        gates = _router_gates(attachment, denoiser, prompts, concepts, settings, progress)
        attachment.use(gates)
        return run.result(gates, FitRecord())
    run.check_folder(key)  # before any image is sampled
    examples = _load_or_make_examples(run, denoiser, prompts, settings, images, key)
    reads = mixture.gates.settings.reads
    if reads == "text":
        attachment.use(_router_gates(attachment, denoiser, prompts, concepts, settings, progress))
    else:
        standardise_features(attachment, lambda: _predict_some(denoiser, examples, settings.batch))
    if reads == "text-mean" and settings.objective == "distil":
        # starting from even gates, training finds the few directions in which prompts differ late or never
        routed = _router_gates(attachment, denoiser, prompts, concepts, settings, progress)
        attachment.use(scale_features(routed))
    if settings.objective == "clip":
        assert clip is not None
        objective = ClipGuidance(denoiser, examples, prompts, concepts, clip)
    else:
        objective = Regression(denoiser, examples)
    return run.fit(objective, key)


def _check(
    mixture: Mixture,
    concepts: Sequence[Sequence[str]],
    settings: TrainSettings,
    images: Images | None,
    clip: Clip | None,
) -> None:
    check_concepts(concepts, len(mixture.experts))
    check_trainable(mixture)
    reads = mixture.gates.settings.reads
    if settings.objective == "router" and reads not in READS_TEXT:
        raise MergeError("The router is for gates that read the text.", expected="reads=text", found=reads)
    if reads == "text" and mixture.gates.detector is None:
        raise MergeError(
            "Gates that read the text need a concept detector.",
            remedy="fit one with core.train.fit_detector and build the mixture with GateSet(.., detector=..)",
        )
    if settings.objective == "router" and mixture.gates.settings.reads not in READS_TEXT:
        raise MergeError(
            "The router is for gates that read the text.",
            expected="reads=text",
            found=mixture.gates.settings.reads,
            remedy="choose gates that read text, or the objective distil",
        )
    if settings.objective == "denoise" and images is None:
        raise MergeError(
            "The denoising objective needs images.",
            expected="some images (latents) per LoRA, each with its prompt",
            found="none",
            remedy="give some, or use the objective distil, which needs none",
        )
    if settings.objective == "clip" and clip is None:
        raise MergeError(
            "CLIP guidance needs a CLIP model.", found="none", remedy="give one, or use the objective distil"
        )


def _load_or_make_examples(
    run: TrainingRun,
    denoiser: Denoiser,
    prompts: Sequence[Prompt],
    settings: TrainSettings,
    images: Images | None,
    key: str,
) -> Examples:
    path = None if run.folder is None else run.folder / EXAMPLES_FILE
    if path is not None and (saved := Examples.load(path, key)) is not None:
        return saved
    examples = make_examples(run.attachment, denoiser, prompts, settings, images=images, progress=run.progress)
    if path is not None and run.writes_files:
        path.parent.mkdir(parents=True, exist_ok=True)
        examples.save(path, key)
    return examples


def _predict_some(denoiser: Denoiser, examples: Examples, batch: int) -> None:
    n = min(len(examples), MEASURED_EXAMPLES)
    for i in range(0, n, batch):
        rows = list(range(i, min(i + batch, n)))
        denoiser.predict(examples.noisy[rows], examples.t[rows], examples.prompt[rows].tolist())


def _router_gates(
    attachment: Attachment,
    denoiser: Denoiser,
    prompts: Sequence[Prompt],
    concepts: Sequence[Sequence[str]],
    settings: TrainSettings,
    progress: Progress | None,
) -> GateSet:
    """Gates that act as the prompt router does.

    For gates that read ``text-mean``, pass every prompt through the model once to get its text conditioning.
    """
    bank = attachment.bank
    if bank.gates.settings.reads != "text-mean":
        assert bank.gates.detector is not None  # see _check
        names = dict.fromkeys(scope.name for scope in bank.scopes.values())
        return route_gates(bank.gates.detector, bank.gates.settings, names, compose=settings.compose).to(
            next(bank.buffers()).device
        )
    texts: list[Tensor] = []
    scopes = list(dict.fromkeys(scope.name for scope in attachment.bank.scopes.values()))

    def collect(scope: str, f: Tensor, owner: Tensor | None) -> None:
        if scope == scopes[0]:
            texts.append(f.float().cpu())

    latents: Tensor | None = None
    for i in range(len(prompts)):  # one at a time: a host may reorder prompts of different lengths
        if latents is None:
            latents = denoiser.noise(1, settings.seed)  # any latents will do
        with torch.no_grad(), attachment.watch_inputs(collect):
            denoiser.predict(latents, torch.full((1,), 0.5), [i])
        if progress is not None:
            progress(i + 1, len(prompts), "reading the prompts")
    requested = concepts_in([prompt.text for prompt in prompts], concepts)
    return route_mean_gates(
        torch.cat(texts), requested, attachment.bank.gates.settings, scopes, compose=settings.compose
    )
