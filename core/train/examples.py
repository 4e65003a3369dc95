"""Examples: noised latents with what should be predicted there, made once and kept."""

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
from .prompts import Prompt, shares
from .settings import TrainSettings

_KIND = "legomole.examples.1"
_EARLIEST = 0.04  # times are drawn from here to 1: nearer to 0 nothing is left to predict


@dataclass(frozen=True, eq=False)
class Examples:
    """Training examples, on the CPU.

    Args:
        noisy: ``(n, ..)`` latents. t: ``(n,)`` times in 0 .. 1. prompt: ``(n,)`` long, numbers of prompts.
        target: ``(n, ..)``, what the gated model should predict.
    """

    noisy: Tensor
    t: Tensor
    prompt: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def save(self, path: Path, key: str) -> None:
        """Write them, atomically."""
        tensors = {"noisy": self.noisy, "t": self.t, "prompt": self.prompt, "target": self.target}
        write_tensors(path, tensors, {"kind": _KIND, "key": key})

    @classmethod
    def load(cls, path: Path, key: str) -> Examples | None:
        """Those that were saved under the same key; ``None`` if there are none."""
        if not path.exists():
            return None
        try:
            tensors, header = read_tensors(path)
        except FormatError:  # cut off: made again
            return None
        if header != {"kind": _KIND, "key": key}:
            return None
        return cls(*(tensors[name].clone() for name in ("noisy", "t", "prompt", "target")))


@dataclass(frozen=True, eq=False)
class Images:
    """A user's own pictures as latents, for the denoising objective.

    Args:
        latents: ``(n, ..)``. prompt: For each, the number of the prompt that describes it.
    """

    latents: Tensor
    prompt: Sequence[int]


def teacher(prompts: Sequence[Prompt], experts: int, compose: float) -> Tensor:
    """The gates whose model is imitated: ``(P, N)``.

    The LoRAs a prompt names at 1, several at `compose`, none for a prompt that names none.
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
    """Let the models paint, noise what they painted, and note what the model to be imitated predicts there.

    Args:
        attachment: The mixture on the model that `denoiser` runs.
        denoiser: Its prompts are `prompts`, in this order.
        images: With these, only prompts without a concept are painted; the rest of the examples are the user's pictures
            and the noise that was put on them.
        progress: Called with (done, in all, what is going on). May raise to cancel.

    Raises:
        MergeError: Latents or predictions that are not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    values = teacher(prompts, attachment.bank.experts, settings.compose)
    weights = torch.tensor(shares(prompts), dtype=torch.float64)
    if images is not None:
        weights = torch.where(values.any(1), 0.0, weights)
    drawn = torch.multinomial(weights, settings.samples, replacement=True, generator=generator)
    # no kind of prompt may be missed by chance: the first draws go through all of them
    order = [i for i in torch.argsort(weights, descending=True, stable=True).tolist() if weights[i] > 0]
    first = min(len(order), settings.samples // 2)
    drawn[:first] = torch.tensor(order[:first])
    total = settings.samples + settings.examples
    painted: list[Tensor] = []
    for i in range(0, settings.samples, settings.batch):
        chosen = drawn[i : i + settings.batch].tolist()
        with torch.no_grad(), attachment.hold(values[chosen]):
            painted.append(denoiser.sample(chosen, settings.seed + i).cpu())
        _tell(progress, min(i + settings.batch, settings.samples), total, "painting")
    latents = torch.cat(painted)

    n = settings.examples
    source = torch.arange(n) % settings.samples
    t = _EARLIEST + (1 - _EARLIEST) * torch.rand(n, generator=generator)
    noise = torch.randn(n, *latents.shape[1:], generator=generator)
    prompt, clean = drawn[source], latents[source]
    own = torch.zeros(n, dtype=torch.bool)
    if images is not None:  # two of three examples are the user's pictures, the rest the prior
        _check_images(images, latents, len(prompts))
        own = torch.arange(n) % 3 != 0
        which = torch.arange(int(own.sum())) % len(images.latents)
        painted_ones = torch.arange(int((~own).sum())) % settings.samples
        clean[own], clean[~own] = images.latents[which].to(clean), latents[painted_ones]
        prompt[own], prompt[~own] = torch.tensor(list(images.prompt))[which], drawn[painted_ones]
    noisy, target = torch.empty_like(clean), torch.empty_like(clean)
    for i in range(0, n, settings.batch):
        s = slice(i, min(i + settings.batch, n))
        chosen = prompt[s].tolist()
        noisy[s] = denoiser.noised(clean[s], t[s], noise[s]).cpu()
        with torch.no_grad(), attachment.hold(values[chosen]):
            target[s] = denoiser.predict(noisy[s], t[s], chosen).cpu().to(target)
        if own[s].any():
            goal = denoiser.goal(clean[s], t[s], noise[s]).cpu().to(target)
            target[s] = torch.where(own[s].view(-1, *(1 for _ in clean.shape[1:])), goal, target[s])
        _tell(progress, settings.samples + s.stop, total, "predicting")
    if not (torch.isfinite(noisy).all() and torch.isfinite(target).all()):
        raise MergeError(
            "The model's own pictures hold numbers that are not finite.",
            remedy="check that the model and each LoRA paint pictures; lower the strengths, or use float32 or bfloat16",
        )
    return Examples(noisy, t, prompt, target)


def _check_images(images: Images, latents: Tensor, prompts: int) -> None:
    fits = images.latents.shape[1:] == latents.shape[1:] and len(images.latents) == len(images.prompt)
    if not fits or not all(0 <= p < prompts for p in images.prompt):
        raise MergeError(
            "The images do not fit the training.",
            expected=f"latents of shape {tuple(latents.shape[1:])}, one prompt number each",
            found=f"{tuple(images.latents.shape)} and prompts {list(images.prompt)}",
            remedy="encode all images at the size that is trained",
        )


def _tell(progress: Progress | None, done: int, total: int, what: str) -> None:
    if progress is not None:
        progress(done, total, what)
