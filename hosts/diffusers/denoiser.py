"""A diffusers pipeline as the denoiser that gate training asks for.

What differs between pipelines is a `_Family` (how prompts are encoded, what the model is called with, how latents lie)
and a schedule, see `pipeline_schedule`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import MergeError
from .schedule import schedule_of


class _Family:
    """Stable Diffusion 1 and 2, and what the other families share with it.

    Args:
        pipe: The pipeline. height, width: Of the pictures in pixels. guidance: Its scale.
    """

    component = "unet"
    patch = 1  # latents per token and side
    guided = True  # two passes, with and without the prompt; else the model is told the scale

    def __init__(self, pipe: Any, height: int, width: int, guidance: float) -> None:
        self.pipe, self.guidance = pipe, guidance
        self.model = getattr(pipe, self.component)
        self.device: torch.device = pipe._execution_device  # where the model computes, wherever it is kept
        self.pixels = (height, width)
        self.height, self.width = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
        step = pipe.vae_scale_factor * self.patch
        if height % step or width % step or min(height, width) < step:
            raise MergeError(
                "Pictures of this size cannot be made.",
                expected=f"multiples of {step} pixels",
                found=f"{width} x {height}",
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample's latents."""
        return (self.model.config.in_channels, self.height, self.width)

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """What the model is told of a prompt: tensors of one row."""
        text, *_ = self.pipe.encode_prompt(prompt, self.device, 1, False)
        return {"text": text}

    def negative(self) -> dict[str, Tensor]:
        """What it is told instead when it is guided away from nothing in particular."""
        return self.encode("")

    def arguments(self, rows: dict[str, Tensor], t: Tensor) -> dict[str, Any]:
        """What the model is called with, besides the latents; `t` ``(B,)`` in thousandths."""
        return {"timestep": t, "encoder_hidden_states": rows["text"]} | self._told(len(t))

    def _told(self, batch: int) -> dict[str, Tensor]:
        if self.guided:
            return {}
        scale = torch.full((batch,), self.guidance - 1)
        width = self.model.config.time_cond_proj_dim
        told: Tensor = self.pipe.get_guidance_scale_embedding(scale, embedding_dim=width)
        return {"timestep_cond": told.to(self.device, self.model.dtype)}

    def to_image(self, latents: Tensor) -> Tensor:
        """Latents as the VAE has them, ``(B, C, h, w)``."""
        return latents

    def from_image(self, latents: Tensor) -> Tensor:
        return latents


class _StableDiffusionXL(_Family):
    def encode(self, prompt: str) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def negative(self) -> dict[str, Tensor]:
        _, text, _, pooled = self.pipe.encode_prompt("")  # zeros for the models that learnt it so
        return {"text": text, "pooled": pooled}

    def arguments(self, rows: dict[str, Tensor], t: Tensor) -> dict[str, Any]:
        second = self.pipe.text_encoder_2
        width = int(rows["pooled"].shape[-1]) if second is None else second.config.projection_dim
        size = self.pipe._get_add_time_ids(
            self.pixels, (0, 0), self.pixels, dtype=rows["text"].dtype, text_encoder_projection_dim=width
        )
        added = {"text_embeds": rows["pooled"], "time_ids": size.to(t.device).expand(len(t), -1)}
        return {**super().arguments(rows, t), "added_cond_kwargs": added}


class _StableDiffusion3(_Family):
    component = "transformer"

    def __init__(self, pipe: Any, height: int, width: int, guidance: float) -> None:
        self.patch = pipe.transformer.config.patch_size
        super().__init__(pipe, height, width, guidance)

    def encode(self, prompt: str) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def arguments(self, rows: dict[str, Tensor], t: Tensor) -> dict[str, Any]:
        return {"timestep": t, "encoder_hidden_states": rows["text"], "pooled_projections": rows["pooled"]}


