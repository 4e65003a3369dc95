"""What `train-gates` and `inspect` print about gates."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..core.errors import FormatError, LegoMoleError, name_some
from ..hosts.hub import split_revision
from .console import out, plain, progress_bar
from .options import size_of

if TYPE_CHECKING:
    from ..core.mole.trained import TrainedGates
    from ..core.progress import Progress
    from ..hosts.diffusers.training import PipelineTraining


@contextmanager
def report_broken_record(path: object) -> Generator[None]:
    """Turn errors from malformed training records in a gates file into `FormatError`."""
    try:
        yield
    except LegoMoleError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            "The record of the training in the file is broken.", file=path, found=f"{type(error).__name__}: {error}"
        ) from error


def training_facts(result: PipelineTraining, labels: Sequence[str]) -> dict[str, Any]:
    """Return a training on a pipeline as plain data."""
    return {
        **gates_facts(result.gates),
        "prompts": len(result.prompts),
        "weights": [
            {"named": [labels[i] for i in named], "prompts": count, "mean": dict(zip(labels, mean, strict=True))}
            for named, count, mean in mean_gates(result)
        ],
        "left_out": list(result.left_out),
        "notes": [*result.gates.notes, *result.notes],
    }


def gates_facts(gates: TrainedGates) -> dict[str, Any]:
    """Return trained gates as plain data."""
    training = gates.training
    losses, entropies = (list(training.get(name, ())) for name in ("losses", "entropies"))
    return {
        "base": gates.base,
        "experts": [expert.model_dump() for expert in gates.experts],
        "gates": len(gates.gates.names),
        **gates.gates.settings.model_dump(),
        "training": dict(training.get("settings", {})),
        "concepts": training.get("concepts", []),
        "strengths": training.get("strengths", []),
        "loss": losses[:1] + losses[-1:],
        "entropy": entropies[:1] + entropies[-1:],
        "steps": len(losses),
        "stopped": training.get("stopped", ""),
        "notes": list(gates.notes),
    }


def mean_gates(result: PipelineTraining) -> list[tuple[tuple[int, ...], int, list[float]]]:
    """Return the mean gates per kind of prompt: (experts it names, number of such prompts, mean gate per expert)."""
    kinds: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(result.prompts):
        kinds.setdefault(prompt.named, []).append(i)
    order = sorted(kinds, key=lambda named: (len(named) == 0, len(named), named))
    return [(named, len(kinds[named]), result.values[kinds[named]].mean((0, 1)).tolist()) for named in order]


def print_training(result: PipelineTraining, labels: Sequence[str]) -> None:
    """Print the result of a training on a pipeline."""
    console = out()
    print_course(result.gates, f"{len(result.prompts)} prompts")
    if result.left_out:
        console.print(f"{len(result.left_out)} parts are not mixed: {name_some(result.left_out, 2)}", markup=False)
    table = Table(title="Mean gate of each LoRA over the model", title_justify="left")
    table.add_column("prompts that name")
    for label in labels:
        table.add_column(plain(label), justify="right")
    for named, count, mean in mean_gates(result):
        names = " and ".join(labels[i] for i in named) or "none"
        table.add_row(plain(f"{names} ({count})"), *(f"{value:.2f}" for value in mean))
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", markup=False)


def print_course(gates: TrainedGates, examples: str) -> None:
    """Print how a training went.

    Args:
        gates: Its result.
        examples: What it trained on, e.g. ``35 prompts``.
    """
    facts = gates_facts(gates)
    line = f"{facts['training']['objective']} on {facts['base']}: {_count_of_gates(facts)}, {examples}"
    if facts["loss"]:
        line += f", {facts['steps']} steps\nloss     {_first_to_last(facts['loss'])}"
        line += f"\nentropy  {_first_to_last(facts['entropy'])}"
    out().print(line, markup=False)
    if facts["stopped"]:
        out().print(f"stopped early: {facts['stopped']}", markup=False)
    for note in facts["notes"]:
        out().print(f"note: {note}", markup=False)


@contextmanager
def report_training(state: Path | None, remedy: str, *, quiet: bool) -> Generator[Progress]:
    """Show the progress of a training inside the block, and what is left on disk if it is cancelled.

    Args:
        state: Folder of the checkpoints.
        remedy: What to do if memory runs out.
        quiet: Show no progress.

    Raises:
        KeyboardInterrupt: The training was cancelled; the text says what is left.
        MergeError: Memory ran out.
    """
    from ..core.memory import report_out_of_memory

    with progress_bar("training", quiet=quiet, show_step=True) as progress, report_out_of_memory(remedy):
        try:
            yield progress
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_cancelled_text(state)) from None


def _cancelled_text(state: Path | None) -> str:
    if state is None:
        return "Cancelled. Nothing was written. With --state FOLDER the training could be resumed."
    if not any(state.glob("*.safetensors")):
        return "Cancelled before the first checkpoint. Nothing was written."
    return f"Cancelled. A checkpoint is kept in {state}: the same command resumes from there."


def _count_of_gates(facts: Mapping[str, Any]) -> str:
    return f"{facts['gates']} gate{'' if facts['gates'] == 1 else 's'}"


def _first_to_last(values: Sequence[float]) -> str:
    return f"{values[0]:.4g} to {values[-1]:.4g}"


def print_gates(path: str, gates: TrainedGates) -> None:
    """Print the contents of a gates file."""
    facts = gates_facts(gates)
    table = Table(title=plain(path), title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("holds", f"{_count_of_gates(facts)} of a mixture (MoLE)")
    table.add_row("base model", plain(facts["base"] or "unknown"))
    strengths = facts["strengths"] or [1.0] * len(gates.experts)
    concepts = facts["concepts"] or [[]] * len(gates.experts)
    for expert, strength, words in zip(gates.experts, strengths, concepts, strict=True):
        named = f", named by {', '.join(words)}" if words else ""
        table.add_row("LoRA", plain(f"{expert.label}:{strength:g}, sha256 {expert.sha256[:12]}..{named}"))
    table.add_row("gates", f"per {facts['granularity']}, {facts['activation']}, read {facts['reads']}")
    settings: Mapping[str, Any] = facts["training"]
    if settings:
        shown = ("steps", "batch", "learning_rate", "balance", "seed") if facts["loss"] else ("seed",)
        course = ""
        if facts["loss"]:
            course = f"; loss {_first_to_last(facts['loss'])}, entropy {_first_to_last(facts['entropy'])}"
        how = f"{settings['objective']} ({', '.join(f'{k} {settings[k]}' for k in shown)}){course}"
        table.add_row("trained by", plain(how))
    if facts["stopped"]:
        table.add_row("stopped", plain(facts["stopped"]))
    for note in facts["notes"]:
        table.add_row("note", plain(note))
    table.add_row("size", size_of(Path(path)))
    out().print(table)
    out().print()


def pipeline_code(
    pipeline: str, loras: Sequence[tuple[str, float]], output: Path, concepts: Sequence[Sequence[str]]
) -> str:
    """Return Python code that uses gates on a pipeline."""
    prompt = ", ".join(words[0] for words in concepts)
    lines = [
        "import legomole",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({_model_arguments(pipeline)})",
        *_mixture_code("pipe", loras, output),
        f"    image = pipe({prompt!r}).images[0]",
    ]
    return "\n".join(lines)


def language_model_code(model: str, loras: Sequence[tuple[str, float]], output: Path) -> str:
    """Return Python code that uses gates on a language model."""
    lines = [
        "import legomole",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({_model_arguments(model)})",
        f"model = AutoModelForCausalLM.from_pretrained({_model_arguments(model)})",
        *_mixture_code("model", loras, output),
        "    ids = model.generate(**tokenizer('..', return_tensors='pt'), max_new_tokens=40)",
    ]
    return "\n".join(lines)


def _model_arguments(name: str) -> str:
    """Return the arguments of ``from_pretrained`` for a folder, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``."""
    repository, revision = (name, None) if Path(name).exists() else split_revision(name)
    return repr(repository) if revision is None else f"{repository!r}, revision={revision!r}"


def _mixture_code(model: str, loras: Sequence[tuple[str, float]], output: Path) -> list[str]:
    loads = ", ".join(f"legomole.load({path!r})" for path, _ in loras)
    strengths = ", ".join(f"{strength:g}" for _, strength in loras)
    return [
        f"loras = legomole.experts({model}, [{loads}])",
        f"gates = legomole.load_gates({model}, {str(output)!r}, loras)",
        f"mixture = legomole.Mixture(loras, gates, strengths=[{strengths}])",
        f"with legomole.mixed({model}, mixture):",
    ]


def plot_training(result: PipelineTraining, labels: Sequence[str], path: Path) -> None:
    """Save a plot: loss and entropy over the steps, and the mean gate of every LoRA in every part of the model.

    Raises:
        SaveError: The file could not be written.
    """
    from ..core.formats.files import write_bytes
    from ..core.pictures.charts import curves, heat_map, png, stacked

    parts = [
        heat_map(
            result.values.mean(0),
            [scope or "(network)" for scope in result.scopes],
            labels,
            "gates, mean over the prompts",
        )
    ]
    if result.fit.losses:
        parts.insert(0, curves({"loss": result.fit.losses, "entropy": result.fit.entropies}, "training"))
    write_bytes(path, png(stacked(parts)))
