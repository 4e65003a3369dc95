"""`legomole train-text-gates`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from .arguments import parse_setting
from .console import out, print_json, progress_bar
from .environment import check_device, computing, host, launched, located
from .gates_input import parse_expert, read_settings, read_texts
from .gates_output import gates_facts, interrupted, tell_course
from .options import (
    GATES,
    TRAINING,
    Activation,
    Balance,
    Batch,
    Checkpointing,
    Device,
    GatesOutput,
    Granularity,
    Json,
    LearningRate,
    ModelDtype,
    Overwrite,
    State,
    Steps,
    TrainingSeed,
    check_output,
    size_of,
)

EXAMPLES = """[bold]Examples[/bold]

Gates for two adapters, from a few examples of what each is for:
[cyan]legomole train-text-gates ./llama sums/ poems/:0.8 --texts sums.jsonl --texts poems.jsonl \\
  -o gates.safetensors[/cyan]

A gate for every token, on two devices:
[cyan]accelerate launch --num_processes 2 -m legomole train-text-gates ./llama sums/ poems/ --reads token \\
  --texts sums.jsonl --texts poems.jsonl -o gates.safetensors[/cyan]
"""


def train_text_gates(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A causal language model with its tokenizer: a folder as transformers saves it, or the name of one in "
            "the local cache. Nothing is downloaded.",
        ),
    ],
    loras: Annotated[
        list[str],
        typer.Argument(
            metavar="LORA[:STRENGTH]",
            help="PEFT folders, or names of adapters in the local cache. Strength 1 if not given.",
        ),
    ],
    texts: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="Examples of what a LoRA is for. Once for every LoRA, in their order. A line each, as JSON: "
            '{"prompt": "..", "completion": ".."}, or {"text": ".."} for gates that read tokens.',
        ),
    ],
    output: GatesOutput,
    others: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Examples of none of the LoRAs, on which the model is to stay as it is."),
    ] = None,
    steps: Steps = None,
    batch: Batch = None,
    lr: LearningRate = None,
    balance: Balance = None,
    seed: TrainingSeed = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            rich_help_panel=TRAINING,
            help="Any other setting: accumulation (1), warmup (10), patience (0), weight_decay (0.001). Repeatable.",
        ),
    ] = None,
    checkpointing: Checkpointing = False,
    state: State = None,
    granularity: Granularity = "network",
    activation: Activation = "softmax-null",
    reads: Annotated[
        Literal["hidden", "experts", "token"],
        typer.Option(
            metavar="NAME",
            rich_help_panel=GATES,
            help="What gates see: the prompt, by the layer's input (hidden) or the LoRAs' outputs (experts); or every "
            "token for itself (token).",
        ),
    ] = "hidden",
    device: Device = "cpu",
    dtype: ModelDtype = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train the gates that mix LoRAs at run time (MoLE), for a language model.

    The LoRAs stay apart; small gates decide for every prompt or token how much of each goes in. Only they are trained.
    [bold]accelerate launch -m legomole train-text-gates ..[/bold] shares the work among several devices.
    """
    from ..core.train import FitSettings

    entries = [parse_expert(text) for text in loras]
    if len(texts) != len(entries):
        raise typer.BadParameter(f"{len(entries)} LoRAs and {len(texts)} times --texts: give one for every LoRA.")
    given = {"steps": steps, "batch": batch, "learning_rate": lr, "balance": balance, "seed": seed}
    training, chosen = read_settings(
        FitSettings,
        {"batch": 8, **{k: v for k, v in given.items() if v is not None}, **dict(map(parse_setting, settings or ()))},
        {"granularity": granularity, "activation": activation, "reads": reads},
    )
    examples = [read_texts(path) for path in texts]
    rest = [] if others is None else read_texts(others)
    paths = [located(Path(path)) for path, _ in entries]
    output = check_output(output, "gates", paths, overwrite=overwrite)
    check_device(device)

    import torch

    from ..core.formats import load
    from ..core.memory import report_out_of_memory
    from ..core.mole.gates import GateSet
    from ..core.mole.mixture import Mixture

    devices, first, device = launched(device)
    trainer = host("transformers.training")
    language, tokenizer = trainer.load_model(model, device=device, dtype=getattr(torch, dtype or computing(device)))
    adapters = host("transformers.mixing").experts(language, [load(path) for path in paths])
    mixture = Mixture(tuple(adapters), GateSet(len(adapters), chosen), tuple(strength for _, strength in entries))
    with (
        progress_bar("training", quiet=json or not first, telling=True) as progress,
        report_out_of_memory("try --checkpointing, a smaller --batch, or --set accumulation=4"),
    ):
        try:
            done = trainer.train_gates(
                language, mixture, examples, tokenizer, training, others=rest, checkpointing=checkpointing,
                folder=state, devices=devices, progress=progress,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt(interrupted(state)) from None
    if not first:
        return
    done.gates.save(output)
    code = _python(model, [(path, strength) for path, (_, strength) in zip(paths, entries, strict=True)], output)
    if json:
        counts = [len(own) for own in (*examples, rest)]
        print_json({**gates_facts(done.gates), "texts": counts, "output": str(output), "python": code})
        return
    tell_course(done.gates, f"{sum(map(len, examples)) + len(rest)} texts")
    out().print(f"wrote {output} ({size_of(output)})\n\nTo use them:\n\n{code}", markup=False)


def _python(model: str, loras: Sequence[tuple[Path, float]], output: Path) -> str:
    """The lines that use the gates."""
    loads = ", ".join(f"legomole.load({str(path)!r})" for path, _ in loras)
    strengths = ", ".join(f"{strength:g}" for _, strength in loras)
    lines = [
        "import legomole",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "from legomole.hosts.transformers.mixing import experts, load_gates, mixed",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({model!r})",
        f"model = AutoModelForCausalLM.from_pretrained({model!r})",
        f"loras = experts(model, [{loads}])",
        f"gates = load_gates(model, {str(output)!r}, loras)",
        f"mixture = legomole.Mixture(loras, gates, strengths=[{strengths}])",
        "with mixed(model, mixture):",
        "    ids = model.generate(**tokenizer('..', return_tensors='pt'), max_new_tokens=40)",
    ]
    return "\n".join(lines)
