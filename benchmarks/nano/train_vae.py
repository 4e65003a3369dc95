"""Train the autoencoder on renders of every subject in every style."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from legomole.nano import vae as nano_vae
from torch import Tensor, nn
from torch.nn import functional as F

from ..common import Say
from .render import STYLES, SUBJECTS, render

_CROP, _BATCH, _NOISE = 32, 16, 0.1


def pictures(per_pair: int, seed: int) -> Tensor:
    """Render all subjects in all styles, every fourth with the author's habit: ``(n, 3, SIZE, SIZE)`` uint8."""
    rng = np.random.default_rng(seed)
    renders = [
        render(subject, style, rng, jitter=1.0, author=i % 4 == 3)
        for subject in SUBJECTS
        for style in STYLES
        for i in range(per_pair)
    ]
    return torch.from_numpy(np.stack(renders)).permute(0, 3, 1, 2).contiguous()


def train(steps: int, per_pair: int = 16, seed: int = 0, say: Say = print, device: str = "cpu") -> dict[str, Tensor]:
    """Train the autoencoder; see `train_oracle.train` for the arguments.

    Returns:
        Weights in float16; latents have a standard deviation of 1 in every channel.
    """
    return fit(pictures(per_pair, seed), steps, seed=seed, say=say, device=device)


def fit(
    data: Tensor, steps: int, *, seed: int = 0, initial: Mapping[str, Tensor] | None = None, lr: float = 1.5e-3,
    say: Say = print, device: str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Train the autoencoder on pictures ``(n, 3, H, W)`` uint8, from `initial` weights or from random ones."""
    torch.manual_seed(seed)
    vae = nano_vae.build().requires_grad_(True).train().to(memory_format=torch.channels_last)
    if initial is None:
        _start(vae)
    else:
        vae.load_state_dict(initial)
    vae.to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.08)
    for step in range(steps):
        top, left = torch.randint(0, 64 - _CROP + 1, (2,)).tolist()
        x = data[torch.randint(len(data), (_BATCH,)), :, top : top + _CROP, left : left + _CROP]
        x = (x.float() / 127.5 - 1).to(device, memory_format=torch.channels_last)
        z = vae.encoder(x)
        y = vae.decoder(z + _NOISE * torch.randn_like(z))
        spread = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * (_edges(y) - _edges(x)).abs().mean() + 0.02 * spread
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            say(f"vae {step}/{steps} loss {loss.item():.4f} psnr {-10 * torch.log10(F.mse_loss(y, x) / 4).item():.2f}")
    return _standardised(vae.eval().cpu(), data)


def _start(vae: nn.Module) -> None:
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if hasattr(module, "conv") and hasattr(module, "fuse"):
            nn.init.zeros_(module.conv[4].weight)  # start each block as the identity


def _edges(x: Tensor) -> Tensor:
    return torch.cat([(x[..., 1:, :] - x[..., :-1, :]).flatten(1), (x[..., :, 1:] - x[..., :, :-1]).flatten(1)], 1)


@torch.no_grad()
def _standardised(vae: nn.Module, data: Tensor) -> dict[str, Tensor]:
    """Return the weights with unit standard deviation of the latents.

    The encoder's last layer divides by the deviation measured on a sample, the decoder's first multiplies by it. The
    decoder's clamp comes before that, but latents are well inside its range.
    """
    sample = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[:512]]
    z = vae.encoder(sample.float() / 127.5 - 1)
    std = z.std((0, 2, 3))
    last, first = vae.encoder.layers[14], vae.decoder.layers[0]
    # not the mean: shifting it through a zero-padded convolution would change the border
    last.weight.div_(std[:, None, None, None])
    last.bias.div_(std)
    first.weight.mul_(std[None, :, None, None])
    return {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}
