"""What `train-gates` and `inspect` say about gates."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..core.errors import FormatError, LegoMoleError, name_some
from .console import out, plain
from .options import size_of

if TYPE_CHECKING:
    from ..core.mole.trained import TrainedGates
    from ..hosts.diffusers.training import PipelineTraining


@contextmanager
def told(path: object) -> Generator[None]:
    """Make an error of what a file of gates says of its training, where that cannot be shown."""
    try:
        yield
    except LegoMoleError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            "What the file says of its training is broken.", file=path, found=f"{type(error).__name__}: {error}"
        ) from error


def facts(done: PipelineTraining, labels: Sequence[str]) -> dict[str, Any]:
    """A training as plain data."""
    return {
        **gates_facts(done.gates),
        "prompts": len(done.prompts),
        "weights": [
            {"named": [labels[i] for i in named], "prompts": count, "mean": dict(zip(labels, mean, strict=True))}
            for named, count, mean in weights(done)
        ],
        "left_out": list(done.left_out),
    }


def gates_facts(gates: TrainedGates) -> dict[str, Any]:
    """Trained gates as plain data."""
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
    }


def weights(done: PipelineTraining) -> list[tuple[tuple[int, ...], int, list[float]]]:
    """Mean gates per kind of prompt: which LoRAs it names, how many such prompts, the mean of each LoRA's gates."""
    kinds: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(done.prompts):
        kinds.setdefault(prompt.named, []).append(i)
    order = sorted(kinds, key=lambda named: (len(named) == 0, len(named), named))
    return [(named, len(kinds[named]), done.values[kinds[named]].mean((0, 1)).tolist()) for named in order]


def tell(done: PipelineTraining, labels: Sequence[str]) -> None:
    """Print what a training came to."""
    console = out()
    tell_course(done.gates, f"{len(done.prompts)} prompts")
    if done.left_out:
        console.print(f"{len(done.left_out)} parts are not mixed: {name_some(done.left_out, 2)}", markup=False)
    table = Table(title="How much of each LoRA goes in, in the mean over the model", title_justify="left")
    table.add_column("prompts that name")
    for label in labels:
        table.add_column(plain(label), justify="right")
    for named, count, mean in weights(done):
        names = " and ".join(labels[i] for i in named) or "none"
        table.add_row(plain(f"{names} ({count})"), *(f"{value:.2f}" for value in mean))
    console.print(table)


def tell_course(gates: TrainedGates, learnt: str) -> None:
    """Print how a training went; `learnt`: what from."""
    found = gates_facts(gates)
    line = f"{found['training']['objective']} on {found['base']}: {_counted(found)}, {learnt}"
    if found["loss"]:
        line += f", {found['steps']} steps\nloss     {_course(found['loss'])}\nentropy  {_course(found['entropy'])}"
    out().print(line, markup=False)
    if found["stopped"]:
        out().print(f"stopped early: {found['stopped']}", markup=False)


def interrupted(state: Path | None) -> str:
    """What a cancelled training leaves behind."""
    if state is None:
        return "Cancelled. Nothing was written. With --state FOLDER what was learnt would have been kept."
    if not any(state.glob("*.safetensors")):
        return "Cancelled before there was anything to keep. Nothing was written."
    return f"Cancelled. What was done is kept in {state}: the same command goes on from there."


def _counted(found: Mapping[str, Any]) -> str:
    return f"{found['gates']} gate{'' if found['gates'] == 1 else 's'}"


def _course(values: Sequence[float]) -> str:
    return f"{values[0]:.4g} to {values[-1]:.4g}"


def show(path: str, gates: TrainedGates) -> None:
    """Print what a file of gates holds."""
    found = gates_facts(gates)
    table = Table(title=plain(path), title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("holds", f"{_counted(found)} of a mixture (MoLE)")
    table.add_row("base model", plain(found["base"] or "unknown"))
    strengths = found["strengths"] or [1.0] * len(gates.experts)
    concepts = found["concepts"] or [[]] * len(gates.experts)
    for expert, strength, words in zip(gates.experts, strengths, concepts, strict=True):
        named = f", named by {', '.join(words)}" if words else ""
        table.add_row("LoRA", plain(f"{expert.label}:{strength:g}, sha256 {expert.sha256[:12]}..{named}"))
    table.add_row("gates", f"per {found['granularity']}, {found['activation']}, read {found['reads']}")
    settings: Mapping[str, Any] = found["training"]
    if settings:
        shown = ("steps", "batch", "learning_rate", "balance", "seed") if found["loss"] else ("seed",)
        course = f"; loss {_course(found['loss'])}, entropy {_course(found['entropy'])}" if found["loss"] else ""
        how = f"{settings['objective']} ({', '.join(f'{k} {settings[k]}' for k in shown)}){course}"
        table.add_row("trained by", plain(how))
    if found["stopped"]:
        table.add_row("stopped", plain(found["stopped"]))
    table.add_row("size", size_of(Path(path)))
    out().print(table)
    out().print()


def python(pipeline: str, loras: Sequence[tuple[str, float]], output: Path, concepts: Sequence[Sequence[str]]) -> str:
    """The lines that use the gates."""
    loads = ", ".join(f"legomole.load({path!r})" for path, _ in loras)
    strengths = ", ".join(f"{strength:g}" for _, strength in loras)
    prompt = ", ".join(words[0] for words in concepts)
    lines = [
        "import legomole",
        "from diffusers import DiffusionPipeline",
        "from legomole.hosts.diffusers.mixing import experts, load_gates, mixed",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({pipeline!r})",
        f"loras = experts(pipe, [{loads}])",
        f"gates = load_gates(pipe, {str(output)!r}, loras)",
        f"mixture = legomole.Mixture(loras, gates, strengths=[{strengths}])",
        "with mixed(pipe, mixture):",
        f"    image = pipe({prompt!r}).images[0]",
    ]
    return "\n".join(lines)


def draw(done: PipelineTraining, labels: Sequence[str], path: Path) -> None:
    """Save a picture: loss and entropy over the steps, and the mean gate of every LoRA in every part of the model.

    Raises:
        SaveError: It could not be written.
    """
    from ..core.formats.files import write_bytes
    from ..core.pictures.charts import curves, heat_map, png, stacked

    parts = [
        heat_map(
            done.values.mean(0), [scope or "(network)" for scope in done.scopes], labels, "gates, mean over the prompts"
        )
    ]
    if done.fit.losses:
        parts.insert(0, curves({"loss": done.fit.losses, "entropy": done.fit.entropies}, "training"))
    write_bytes(path, png(stacked(parts)))
