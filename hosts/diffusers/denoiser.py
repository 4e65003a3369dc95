"""A diffusers pipeline as the denoiser of gate training.

Pipelines differ in their `_PipelineFamily` (how prompts are encoded, the arguments of the model, the layout of latents)
and in their noise schedule, see `schedule.noise_schedule`.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers.utils
import torch
import transformers.utils
from torch import Tensor

from ...core.errors import MergeError
from ...core.train.detector import EncodedPrompt
from .schedule import noise_schedule


class _PipelineFamily:
    """Stable Diffusion 1 and 2; base class of the other families.

    Args:
        pipe: The pipeline.
        height, width: Image size in pixels.
        guidance: Guidance scale.

    Raises:
        MergeError: The pipeline cannot generate images of this size.
    """

    component = "unet"
    patch = 1  # side of a token in latents
    guided = True  # two forward passes, with and without the prompt; otherwise the model takes the scale as an input

    def __init__(self, pipe: Any, height: int, width: int, guidance: float) -> None:
        self.pipe, self.guidance = pipe, guidance
        self.model = getattr(pipe, self.component)
        self.device: torch.device = pipe._execution_device  # the computing device, also of an offloaded model
        self.pixels = (height, width)
        self.height, self.width = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
        step = pipe.vae_scale_factor * self.patch
        if height % step or width % step or min(height, width) < step:
            raise MergeError(
                "The pipeline cannot generate images of this size.",
                expected=f"multiples of {step} pixels",
                found=f"{width} x {height}",
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents."""
        return (self.model.config.in_channels, self.height, self.width)

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """The conditioning of a prompt: tensors with one row."""
        text, *_ = self.pipe.encode_prompt(prompt, self.device, 1, False)
        return {"text": text}

    def negative(self) -> dict[str, Tensor]:
        """The conditioning of the empty negative prompt."""
        return self.encode("")

    def tokenizers(self) -> dict[str, range]:
        """Name of each tokenizer whose tokens are in the text conditioning -> their positions, padding included."""
        return {"tokenizer": range(self.pipe.tokenizer.model_max_length)}

    def max_sequence_length(self) -> int:
        """Number of tokens that the pipeline pads T5's prompts to."""
        return inspect.signature(self.pipe.encode_prompt).parameters["max_sequence_length"].default

    def arguments(self, rows: dict[str, Tensor], t: Tensor) -> dict[str, Any]:
        """Arguments of the model besides the latents.

        Args:
            rows: Conditioning of `B` rows, see `encode`.
            t: ``(B,)`` timesteps, 0 to 1000.
        """
        return {"timestep": t, "encoder_hidden_states": rows["text"]} | self._guidance_embedding(len(t))

    def _guidance_embedding(self, batch: int) -> dict[str, Tensor]:
        """The guidance scale as an argument, for models that take it (such as LCM's)."""
        if self.guided:
            return {}
        scale = torch.full((batch,), self.guidance - 1)
        width = self.model.config.time_cond_proj_dim
        embedding: Tensor = self.pipe.get_guidance_scale_embedding(scale, embedding_dim=width)
        return {"timestep_cond": embedding.to(self.device, self.model.dtype)}

    def to_image(self, latents: Tensor) -> Tensor:
        """Latents in the layout of the VAE, ``(B, C, h, w)``."""
        return latents

    def from_image(self, latents: Tensor) -> Tensor:
        """Latents in the layout of the model; the inverse of `to_image`."""
        return latents


class _StableDiffusionXL(_PipelineFamily):
    def tokenizers(self) -> dict[str, range]:
        return {"tokenizer_2": range(self.pipe.tokenizer_2.model_max_length)}  # refiners have no other

    def encode(self, prompt: str) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def negative(self) -> dict[str, Tensor]:
        _, text, _, pooled = self.pipe.encode_prompt("")  # zeros where the model was trained with zeros
        return {"text": text, "pooled": pooled}

    def arguments(self, rows: dict[str, Tensor], t: Tensor) -> dict[str, Any]:
        encoder = self.pipe.text_encoder_2
        width = int(rows["pooled"].shape[-1]) if encoder is None else encoder.config.projection_dim
        time_ids = self.pipe._get_add_time_ids(
            self.pixels, (0, 0), self.pixels, dtype=rows["text"].dtype, text_encoder_projection_dim=width
        )
        added = {"text_embeds": rows["pooled"], "time_ids": time_ids.to(t.device).expand(len(t), -1)}
        return {**super().arguments(rows, t), "added_cond_kwargs": added}


