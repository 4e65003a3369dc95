"""Examples: noised latents with the predictions that gates are to learn, computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError, MergeError
from ..formats.files import read_tensors, write_tensors
from ..mole.attach import Attachment
from ..progress import Progress
from .denoiser import Denoiser
from .prompts import Prompt, sampling_weights
from .settings import TrainSettings

_KIND = "legomole.examples.1"
_MIN_TIME = 0.04  # times are drawn from here to 1: closer to 0 there is almost no noise to predict


@dataclass(frozen=True, eq=False)
class Examples:
    """Training examples, on the CPU.

    Args:
        noisy: ``(n, ..)`` latents. t: ``(n,)`` times in 0 .. 1.
        prompt: ``(n,)`` long, indices of prompts.
        target: ``(n, ..)``, predictions that the gated model is to make.
    """

    noisy: Tensor
    t: Tensor
    prompt: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def save(self, path: Path, key: str) -> None:
        """Write the examples, atomically."""
        tensors = {"noisy": self.noisy, "t": self.t, "prompt": self.prompt, "target": self.target}
        write_tensors(path, tensors, {"kind": _KIND, "key": key})

    @classmethod
    def load(cls, path: Path, key: str) -> Examples | None:
        """Examples that were saved with the same key; ``None`` if there are none."""
        if not path.exists():
            return None
        try:
            tensors, header = read_tensors(path)
        except FormatError:  # a truncated file: the examples are made again
            return None
        if header != {"kind": _KIND, "key": key}:
            return None
        return cls(*(tensors[name].clone() for name in ("noisy", "t", "prompt", "target")))


@dataclass(frozen=True, eq=False)
class Images:
    """A user's images as latents, for the denoising objective.

    Args:
        latents: ``(n, ..)``.
        prompt: For each, the index of the prompt that describes it.
    """

    latents: Tensor
    prompt: Sequence[int]


def target_gates(prompts: Sequence[Prompt], experts: int, compose: float) -> Tensor:
    """The gate values ``(P, N)`` with which the model makes the predictions that gates learn.

    1 for the LoRA that a prompt names, `compose` for each of several, 0 for all others.
    """
    g = torch.zeros(len(prompts), experts)
    for row, prompt in zip(g, prompts, strict=True):
        row[list(prompt.named)] = compose if len(prompt.named) > 1 else 1.0
    return g


def make_examples(
    attachment: Attachment,
    denoiser: Denoiser,
    prompts: Sequence[Prompt],
    settings: TrainSettings,
    *,
    images: Images | None = None,
    progress: Progress | None = None,
) -> Examples:
    """Noise latents, and compute the predictions of the model at the target gates as targets.

    For distillation the latents are zero: its gates are those of sampled images, which would take most of the time. For
    other objectives images are sampled with the model at the target gates.

    Args:
        attachment: The mixture on the model that `denoiser` runs.
        denoiser: Its prompts are `prompts`, in this order.
        images: With these, only prompts without a concept are sampled; the other examples are the user's images, with
            the perfect predictions for them.
        progress: Called with (done, total, description). May raise an exception to cancel.

    Raises:
        MergeError: Latents or predictions that are not finite, or images that do not fit.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    gates = target_gates(prompts, attachment.bank.experts, settings.compose)
    weights = torch.tensor(sampling_weights(prompts), dtype=torch.float64)
    if images is not None:
        weights = torch.where(gates.any(1), 0.0, weights)
    n, distil = settings.examples, settings.objective == "distil"
    draws = n if distil else settings.samples
    drawn = torch.multinomial(weights, draws, replacement=True, generator=generator)
    # the first draws go through all prompts, so that no kind is missing by chance
    order = [i for i in torch.argsort(weights, descending=True, stable=True).tolist() if weights[i] > 0]
    first = min(len(order), draws // 2)
    drawn[:first] = torch.tensor(order[:first])
    total = n if distil else draws + n
    sampled: list[Tensor] = []
    for i in range(0, 0 if distil else draws, settings.batch):
        rows = drawn[i : i + settings.batch].tolist()
        with torch.no_grad(), attachment.hold(gates[rows]):
            sampled.append(denoiser.sample(rows, settings.seed + i).cpu())
        _report(progress, min(i + settings.batch, draws), total, "sampling")
    latents = torch.zeros(n, *denoiser.noise(1, 0).shape[1:]) if distil else torch.cat(sampled)

    source = torch.arange(n) % draws
    t = _MIN_TIME + (1 - _MIN_TIME) * torch.rand(n, generator=generator)
    noise = torch.randn(n, *latents.shape[1:], generator=generator)
    prompt, clean = drawn[source], latents[source]
    is_users = torch.zeros(n, dtype=torch.bool)
    if images is not None:  # two of three examples are the user's images, the others preserve the base model
        _check_images(images, latents, len(prompts))
        is_users = torch.arange(n) % 3 != 0
        which = torch.arange(int(is_users.sum())) % len(images.latents)
        sampled_ones = torch.arange(int((~is_users).sum())) % settings.samples
        clean[is_users], clean[~is_users] = images.latents[which].to(clean), latents[sampled_ones]
        prompt[is_users], prompt[~is_users] = torch.tensor(list(images.prompt))[which], drawn[sampled_ones]
    noisy, target = torch.empty_like(clean), torch.empty_like(clean)
    for i in range(0, n, settings.batch):
        s = slice(i, min(i + settings.batch, n))
        rows = prompt[s].tolist()
        noisy[s] = denoiser.noised(clean[s], t[s], noise[s]).cpu()
        with torch.no_grad(), attachment.hold(gates[rows]):
            target[s] = denoiser.predict(noisy[s], t[s], rows).cpu().to(target)
        if is_users[s].any():
            goal = denoiser.goal(clean[s], t[s], noise[s]).cpu().to(target)
            target[s] = torch.where(is_users[s].view(-1, *(1 for _ in clean.shape[1:])), goal, target[s])
        _report(progress, total - n + s.stop, total, "predicting")
    if not (torch.isfinite(noisy).all() and torch.isfinite(target).all()):
        raise MergeError(
            "Images that the model sampled hold values that are not finite.",
            remedy="check that the model and each LoRA give images; lower the strengths, or use float32 or bfloat16",
        )
    return Examples(noisy, t, prompt, target)


def _check_images(images: Images, latents: Tensor, prompts: int) -> None:
    fits = images.latents.shape[1:] == latents.shape[1:] and len(images.latents) == len(images.prompt)
    if not fits or not all(0 <= p < prompts for p in images.prompt):
        raise MergeError(
            "The images do not fit the training.",
            expected=f"latents of shape {tuple(latents.shape[1:])}, one index of a prompt each",
            found=f"{tuple(images.latents.shape)} and prompts {list(images.prompt)}",
            remedy="encode all images at the size of the training",
        )


def _report(progress: Progress | None, done: int, total: int, description: str) -> None:
    if progress is not None:
        progress(done, total, description)
