"""Settings of gate training."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Objective = Literal["distil", "denoise", "clip", "router"]


class FitSettings(BaseModel):
    """Settings of a fit of gates. The same settings, model and LoRAs give the same gates.

    Args:
        steps: Number of optimizer steps.
        batch: Number of examples per step. accumulation: Number of parts that a batch is computed in, to save memory.
        learning_rate: Peak learning rate of AdamW, reached after `warmup` steps, then lowered to 0 along a cosine.
        weight_decay: Weight decay of AdamW.
        balance: Weight of the balance loss; the paper uses 0.5, for softmax gates.
        patience: Stop early if the loss has not improved for this many steps; 0 never does.
        seed: Random seed.
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
    """Settings of gate training for a diffusion model: those of the fit, and of its examples.

    Args:
        objective: ``distil``: imitate the model with the sum of the LoRAs a prompt names, with the one LoRA, or without
            LoRAs, on noised zero latents; needs no images. ``denoise``: the diffusion loss on a few images per LoRA,
            and the base model's own predictions for prompts that name none. ``clip``: the paper's CLIP guidance.
            ``router``: least squares from the text conditioning to the prompt router, without training.
        compose: Factor on the sum of LoRAs that is imitated where a prompt names several.
        examples: Number of noised latents to learn from. samples: Number of images that they are made from;
            distillation samples none.
    """

    objective: Objective = "distil"
    compose: float = Field(default=1.2, gt=0, allow_inf_nan=False)
    steps: int = Field(default=100, ge=1)
    examples: int = Field(default=160, ge=1)
    samples: int = Field(default=128, ge=1)