class _StableDiffusion3(_PipelineFamily):
    component = "transformer"

    def __init__(self, pipe: Any, height: int, width: int, guidance: float) -> None:
        self.patch = pipe.transformer.config.patch_size
        super().__init__(pipe, height, width, guidance)

    def encode(self, prompt: str) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def tokenizers(self) -> dict[str, range]:
        clip = self.pipe.tokenizer_max_length
        positions = {
            "tokenizer": range(clip),
            "tokenizer_2": range(clip),
            "tokenizer_3": range(clip, clip + self.max_sequence_length()),
        }
        return {name: part for name, part in positions.items() if getattr(self.pipe, name) is not None}

    def arguments(self, rows: dict[str, Tensor], t: Tensor) -> dict[str, Any]:
        return {"timestep": t, "encoder_hidden_states": rows["text"], "pooled_projections": rows["pooled"]}


class _Flux(_PipelineFamily):
    component = "transformer"
    patch = 2
    guided = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.height * self.width // 4, self.model.config.in_channels)

    def encode(self, prompt: str) -> dict[str, Tensor]:
        text, pooled, _ = self.pipe.encode_prompt(prompt)
        return {"text": text, "pooled": pooled}

    def tokenizers(self) -> dict[str, range]:
        return {"tokenizer_2": range(self.max_sequence_length())}

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


# Keyed by the pipeline's class name; subclasses of these are supported too.
_FAMILIES: dict[str, type[_PipelineFamily]] = {
    "StableDiffusionPipeline": _PipelineFamily,
    "StableDiffusionXLPipeline": _StableDiffusionXL,
    "StableDiffusion3Pipeline": _StableDiffusion3,
    "FluxPipeline": _Flux,
}