class _Flux(_Family):
    component = "transformer"
    patch = 2
    guided = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.height * self.width // 4, self.model.config.in_channels)

    def encode(self, prompt: str) -> dict[str, Tensor]:
        text, pooled, _ = self.pipe.encode_prompt(prompt)
        return {"text": text, "pooled": pooled}

    def arguments(self, rows: dict[str, Tensor], t: Tensor) -> dict[str, Any]:
        text = rows["text"]
        return {
            "timestep": t / 1000,
            "guidance": torch.full_like(t, self.guidance) if self.model.config.guidance_embeds else None,
            "encoder_hidden_states": text,
            "pooled_projections": rows["pooled"],
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "img_ids": self.pipe._prepare_latent_image_ids(1, self.height // 2, self.width // 2, t.device, text.dtype),
        }

    def to_image(self, latents: Tensor) -> Tensor:
        return self.pipe._unpack_latents(latents, *self.pixels, self.pipe.vae_scale_factor)

    def from_image(self, latents: Tensor) -> Tensor:
        return self.pipe._pack_latents(latents, *latents.shape)


# By the name of the pipeline's class; classes derived from these are supported too.
_FAMILIES: dict[str, type[_Family]] = {
    "StableDiffusionPipeline": _Family,
    "StableDiffusionXLPipeline": _StableDiffusionXL,
    "StableDiffusion3Pipeline": _StableDiffusion3,
    "FluxPipeline": _Flux,
}


class PipelineDenoiser:
    """Implements `core.train.Denoiser` for `StableDiffusionPipeline`, `StableDiffusionXLPipeline`,
    `StableDiffusion3Pipeline` and `FluxPipeline`.

    Prompts are encoded once, by the pipeline's own `encode_prompt` with its own defaults, and kept on the CPU. Times
    follow the scheduler's own course (its shift too); predictions are noise, v or velocity, as the model was trained.

    Args:
        pipe: The pipeline; its model, device and number format are used as they are.
        prompts: What `predict` and `sample` tell by their numbers.
        size: Height and width in pixels, default the pipeline's own.
        guidance: Scale of the guidance when pictures are painted, default the pipeline's own; at most 1 for none.
        steps: Of painting, by Euler's method.

    Raises:
        MergeError: A pipeline, scheduler or size that is not supported.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        guidance: float | None = None,
        steps: int = 12,
    ) -> None:
        kinds = [_FAMILIES[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in _FAMILIES]
        if not kinds:
            raise MergeError(
                "Gates cannot be trained on this pipeline; mixing works on any.",
                expected=", ".join(_FAMILIES),
                found=type(pipe).__name__,
                remedy="load the model's text-to-image pipeline if it is one of these; else train in ComfyUI",
            )
        if guidance is None:
            guidance = float(inspect.signature(pipe.__call__).parameters["guidance_scale"].default)
        self.family = kinds[0](pipe, *(size or _own_size(pipe, kinds[0].component)), guidance)
        if kinds[0].component == "unet" and pipe.unet.config.time_cond_proj_dim is not None:
            self.family.guided = False
        tokens = self.family.height * self.family.width // self.family.patch**2
        self.pipe, self.model, self.steps = pipe, self.family.model, steps
        self.device = self.family.device
        self.schedule = schedule_of(pipe.scheduler, tokens)
        with torch.no_grad():
            rows = [self.family.encode(prompt) for prompt in prompts]
            self._rows = {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}
            self._negative = {name: tensor.cpu() for name, tensor in self.family.negative().items()}

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        x = self.noise(len(prompts), seed)
        times = torch.linspace(1, 0, self.steps + 1, device=self.device)
        for i, now in enumerate(times[:-1]):
            t = now.expand(len(prompts))
            prediction = self._run(x, t, self._rows_of(prompts))
            if self.family.guided and self.family.guidance > 1:  # apart: gates held per prompt fit both
                away = self._run(x, t, {k: v.expand(len(prompts), *v.shape[1:]) for k, v in self._negative.items()})
                prediction = away + self.family.guidance * (prediction - away)
            clean, noise = self._parts(x, t, prediction)
            x = clean if i == self.steps - 1 else self.noised(clean, times[i + 1].expand(len(prompts)), noise)
        return x

    def noise(self, batch: int, seed: int) -> Tensor:
        """Latents that are all noise, float32."""
        return torch.randn(batch, *self.family.shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        a, b, _, _ = self._mix(t, latents)
        return a * latents + b * noise

    def goal(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        _, _, c, d = self._mix(t, latents)
        return c * noise + d * latents

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        return self._run(noisy.to(self.device), t.to(self.device), self._rows_of(prompts))

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return self._parts(noisy, t, prediction)[0]

    def _parts(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise of which a prediction says the noisy ones are made."""
        a, b, c, d = self._mix(t, noisy)
        determinant = a * c - b * d
        return (c * noisy - b * prediction) / determinant, (a * prediction - d * noisy) / determinant

    def _mix(self, t: Tensor, like: Tensor) -> list[Tensor]:
        return [value.view(-1, *(1 for _ in like.shape[1:])) for value in self.schedule.mix(t)]

    def _rows_of(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        return {name: tensor[list(prompts)] for name, tensor in self._rows.items()}

    def _run(self, x: Tensor, t: Tensor, rows: dict[str, Tensor]) -> Tensor:
        dtype = self.model.dtype
        rows = {name: tensor.to(self.device, dtype) for name, tensor in rows.items()}
        arguments = self.family.arguments(rows, self.schedule.timestep(t))
        x_name = "sample" if self.family.component == "unet" else "hidden_states"
        return self.model(**{x_name: x.to(dtype)}, **arguments, return_dict=False)[0].float()

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures ``(B, 3, H, W)`` float32 in about -1 .. 1, differentiable."""
        vae, config = self._vae(), self.pipe.vae.config
        z = self.family.to_image(latents)
        mean, deviation = _moments(config, z)
        z = z * deviation / config.scaling_factor + mean
        return vae.decode(z.to(vae.dtype), return_dict=False)[0].float()

    def encode(self, pictures: Sequence[Any]) -> Tensor:
        """Latents ``(B, ..)`` float32 of Pillow images, resized to the size that is trained."""
        vae, config = self._vae(), self.pipe.vae.config
        x = self.pipe.image_processor.preprocess(list(pictures), *self.family.pixels)
        with torch.no_grad():
            z = vae.encode(x.to(self.device, vae.dtype)).latent_dist.mode().float()
        mean, deviation = _moments(config, z)
        return self.family.from_image((z - mean) * config.scaling_factor / deviation)

    def _vae(self) -> Any:
        vae = self.pipe.vae
        if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            vae.to(torch.float32)  # it overflows in float16; so do the pipelines
        return vae


def _own_size(pipe: Any, component: str) -> tuple[int, int]:
    side: Any = getattr(pipe, "default_sample_size", None) or getattr(pipe, component).config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def _moments(config: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation of a VAE's latents: per channel where it knows them, else a shift."""
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return config.get("shift_factor") or 0.0, 1.0
    mean, deviation = (like.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, deviation
