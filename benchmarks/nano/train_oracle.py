"""Train the judge on renders, on their reconstructions, and on ruined pictures of the class "none of these"."""

from __future__ import annotations

from typing import Any

import torch
from legomole.nano.oracle import Oracle
from torch import Tensor
from torch.nn import functional as F

from ..common import Say
from .train_vae import pictures

_BATCH = 48


def train(vae: Any, steps: int, per_pair: int = 16, seed: int = 1, say: Say = print, device: str = "cpu") -> Oracle:
    """Train the judge.

    Args:
        vae: Autoencoder, for reconstructions.
        steps: Number of steps.
        per_pair: Renders per pair of subject and style.
        seed: Random seed of initial weights, renders and batches.
        say: Called with progress messages.
        device: Device to compute on.
    """
    torch.manual_seed(seed)
    oracle = Oracle()
    return fit(oracle, *examples(oracle, vae, pictures(per_pair, seed), per_pair), steps, say=say, device=device)


@torch.no_grad()
def examples(
    oracle: Oracle, vae: Any, rendered: Tensor, per_pair: int, *, noise: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pictures, subjects and styles to train a judge on: renders, their reconstructions, and ruined pictures.

    Args:
        oracle: The judge, for its classes.
        vae: Autoencoder.
        rendered: `per_pair` renders of every pair, ``(n, 3, 64, 64)`` uint8; subjects vary slower than styles.
        noise: Highest standard deviation of the noise on latents before they are decoded.
    """
    raw = rendered.float() / 127.5 - 1
    pair = torch.arange(len(raw) // per_pair).repeat_interleave(per_pair)
    subject, style = pair // len(oracle.styles), pair % len(oracle.styles)
    latents = torch.cat([vae.encoder(part) for part in raw.split(64)])
    ruined, no_subject, no_style = _ruined(latents, subject, style, len(oracle.subjects), len(oracle.styles))
    x = torch.cat([raw, _decoded(vae, latents, noise), _decoded(vae, ruined, noise)])
    return x, torch.cat([subject, subject, no_subject]), torch.cat([style, style, no_style])


def fit(
    oracle: Oracle, x: Tensor, subject: Tensor, style: Tensor, steps: int, *, lr: float = 3e-3, say: Say = print,
    device: str = "cpu",
) -> Oracle:  # fmt: skip
    """Train a judge on pictures ``(n, 3, 64, 64)`` and their classes ``(n,)``; a style of -1 is not judged."""
    oracle = oracle.to(device)
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        i = torch.randint(len(x), (_BATCH,))
        shown = _moved(x[i]) * torch.empty(_BATCH, 3, 1, 1).uniform_(0.9, 1.1) + 0.05 * torch.randn(_BATCH, 3, 1, 1)
        logits = oracle((shown + 0.05 * torch.randn_like(shown)).clamp(-1, 1).to(device))
        loss = F.cross_entropy(logits[0], subject[i].to(device))
        loss = loss + F.cross_entropy(logits[1], style[i].to(device), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            say(f"oracle {step}/{steps} loss {loss.item():.3f}")
    return oracle.cpu().eval().requires_grad_(False)


def _decoded(vae: Any, latents: Tensor, noise: float) -> Tensor:
    """Decode latents with noise of a random strength."""
    return torch.cat([vae.decoder(z + noise * torch.rand(()) * torch.randn_like(z)) for z in latents.split(64)])


def _decoded(vae: Any, latents: Tensor, noise: float) -> Tensor:
    """Decode latents with noise of a random strength."""
    return torch.cat([vae.decoder(z + noise * torch.rand(()) * torch.randn_like(z)) for z in latents.split(64)])


def _ruined(
    latents: Tensor, subject: Tensor, style: Tensor, subjects: int, styles: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents that must not score, with labels: blends of two, shuffled cells, and constant means.

    A blend has a subject or style only if both of its parts do. The style of the others is not judged (-1), because
    some of it may remain.
    """
    n = len(latents) // 2
    i, j = torch.randperm(len(latents))[:n], torch.randperm(len(latents))[:n]
    w = torch.empty(n, 1, 1, 1).uniform_(0.35, 0.65)
    blend = w * latents[i] + (1 - w) * latents[j]
    s = torch.where(subject[i] == subject[j], subject[i], subjects)
    k = torch.where(style[i] == style[j], style[i], styles)
    few = n // 4
    shuffled = latents[i[:few]].flatten(2)[..., torch.randperm(64)].unflatten(2, (8, 8))
    flat = latents[j[:few]].mean((2, 3), keepdim=True).expand(-1, -1, 8, 8)
    nothing, unjudged = torch.full((2 * few,), subjects), torch.full((2 * few,), -1)
    return torch.cat([blend, shuffled, flat]), torch.cat([s, nothing]), torch.cat([k, unjudged])


def _moved(x: Tensor) -> Tensor:
    dx, dy = torch.randint(-4, 5, (2,)).tolist()
    padded = F.pad(x, (4, 4, 4, 4), mode="replicate")
    return padded[..., 4 + dy : 68 + dy, 4 + dx : 68 + dx]


@torch.no_grad()
def accuracy(oracle: Oracle, x: Tensor, per_pair: int) -> tuple[float, float]:
    """Return the accuracy on subjects and on styles, for pictures in the order of `train_vae.pictures`."""
    pair = torch.arange(len(x) // per_pair).repeat_interleave(per_pair)
    subjects, styles = zip(*(oracle(part) for part in x.split(64)), strict=True)
    return (
        (torch.cat(subjects).argmax(1) == pair // len(oracle.styles)).float().mean().item(),
        (torch.cat(styles).argmax(1) == pair % len(oracle.styles)).float().mean().item(),
    )
