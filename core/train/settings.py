"""Settings of gate training."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Objective = Literal["distil", "denoise", "clip", "router"]


class FitSettings(BaseModel):
    """How gates are fitted to what they learn from. The same settings, model and LoRAs give the same gates.

    Args:
        steps: Of the optimizer. batch: Examples per step. accumulation: Parts a batch is cut into to save memory.
        learning_rate: Of AdamW, at its peak: risen to over `warmup` steps, then lowered along a cosine to 0.
        weight_decay: Of AdamW.
        balance: Weight of the balance loss; the paper has 0.5, for softmax gates.
        patience: Stop early when the loss has not improved for so many steps; 0 never does.
        seed: Of everything drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=32, ge=1)
    accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-2, gt=0, allow_inf_nan=False)
    warmup: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    balance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    patience: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)


class TrainSettings(FitSettings):
    """How gates of a diffusion model are trained: `FitSettings`, and what they learn from.

    Args:
        objective: ``distil``: imitate the sum of the LoRAs a prompt names, the one LoRA, or the base model; needs no
            images. ``denoise``: the diffusion loss on a few images per LoRA, and the base model's own predictions on
            prompts that name none. ``clip``: the paper's CLIP guidance. ``router``: least squares from the text
            conditioning to the prompt router, no training at all.
        compose: Where a prompt names several LoRAs, their sum is imitated this many times as strong.
        examples: How many noised latents the gates learn from. samples: How many pictures those come from.
    """

    objective: Objective = "distil"
    compose: float = Field(default=1.2, gt=0, allow_inf_nan=False)
    examples: int = Field(default=640, ge=1)
    samples: int = Field(default=128, ge=1)
