"""Gate training on a language model, for `legomole train-gates`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..hosts.loading import default_dtype
from .console import out, print_json
from .environment import import_host, launched_devices, local_path
from .gates_input import read_settings, read_texts
from .gates_report import gates_facts, language_model_code, print_course, report_training
from .options import check_output, size_of

if TYPE_CHECKING:
    from .train_gates import LanguageOptions, TrainingRun

_DEFAULT_GATES = {"granularity": "network", "activation": "softmax-null", "reads": "hidden"}


def train_language_model(run: TrainingRun, options: LanguageOptions) -> None:
    """Train gates on a language model, write them, and print how the training went.

    Raises:
        LegoMoleError: Inputs that cannot be read or trained with, or an output that cannot be written.
    """
    from ..core.train import FitSettings

    if len(options.texts) != len(run.loras):
        raise typer.BadParameter(
            f"The model is a language model: give --texts once for every LoRA ({len(run.loras)} LoRAs and "
            f"{len(options.texts)} times --texts)."
        )
    training, gates = read_settings(FitSettings, {"batch": 8, **run.training}, {**_DEFAULT_GATES, **run.gates})
    examples = [read_texts(path) for path in options.texts]
    others = [] if options.others is None else read_texts(options.others)
    paths = [local_path(Path(path)) for path, _ in run.loras]
    output = check_output(run.output, "gates", paths, overwrite=run.overwrite)

    import torch

    from ..core.formats import load
    from ..core.mole.gates import GateSet
    from ..core.mole.mixture import Mixture

    devices, first, device = launched_devices(run.device)
    trainer = import_host("transformers.training")
    dtype = getattr(torch, run.dtype or default_dtype(device))
    model, tokenizer = trainer.load_model(run.model, device=device, dtype=dtype)
    adapters = import_host("transformers.mixing").experts(model, [load(path) for path in paths])
    mixture = Mixture(tuple(adapters), GateSet(len(adapters), gates), tuple(strength for _, strength in run.loras))
    remedy = "try --checkpointing, a smaller --batch, or --set accumulation=4"
    with report_training(run.state, remedy, quiet=run.json or not first) as progress:
        result = trainer.train_gates(
            model, mixture, examples, tokenizer, training, others=others, checkpointing=run.checkpointing,
            folder=run.state, devices=devices, progress=progress,
        )  # fmt: skip
    if not first:
        return
    result.gates.save(output)
    loras = [(str(path), strength) for path, (_, strength) in zip(paths, run.loras, strict=True)]
    code = language_model_code(run.model, loras, output)
    if run.json:
        counts = [len(texts) for texts in (*examples, others)]
        print_json({**gates_facts(result.gates), "texts": counts, "output": str(output), "python": code})
        return
    print_course(result.gates, f"{sum(map(len, examples)) + len(others)} texts")
    out().print(f"wrote {output} ({size_of(output)})\n\nTo use them:\n\n{code}", markup=False)