def _family_of(pipe: Any, size: tuple[int, int] | None, guidance: float | None) -> _PipelineFamily:
    families = [_FAMILIES[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in _FAMILIES]
    if not families:
        raise MergeError(
            "Gates cannot be trained on this pipeline; mixing works on any.",
            expected=", ".join(_FAMILIES),
            found=type(pipe).__name__,
            remedy="load the model's text-to-image pipeline if it is one of these; else train in ComfyUI",
        )
    if guidance is None:
        guidance = float(inspect.signature(pipe.__call__).parameters["guidance_scale"].default)
    family = families[0](pipe, *(size or _default_size(pipe, families[0].component)), guidance)
    if family.component == "unet" and pipe.unet.config.time_cond_proj_dim is not None:
        family.guided = False
    return family


class PipelinePromptEncoder:
    """Implements `core.train.PromptEncoder`: encodes prompts as `PipelineDenoiser` does.

    Args:
        pipe: A pipeline of one of the supported classes.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.family = pipe, _family_of(pipe, None, None)
        self._tokenizers = self.family.tokenizers()

    @torch.no_grad()
    def encode(self, prompt: str) -> EncodedPrompt:
        offsets = {name: positions.start for name, positions in self._tokenizers.items()}
        with _without_warnings():  # that a long prompt is cut off: some prompts of the fit are long on purpose
            return EncodedPrompt(self.family.encode(prompt)["text"][0].float().cpu(), None, offsets)

    def token_ids(self, prompt: str) -> Mapping[str, Sequence[int]]:
        return {
            name: getattr(self.pipe, name)(
                prompt, truncation=True, padding="max_length", max_length=len(positions)
            ).input_ids
            for name, positions in self._tokenizers.items()
        }


@contextmanager
def _without_warnings() -> Generator[None]:
    """Silence diffusers' and transformers' warnings inside the block."""
    before = [(logging, logging.get_verbosity()) for logging in (diffusers.utils.logging, transformers.utils.logging)]
    try:
        for logging, _ in before:
            logging.set_verbosity_error()
        yield
    finally:
        for logging, verbosity in before:
            logging.set_verbosity(verbosity)


class PipelineDenoiser:
    """Implements `core.train.Denoiser` for `StableDiffusionPipeline`, `StableDiffusionXLPipeline`,
    `StableDiffusion3Pipeline` and `FluxPipeline`.

    Prompts are encoded once, with the defaults of the pipeline's `encode_prompt`, and kept on the CPU. Times follow the
    scheduler's schedule including its shift; predictions are noise, v or velocity, as the model was trained.

    Args:
        pipe: The pipeline. Its model is used on its device and in its dtype.
        prompts: The prompts, which `predict` and `sample` take by their positions in this list.
        size: Height and width in pixels; default the pipeline's own.
        guidance: Guidance scale of sampling; default the pipeline's own; values up to 1 mean none.
        steps: Number of sampling steps (Euler's method).

    Raises:
        MergeError: The pipeline, its scheduler or the size is not supported.
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
        self.family = _family_of(pipe, size, guidance)
        tokens = self.family.height * self.family.width // self.family.patch**2
        self.pipe, self.model, self.steps = pipe, self.family.model, steps
        self.device = self.family.device
        self.schedule = noise_schedule(pipe.scheduler, tokens)
        with torch.no_grad():
            rows = [self.family.encode(prompt) for prompt in prompts]
            self._conditioning = {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}
            self._negative = {name: tensor.cpu() for name, tensor in self.family.negative().items()}

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        x = self.noise(len(prompts), seed)
        times = torch.linspace(1, 0, self.steps + 1, device=self.device)
        for i, now in enumerate(times[:-1]):
            t = now.expand(len(prompts))
            prediction = self._run(x, t, self._rows_of(prompts))
            if self.family.guided and self.family.guidance > 1:  # a pass of its own: gates may be held per prompt
                rows = {name: row.expand(len(prompts), *row.shape[1:]) for name, row in self._negative.items()}
                negative = self._run(x, t, rows)
                prediction = negative + self.family.guidance * (prediction - negative)
            clean, noise = self._clean_and_noise(x, t, prediction)
            x = clean if i == self.steps - 1 else self.noised(clean, times[i + 1].expand(len(prompts)), noise)
        return x

    def noise(self, batch: int, seed: int) -> Tensor:
        """Pure noise in the shape of latents, ``(B, ..)`` float32."""
        return torch.randn(batch, *self.family.shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        a, b, _, _ = self._coefficients(t, latents)
        return a * latents + b * noise

    def goal(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        _, _, c, d = self._coefficients(t, latents)
        return c * noise + d * latents

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        return self._run(noisy.to(self.device), t.to(self.device), self._rows_of(prompts))

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return self._clean_and_noise(noisy, t, prediction)[0]

    def _clean_and_noise(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that a prediction implies."""
        a, b, c, d = self._coefficients(t, noisy)
        determinant = a * c - b * d
        return (c * noisy - b * prediction) / determinant, (a * prediction - d * noisy) / determinant

    def _coefficients(self, t: Tensor, like: Tensor) -> list[Tensor]:
        """``a, b, c, d`` of the schedule, in shapes that broadcast with latents."""
        return [value.view(-1, *(1 for _ in like.shape[1:])) for value in self.schedule.coefficients(t)]

    def _rows_of(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        return {name: tensor[list(prompts)] for name, tensor in self._conditioning.items()}

    def _run(self, x: Tensor, t: Tensor, rows: dict[str, Tensor]) -> Tensor:
        dtype = self.model.dtype
        rows = {name: tensor.to(self.device, dtype) for name, tensor in rows.items()}
        arguments = self.family.arguments(rows, self.schedule.timestep(t))
        x_name = "sample" if self.family.component == "unet" else "hidden_states"
        return self.model(**{x_name: x.to(dtype)}, **arguments, return_dict=False)[0].float()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents, differentiably, to images ``(B, 3, H, W)`` float32 in about -1 .. 1."""
        vae, config = self._vae(), self.pipe.vae.config
        z = self.family.to_image(latents)
        mean, std = _latent_mean_and_std(config, z)
        z = z * std / config.scaling_factor + mean
        return vae.decode(z.to(vae.dtype), return_dict=False)[0].float()

    def encode(self, images: Sequence[Any]) -> Tensor:
        """Encode Pillow images, resized to the training size, to latents ``(B, ..)`` float32."""
        vae, config = self._vae(), self.pipe.vae.config
        x = self.pipe.image_processor.preprocess(list(images), *self.family.pixels)
        with torch.no_grad():
            z = vae.encode(x.to(self.device, vae.dtype)).latent_dist.mode().float()
        mean, std = _latent_mean_and_std(config, z)
        return self.family.from_image((z - mean) * config.scaling_factor / std)

    def _vae(self) -> Any:
        vae = self.pipe.vae
        if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            vae.to(torch.float32)  # it overflows in float16; the pipelines upcast it too
        return vae


def _default_size(pipe: Any, component: str) -> tuple[int, int]:
    side: Any = getattr(pipe, "default_sample_size", None) or getattr(pipe, component).config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def _latent_mean_and_std(config: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and standard deviation of a VAE's latents: per channel if its config has them, else its shift and 1."""
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return config.get("shift_factor") or 0.0, 1.0
    mean, std = (like.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std
