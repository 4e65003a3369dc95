"""A ComfyUI model as the denoiser of gate training and calibration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...core.mole.attach import Attachment

Conditioning = Sequence[Any]  # ComfyUI's CONDITIONING: [[tensor, {"pooled_output": ..}], ..]


class ComfyDenoiser:
    """Implements `core.train.Denoiser` with ComfyUI's sigmas as noise levels.

    Predictions are ``(x - clean) / sigma``: the noise for models that predict noise, the velocity for flow models.

    Args:
        patcher: Model patcher whose model is loaded, for training with tensors that allow gradients.
        attachment: The mixture on that model.
        prompts: The conditioning of each prompt. The last one is the empty prompt, for guidance.
        latent: Samples of a LATENT of the size to train at; only the shape is used.
        cfg: Guidance scale of sampling; 1 for models with built-in guidance.
        steps: Number of sampling steps (Euler's method).
    """

    def __init__(
        self,
        patcher: Any,
        attachment: Attachment,
        prompts: Sequence[Conditioning],
        latent: Tensor,
        cfg: float,
        steps: int,
    ) -> None:
        self.patcher, self.model, self.attachment = patcher, patcher.model, attachment
        self.device = patcher.load_device
        self.cfg, self.steps = cfg, steps
        self._prompts = [_copied(conditioning) for conditioning in prompts]
        self._shape = comfy.sample.fix_empty_latent_channels(patcher, latent).shape[1:]
        self._options = {
            **patcher.model_options,
            "transformer_options": {**patcher.model_options["transformer_options"]},
        }
        patcher.pre_run()

    @property
    def _sampling(self) -> Any:
        return self.model.model_sampling

    def latents(self, latents: Tensor) -> Tensor:
        """Convert samples of a user's LATENT to the model's latent space."""
        return self.model.process_latent_in(comfy.sample.fix_empty_latent_channels(self.patcher, latents))

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        sigmas = comfy.samplers.calculate_sigmas(self._sampling, "simple", self.steps).to(self.device)
        noise = self.noise(len(prompts), seed)
        x = self._sampling.noise_scaling(sigmas[:1], noise, torch.zeros_like(noise), True)
        empty = [len(self._prompts) - 1] * len(prompts)
        for sigma, next_sigma in itertools.pairwise(sigmas):
            d = self._direction(x, sigma.expand(len(prompts)), prompts)
            if self.cfg != 1.0:
                unconditional = self._direction(x, sigma.expand(len(prompts)), empty)
                d = unconditional + self.cfg * (d - unconditional)
            x = x + d * (next_sigma - sigma)
        return x

    def noise(self, batch: int, seed: int) -> Tensor:
        return torch.randn(batch, *self._shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        sigma = self._sigma(t)
        return self._sampling.noise_scaling(sigma, noise.to(self.device), latents.to(self.device), False)

    def goal(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (self.noised(latents, t, noise) - latents.to(self.device)) / _like(self._sigma(t), latents)

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        return self._direction(noisy.to(self.device), self._sigma(t), prompts)

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return noisy.to(self.device) - _like(self._sigma(t), noisy) * prediction

    def _sigma(self, t: Tensor) -> Tensor:
        """Convert times (0 clean, 1 pure noise) to sigmas. ComfyUI's percent runs the other way round."""
        percent = (1 - t.double()).clamp(1e-6, 1).tolist()
        return torch.tensor([float(self._sampling.percent_to_sigma(p)) for p in percent]).to(self.device)

    def _direction(self, x: Tensor, sigma: Tensor, prompts: Sequence[int]) -> Tensor:
        """Return ``(x - clean) / sigma``. Prompts whose conditioning has the same shape share a batch."""
        groups: dict[Any, list[int]] = {}
        for row, number in enumerate(prompts):
            groups.setdefault(_batch_key(self._prompts[number]), []).append(row)
        out: list[tuple[int, Tensor]] = []
        for rows in groups.values():
            with self.attachment.only_samples(rows):
                clean = self._clean(x[rows], sigma[rows], [self._prompts[prompts[row]] for row in rows])
            out += zip(rows, ((x[rows] - clean) / _like(sigma[rows], x)).split(1), strict=True)
        return torch.cat([part for _, part in sorted(out, key=lambda entry: entry[0])])

    def _clean(self, x: Tensor, sigma: Tensor, prompts: Sequence[Conditioning]) -> Tensor:
        conds = {"positive": comfy.sampler_helpers.convert_cond(_batched(prompts))}
        comfy.samplers.cast_to_load_options(self._options, device=self.device, dtype=self.patcher.model_dtype())
        conds = comfy.samplers.process_conds(self.model, x, conds, self.device, torch.zeros_like(x), None, 0)
        return comfy.samplers.calc_cond_batch(self.model, [conds["positive"]], x, sigma, self._options)[0]


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.view(-1, *(1 for _ in range(x.ndim - 1)))


def _copied(conditioning: Conditioning) -> list[list[Any]]:
    """Clone the tensors, because those of ComfyUI's nodes were made in inference mode and allow no gradients."""
    return [
        [tensor.clone(), {k: v.clone() if isinstance(v, Tensor) else v for k, v in extra.items()}]
        for tensor, extra in conditioning
    ]


def _batch_key(conditioning: Conditioning) -> Any:
    """Return what must be equal for two prompts to share a batch."""
    return tuple(
        (
            tuple(tensor.shape),
            tuple((k, tuple(v.shape)) if isinstance(v, Tensor) else (k, repr(v)) for k, v in sorted(extra.items())),
        )
        for tensor, extra in conditioning
    )


def _batched(prompts: Sequence[Conditioning]) -> list[list[Any]]:
    """Join the conditioning of prompts with the same `_batch_key` into that of a batch."""
    first = prompts[0]
    return [
        [
            torch.cat([prompt[i][0] for prompt in prompts]),
            {
                k: torch.cat([prompt[i][1][k] for prompt in prompts]) if isinstance(v, Tensor) else v
                for k, v in first[i][1].items()
            },
        ]
        for i in range(len(first))
    ]
