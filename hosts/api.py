"""Mix adapters and train gates on any supported model: a diffusers pipeline or a transformers language model.

Each function sees which kind of model it got and calls the function of that host. Importing this module loads neither
torch nor a host's libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import FormatError, MergeError, name_some
from .loading import import_host

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.mole.attach import Attachment
    from ..core.mole.gates import GateSet
    from ..core.mole.mixture import Mixture
    from ..core.progress import Progress
    from ..core.train import Devices, FitSettings, TrainingResult
    from .transformers.training import Example

ModelKind = Literal["pipeline", "language model"]

_HOSTS: dict[ModelKind, tuple[str, str]] = {  # folder in this package, extra that installs its libraries
    "pipeline": ("diffusers", "diffusers"),
    "language model": ("transformers", "peft"),
}


def experts(model: Any, adapters: Sequence[Adapter]) -> list[Adapter]:
    """Rename adapters to a model's module paths, so that a mixture can be attached to the model::

        mixture = legomole.Mixture(experts(pipe, [legomole.load("style.safetensors")]))

    Parts of adapters that cannot be mixed (text encoders of a pipeline, biases, layers trained in full) are kept; a
    warning reports them.

    Args:
        model: The diffusers pipeline or transformers model that the adapters were trained for.
        adapters: The adapters as loaded, in any dialect.

    Raises:
        MergeError: `model` is of another kind, or an adapter does not fit it.
    """
    return _host(model, "mixing").experts(model, adapters)


def mixed(
    model: Any,
    mixture: Mixture,
    *,
    checkpointing: bool = False,
    regions: Sequence[Any] | None = None,
    steps: Sequence[tuple[float, float]] | None = None,
) -> Attachment:
    """Attach a mixture to a model.

    Use it in a ``with`` block, or call `Attachment.detach` at the end::

        with mixed(pipe, mixture):
            pipe("a heart in ember style")

        with mixed(pipe, mixture, regions=[left, right]):  # masks: the first LoRA acts on the left, the second right
            pipe("a cat and a dog")

    Args:
        model: A diffusers pipeline or a transformers model.
        mixture: Adapters from `experts`, with their gates.
        checkpointing: Recompute blocks in the backward pass, see `attach`.
        regions: Pipelines only: per expert, ``None`` or a map ``(H, W)`` of 0 .. 1 of any size, see `Mixture`.
        steps: Pipelines only: per expert, the start and end of the part of the sampling steps in which it acts, 0 .. 1.

    Raises:
        MergeError: `model` is of another kind, or the mixture does not fit it.
    """
    only_pictures = {name: value for name, value in (("regions", regions), ("steps", steps)) if value is not None}
    if only_pictures and kind_of_model(model) != "pipeline":
        raise MergeError(
            "Regions and steps are for pictures.", expected="a diffusers pipeline", found=type(model).__name__
        )
    return _host(model, "mixing").mixed(model, mixture, checkpointing=checkpointing, **only_pictures)


def routed(
    pipeline: Any, mixture: Mixture, concepts: Sequence[Sequence[str]], *, compose: float | None = None
) -> AbstractContextManager[Attachment, bool | None]:
    """Attach a mixture with the prompt router: each prompt gets the adapters whose words it contains. No training::

        with routed(pipe, mixture, [["ember style"], ["heart"]]):
            pipe("a heart in ember style")

    Args:
        pipeline: A diffusers pipeline.
        mixture: Adapters from `experts`; its gates are not evaluated.
        concepts: Per expert, the words or phrases that name its concept.
        compose: Gate value of each of several adapters that a prompt names together; default 1.2.

    Raises:
        MergeError: `pipeline` is not a pipeline, or see `hosts.diffusers.mixing.routed`.
    """
    if kind_of_model(pipeline) != "pipeline":
        raise MergeError(
            "The prompt router works on diffusers pipelines only.",
            expected="a diffusers pipeline",
            found=type(pipeline).__name__,
            remedy="train gates for a language model",
        )
    options = {} if compose is None else {"compose": compose}
    return _host(pipeline, "mixing").routed(pipeline, mixture, concepts, **options)


def load_gates(model: Any, path: str | Path, adapters: Sequence[Adapter]) -> GateSet:
    """Load trained gates for adapters on a model.

    Args:
        model: The diffusers pipeline or transformers model.
        path: File written by `TrainedGates.save`.
        adapters: Adapters from `experts`: all or some of those the gates were trained with, in any order.

    Returns:
        The gates, in the order of `adapters`.

    Raises:
        FormatError: There is no such file, or it is damaged.
        MergeError: `model` is of another kind, or the gates were trained with other LoRAs or on another kind of model.
    """
    return _host(model, "mixing").load_gates(model, path, adapters)


def train_gates(
    model: Any,
    mixture: Mixture,
    *,
    settings: FitSettings | None = None,
    concepts: Sequence[Sequence[str]] | None = None,
    texts: Sequence[str] | None = None,
    images: Sequence[tuple[Any, str]] | None = None,
    clip: tuple[Any, Any] | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    sampling_steps: int | None = None,
    examples: Sequence[Sequence[Example]] | None = None,
    tokenizer: Any = None,
    others: Sequence[Example] | None = None,
    checkpointing: bool = False,
    folder: Path | None = None,
    devices: Devices | None = None,
    progress: Progress | None = None,
    keep: Callable[[TrainingResult], None] | None = None,
) -> TrainingResult:
    """Train the gates of a mixture. The model and the adapters are left unchanged::

        result = train_gates(pipe, mixture, concepts=[["ember style"], ["heart"]])
        result = train_gates(model, mixture, examples=[[("1 + 1 =", " 2")], [("A rose", " is red")]], tokenizer=t)
        result.gates.save("gates.safetensors")

    Args:
        model: A diffusers pipeline or a causal language model of transformers.
        mixture: A mixture with untrained gates, whose settings say which gates are trained.
        settings: `TrainSettings` for a pipeline, `FitSettings` for a language model.
        concepts: Pipelines: per expert, the words that name it in a prompt. Required.
        texts: Pipelines: training prompts; by default they are made from the concepts.
        images: Pipelines: pairs of a Pillow image and its description, for the objective ``denoise``.
        clip: Pipelines: a `CLIPModel` and its `CLIPProcessor`, for the objective ``clip``.
        size: Pipelines: height and width in pixels of the images that are sampled to learn from.
        guidance: Pipelines: their guidance scale.
        sampling_steps: Pipelines: number of sampling steps per image.
        examples: Language models: per expert, a few ``(prompt, answer)`` pairs, or plain texts for gates per token.
            Required.
        tokenizer: Language models: the tokenizer, if examples are strings.
        others: Language models: examples for none of the experts, on which the base model's predictions are preserved.
        checkpointing: Recompute blocks in the backward pass to save memory.
        folder: Folder for the training state, so that an interrupted training can be resumed. Emptied at the end.
        devices: Other processes that train along, see `core.train.Devices`.
        progress: Called with (steps done, steps in all, name of the current step). May raise an exception to cancel.
        keep: Called with the gates so far when the training is interrupted.

    Returns:
        Trained gates and losses; for a pipeline a `PipelineTraining` with the gates' values per prompt.

    Raises:
        MergeError: `model` is of another kind, arguments are missing or for another kind of model, or they cannot be
            used for training.
        FormatError: `folder` holds another training.

    See `hosts.diffusers.training.train_gates` and `hosts.transformers.training.train_gates` for details.
    """
    kind = kind_of_model(model)
    arguments: dict[ModelKind, dict[str, Any]] = {
        "pipeline": {
            "concepts": concepts, "texts": texts, "images": images, "clip": clip, "size": size, "guidance": guidance,
            "sampling_steps": sampling_steps,
        },
        "language model": {"examples": examples, "tokenizer": tokenizer, "others": others},
    }  # fmt: skip
    _check_arguments(kind, arguments, settings)
    given = {name: value for name, value in arguments[kind].items() if value is not None}
    return _host(model, "training").train_gates(
        model, mixture, settings=settings, checkpointing=checkpointing, folder=folder, devices=devices,
        progress=progress, keep=keep, **given,
    )  # fmt: skip


def kind_of_model(model: Any) -> ModelKind:
    """Tell a diffusers pipeline from a transformers model, by base classes or else by attributes.

    Raises:
        MergeError: The object is neither.
    """
    inner = getattr(model, "_orig_mod", model)  # `torch.compile` wraps a module in another class
    if _inherits(inner, "diffusers", "DiffusionPipeline"):
        return "pipeline"
    if _inherits(inner, "transformers", "PreTrainedModel"):
        return "language model"
    network = getattr(inner, "transformer", None) or getattr(inner, "unet", None)
    if hasattr(inner, "components") and _inherits(network, "torch", "Module"):
        return "pipeline"
    of_pipeline = _inherits(inner, "diffusers", "ModelMixin")
    if _inherits(inner, "torch", "Module") and hasattr(inner, "config") and not of_pipeline:
        return "language model"
    raise MergeError(
        "Adapters cannot be mixed on this object.",
        expected="a diffusers pipeline or a transformers model",
        found=f"{type(inner).__module__}.{type(inner).__name__}",
        remedy="give the whole pipeline"
        if of_pipeline
        else "load the pipeline or model first; for other torch modules use `legomole.attach`",
    )


def kind_of_folder(path: str | Path) -> ModelKind:
    """Tell a saved diffusers pipeline from a saved transformers model.

    Args:
        path: Folder, or name in the local Hugging Face cache (``OWNER/NAME`` or ``OWNER/NAME@REVISION``). Nothing is
            downloaded.

    Raises:
        FormatError: There is no such folder or name, or it holds neither.
    """
    from ..core.json_text import from_json
    from .hub import cached_folder

    folder = Path(path) if Path(path).exists() else cached_folder(str(path), "model")
    if (folder / "model_index.json").is_file():
        return "pipeline"
    found: object = name_some(sorted(entry.name for entry in folder.iterdir())) if folder.is_dir() else "a file"
    remedy = "name the folder that save_pretrained wrote"
    if (folder / "config.json").is_file():
        try:
            config = from_json((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError("The model's config.json cannot be read.", file=path, found=str(error)) from error
        if not (isinstance(config, dict) and "_diffusers_version" in config):
            return "language model"
        found, remedy = "one component of a pipeline", "name the folder of the whole pipeline"
    raise FormatError(
        "This is neither a diffusers pipeline nor a transformers model.",
        file=path,
        expected="a folder with model_index.json (diffusers) or config.json (transformers)",
        found=found or "an empty folder",
        remedy=remedy,
    )


def _inherits(value: object, library: str, name: str) -> bool:
    """Whether a class of a library, by its name, is among the base classes. Does not import the library."""
    return any(cls.__name__ == name and cls.__module__.partition(".")[0] == library for cls in type(value).__mro__)


def _host(model: Any, module: str) -> Any:
    """A module of the host of a model, ``mixing`` or ``training``.

    Raises:
        MergeError: The model is of no supported kind, or libraries that the host needs are not installed.
    """
    folder, extra = _HOSTS[kind_of_model(model)]
    return import_host(f"{folder}.{module}", extra)


def _check_arguments(kind: ModelKind, arguments: dict[ModelKind, dict[str, Any]], settings: FitSettings | None) -> None:
    """Raise MergeError if arguments of `train_gates` are missing, or for the other kind of model."""
    from ..core.train import TrainSettings

    other: ModelKind = "language model" if kind == "pipeline" else "pipeline"
    if wrong := [name for name, value in arguments[other].items() if value is not None]:
        raise MergeError(
            f"These arguments are for a {other}, and the model is a {kind}.",
            expected=", ".join(arguments[kind]),
            found=", ".join(wrong),
        )
    if kind == "pipeline" and arguments[kind]["concepts"] is None:
        raise MergeError(
            "Training on a pipeline needs the words that name each LoRA in a prompt.",
            expected='concepts, e.g. [["ember style"], ["heart"]]',
            found="none",
        )
    if kind == "language model" and arguments[kind]["examples"] is None:
        raise MergeError(
            "Training on a language model needs examples for each LoRA.",
            expected='examples, e.g. [[("1 + 1 =", " 2")], [("A rose", " is red")]]',
            found="none",
        )
    if settings is not None and isinstance(settings, TrainSettings) != (kind == "pipeline"):
        raise MergeError(
            f"These settings are for a {other}, and the model is a {kind}.",
            expected="TrainSettings" if kind == "pipeline" else "FitSettings",
            found=type(settings).__name__,
        )
