"""Draw docs/images/gates.png: gates trained on a small random Flux. `python docs/images/gates.py`, two minutes.

Two random LoRAs, prompts as sequences of random word vectors, the objective without images. The training is real, but
the model is random: the figure shows how gates behave, not image quality.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import FluxTransformer2DModel
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.record import Record
from legomole.core.train import EncodedPrompt, Prompt, TrainingResult, TrainSettings, fit_detector, prompts_for, train
from torch import Tensor, nn

CONCEPTS = (("ember style",), ("heart",))
LABELS = ("style LoRA", "subject LoRA")
COLOURS = ("#3b6fb6", "#e08a2e")
WIDTH, SIDE, LENGTH = 64, 4, 8


def word(text: str) -> Tensor:
    seed = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def encoded(text: str) -> Tensor:
    """Return a vector per word and zeros as padding, ``(8 or more, WIDTH)``."""
    words = text.split()
    return torch.stack([*map(word, words), *[torch.zeros(WIDTH)] * (LENGTH - len(words))])


class Encoder:
    """Implements `core.train.PromptEncoder`."""

    def encode(self, prompt: str) -> EncodedPrompt:
        return EncodedPrompt(encoded(prompt), None, {"words": 0})

    def token_ids(self, prompt: str) -> dict[str, list[int]]:
        ids = [int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) for word in prompt.split()]
        return {"words": [*ids, *[0] * (LENGTH - len(ids))]}


class Denoiser:
    """Implements `core.train.Denoiser` for the small Flux."""

    def __init__(self, model: nn.Module, prompts: Sequence[Prompt]) -> None:
        self.model = model
        self.text = torch.stack([encoded(prompt.text) for prompt in prompts])

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        x = torch.randn(len(prompts), SIDE * SIDE, 16, generator=torch.Generator().manual_seed(seed))
        for t in (1.0, 0.75, 0.5, 0.25):
            x = x - 0.25 * self.predict(x, torch.full((len(prompts),), t), prompts)
        return x

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        t = t.view(-1, 1, 1)
        return (1 - t) * latents + t * noise

    def goal(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noise - latents

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return noisy - t.view(-1, 1, 1) * prediction

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        text = self.text[list(prompts)]
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(SIDE)), torch.arange(float(SIDE)))
        return self.model(
            hidden_states=noisy,
            encoder_hidden_states=text,
            pooled_projections=text.mean(1),
            timestep=t,
            img_ids=ids,
            txt_ids=torch.zeros(text.shape[1], 3),
        ).sample


def lora(model: nn.Module, seed: int, size: float) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LowRank(
                torch.randn(4, layer.in_features, generator=generator) / layer.in_features**0.5,
                size * torch.randn(layer.out_features, 4, generator=generator),
            )
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and "blocks" in name and "norm" not in name
        }
    )


def trained(
    model: nn.Module, activation: str, balance: float
) -> tuple[TrainingResult, Mixture, Denoiser, list[Prompt]]:
    prompts = prompts_for(CONCEPTS)
    denoiser = Denoiser(model, prompts)
    settings = GateSettings.model_validate({"activation": activation, "granularity": "layer"})
    gates = GateSet(2, settings, detector=fit_detector(CONCEPTS, Encoder()).detector)
    mixture = Mixture((lora(model, 1, 0.5), lora(model, 2, 0.2)), gates)
    with attach(model, mixture) as attachment:
        training = TrainSettings(steps=150, examples=320, samples=64, balance=balance)
        return train(attachment, mixture, denoiser, prompts, CONCEPTS, training), mixture, denoiser, prompts


def main() -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    ).requires_grad_(False)
    figure, (losses, entropies, heat) = plt.subplots(1, 3, figsize=(13, 4), dpi=110, width_ratios=(1, 1, 1.5))
    for colour, balance in zip(COLOURS, (0.0, 0.5), strict=True):
        training, *_ = trained(model, "softmax", balance)
        label = f"softmax, balance loss {balance:g}"
        losses.plot(training.fit.losses, color=colour, lw=1, label=label)
        entropies.plot(training.fit.entropies, color=colour, lw=1.5, label=label)
    training, mixture, denoiser, prompts = trained(model, "sigmoid", 0.0)
    losses.plot(training.fit.losses, color="#5a5a5a", lw=1, label="sigmoid")
    losses.set(title="Loss (distilled, no images)", xlabel="step", yscale="log")
    entropies.axhline(torch.tensor(2.0).log(), color="#bbb", lw=1, ls=":")
    entropies.set(title="Entropy of the gates (nats)", xlabel="step")
    losses.legend(fontsize=7, frameon=False), entropies.legend(fontsize=7, frameon=False)

    shown = ["a picture of ember style", "a picture of heart", "heart in ember style", "a bowl of fruit"]
    denoiser = Denoiser(model, [*prompts, *(Prompt(text, ()) for text in shown)])
    gates = training.gates.gates
    columns: list[Tensor] = []
    with attach(model, Mixture(mixture.experts, gates)) as attachment:
        for i in range(len(prompts), len(prompts) + len(shown)):
            record = Record()
            with attachment.watch(record), torch.no_grad():
                denoiser.predict(torch.zeros(1, SIDE * SIDE, 16), torch.ones(1), [i])
            columns.append(record.table()[0])
    table = torch.cat(columns, 1)  # (scopes, prompts x experts)
    picture = heat.imshow(table, aspect="auto", vmin=0, vmax=1.5, cmap="viridis")
    heat.set_yticks(
        range(len(record.scopes)), [name.replace("transformer_blocks", "blocks") for name in record.scopes], fontsize=7
    )
    names = [f"{text}\n{label}" for text in shown for label in LABELS]
    heat.set_xticks(range(len(names)), names, fontsize=6, rotation=40, ha="right")
    heat.set_title("Sigmoid gates after training, by prompt")
    for x in (1.5, 3.5, 5.5):
        heat.axvline(x, color="white", lw=2)
    figure.colorbar(picture, ax=heat)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), metadata={"Software": None})


if __name__ == "__main__":
    main()
