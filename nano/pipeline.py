"""The small model as a diffusers pipeline, which accepts LoRAs and mixtures like any other."""

from __future__ import annotations

from typing import Any

from .model import Prompts
from .sampling import SHIFT
from .store import Store


def pipeline(store: Store | None = None) -> Any:
    """Build a `diffusers.StableDiffusion3Pipeline` with a single text encoder.

    Call it with ``height=64, width=64, num_inference_steps=12, guidance_scale=3``; with ``sigmas=times()`` of
    `sampling` it takes the same steps as `sampling.sample`.
    """
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    store = store or Store()
    prompts = Prompts()
    base: Any = StableDiffusion3Pipeline  # its annotations omit that encoders may be None

    class NanoPipeline(base):
        def encode_prompt(
            self,
            prompt: str | list[str],
            prompt_2: Any = None,
            prompt_3: Any = None,
            device: Any = None,
            num_images_per_prompt: int = 1,
            do_classifier_free_guidance: bool = True,
            negative_prompt: str | list[str] | None = None,
            **_: Any,
        ) -> tuple[Any, ...]:
            texts = [prompt] if isinstance(prompt, str) else list(prompt)
            negative = (
                [negative_prompt or ""] * len(texts) if not isinstance(negative_prompt, list) else negative_prompt
            )
            encoded: list[Any] = []
            for part in (texts, negative):
                hidden, pooled = (x.repeat_interleave(num_images_per_prompt, 0).to(device) for x in prompts(part))
                encoded.append((hidden, pooled))
            (hidden, pooled), (negative_hidden, negative_pooled) = encoded
            if not do_classifier_free_guidance:
                negative_hidden = negative_pooled = None
            return hidden, negative_hidden, pooled, negative_pooled

    return NanoPipeline(
        transformer=store.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=store.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
