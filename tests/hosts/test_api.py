"""The entry points for every kind of model: each kind is recognised, and the call reaches its host."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("huggingface_hub")

import huggingface_hub as hub
from legomole.core.errors import FormatError, MergeError
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import FitSettings, TrainingResult, TrainSettings
from legomole.hosts import api, loading
from torch import Tensor, nn

from ..core.mole.mixtures import untouched
from ..core.test_imports import FORBID, HEAVY, HOSTS, LAZY, run
from .diffusers import tiny_pipelines as tiny
from .transformers import tiny_language as language

# deprecations inside the libraries
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")

KINDS = ("pipeline", "language model")


def built(kind: str) -> tuple[Any, nn.Module, list[Any]]:
    """A model of a kind, the network that mixtures are attached to, and two adapters for it."""
    if kind == "pipeline":
        pipe = tiny.build("SD 1.5")
        return pipe, pipe.unet, [tiny.lora(pipe, 1), tiny.lora(pipe, 2)]
    model = language.llama()
    return model, model, [language.lora(model, 1), language.lora(model, 2)]


def output(model: Any, kind: str) -> Tensor:
    if kind == "pipeline":
        options = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}
        return model("a heart", generator=torch.Generator().manual_seed(0), **options).images
    with torch.no_grad():
        return model(language.prompts(5)[0]).logits


def training(kind: str) -> dict[str, Any]:
    """Arguments of a short training."""
    if kind == "pipeline":
        settings = TrainSettings(steps=2, examples=8, samples=8, batch=4)
        return {"concepts": [["ember"], ["heart"]], "settings": settings, "size": (16, 16), "sampling_steps": 1}
    examples = [[(torch.tensor([1 + i, 20 + j]), torch.tensor([30 + i, 31])) for j in range(3)] for i in range(2)]
    return {"examples": examples, "settings": FitSettings(steps=2, batch=4)}


def untrained(adapters: list[Any], kind: str) -> Mixture:
    return Mixture(adapters, GateSet(2, GateSettings(reads="text" if kind == "pipeline" else "hidden")))


# ---- mixing


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_on_each_kind_of_model(kind: str) -> None:
    """Held at one expert it equals a mixture of that expert; detached, the model gives its own output."""
    model, network, adapters = built(kind)
    before = output(model, kind)
    renamed = api.experts(model, adapters)
    with api.mixed(model, Mixture(renamed)) as attachment, attachment.hold([0.0, 1.0]):
        held = output(model, kind)
    assert untouched(network)
    with api.mixed(model, Mixture(renamed[1:])):
        torch.testing.assert_close(output(model, kind), held, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(held, before, atol=1e-2)
    assert torch.equal(output(model, kind), before)


def test_checkpointing_reaches_the_host() -> None:
    for kind in KINDS:
        model, _, adapters = built(kind)
        with api.mixed(model, Mixture(adapters), checkpointing=True) as attachment:
            assert {type(forward).__name__ for forward in attachment._forwards} >= {"BlockForward", "LayerForward"}
        with api.mixed(model, Mixture(adapters)) as attachment:
            assert "Block" not in {type(forward).__name__ for forward in attachment._forwards}


def test_the_prompt_router() -> None:
    pipe, _, adapters = built("pipeline")
    with api.routed(pipe, Mixture(adapters), [["ember"], ["heart"]]):
        routed = output(pipe, "pipeline")
    with api.mixed(pipe, Mixture(adapters[1:])):
        torch.testing.assert_close(output(pipe, "pipeline"), routed, rtol=1e-4, atol=1e-4)
    model, _, adapters = built("language model")
    with pytest.raises(MergeError, match=r"pipelines only[\s\S]*LlamaForCausalLM"):
        api.routed(model, Mixture(adapters), [["ember"], ["heart"]])


# ---- training


@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_trained_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, network, adapters = built(kind)
    result = api.train_gates(model, untrained(adapters, kind), **training(kind))
    assert isinstance(result, TrainingResult)
    assert len(result.fit.losses) == 2
    assert result.gates.base == type(network).__name__
    assert untouched(network)
    result.gates.save(tmp_path / "gates.safetensors")
    gates = api.load_gates(model, tmp_path / "gates.safetensors", adapters[::-1])
    for name in gates.names:
        assert torch.equal(gates[name].bias, result.gates.gates[name].bias.flip(0))


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_the_training_are_checked(kind: str) -> None:
    model, _, adapters = built(kind)
    mixture, arguments = untrained(adapters, kind), training(kind)
    other = next(k for k in KINDS if k != kind)
    required = {"pipeline": "concepts", "language model": "examples"}
    foreign = required[other]
    with pytest.raises(MergeError, match=rf"for a {other}, and the model is a {kind}[\s\S]*found: +{foreign}"):
        api.train_gates(model, mixture, **arguments, **{foreign: training(other)[foreign]})
    with pytest.raises(MergeError, match=rf"for a {other}[\s\S]*found: +{type(training(other)['settings']).__name__}"):
        api.train_gates(model, mixture, **{**arguments, "settings": training(other)["settings"]})
    del arguments[required[kind]]
    with pytest.raises(MergeError, match=rf"on a {kind} needs[\s\S]*expected: +{required[kind]}"):
        api.train_gates(model, mixture, **arguments)


def test_strings_need_a_tokenizer() -> None:
    model, _, adapters = built("language model")
    mixture, examples = untrained(adapters, "language model"), [[("w1 w2", "w3")], [("w4", "w5 w6")]]
    with pytest.raises(MergeError, match="need a tokenizer"):
        api.train_gates(model, mixture, examples=examples)
    settings = FitSettings(steps=1, batch=2)
    result = api.train_gates(model, mixture, examples=examples, tokenizer=language.tokenizer(), settings=settings)
    assert len(result.fit.losses) == 1


# ---- kinds of models


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_pipelines_are_recognised(name: str) -> None:
    assert api.kind_of_model(tiny.build(name)) == "pipeline"


@pytest.mark.parametrize("name", language.MODELS)
def test_language_models_are_recognised(name: str) -> None:
    model = language.MODELS[name]()
    assert api.kind_of_model(model) == "language model"
    assert api.kind_of_model(torch.compile(model, backend="eager")) == "language model"


def test_other_classes_are_recognised_by_their_attributes() -> None:
    linear = nn.Linear(2, 2)
    for name in ("unet", "transformer"):
        assert api.kind_of_model(SimpleNamespace(components={name: linear}, **{name: linear})) == "pipeline"
    linear.config = {}
    assert api.kind_of_model(linear) == "language model"


def test_peft_models_are_recognised() -> None:
    import peft

    wrapped = peft.get_peft_model(language.llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert api.kind_of_model(wrapped) == "language model"
    with pytest.raises(MergeError, match="without PEFT's wrapper"):
        api.experts(wrapped, [language.lora(language.llama(), 1)])


@pytest.mark.parametrize("value", ["sd15", None, nn.Linear(2, 2), SimpleNamespace(components={}), []])
def test_other_objects_are_refused(value: Any) -> None:
    with pytest.raises(MergeError, match=r"cannot be mixed on this object[\s\S]*pipeline or a transformers model"):
        api.mixed(value, Mixture([tiny.lora(tiny.build("SD 1.5"), 1)]))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_component_of_a_pipeline_is_refused(compiled: bool) -> None:
    unet = tiny.build("SD 1.5").unet
    with pytest.raises(MergeError, match=r"UNet2DConditionModel[\s\S]*give the whole pipeline"):
        api.kind_of_model(torch.compile(unet, backend="eager") if compiled else unet)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, adapters = built("language model")

    def missing(*_: object) -> None:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(loading.importlib, "import_module", missing)
    with pytest.raises(MergeError, match=r"not installed[\s\S]*pip install 'legomole\[peft\]'"):
        api.experts(model, adapters)


def test_importing_the_entry_points_loads_nothing_heavy() -> None:
    run(
        FORBID.format(names={*HOSTS, *HEAVY, *LAZY, "ray"})
        + "from legomole.hosts import api\nfor name in ('experts', 'load_gates', 'mixed', 'routed', 'train_gates'):\n"
        "    assert callable(getattr(api, name))"
    )


def test_recognising_a_model_imports_no_host() -> None:
    run(
        FORBID.format(names=set(HOSTS))
        + "import torch\nfrom legomole.hosts import api\nmodel = torch.nn.Linear(2, 2)\nmodel.config = {}\n"
        "assert api.kind_of_model(model) == 'language model'"
    )


# ---- kinds of folders


def test_kinds_of_folders(tmp_path: Path) -> None:
    tiny.build("SD 1.5").save_pretrained(tmp_path / "pipeline")
    language.llama().save_pretrained(tmp_path / "model")
    assert api.kind_of_folder(tmp_path / "pipeline") == "pipeline"
    assert api.kind_of_folder(str(tmp_path / "model")) == "language model"
    with pytest.raises(FormatError, match=r"one component of a pipeline[\s\S]*the whole pipeline"):
        api.kind_of_folder(tmp_path / "pipeline" / "unet")


def test_kinds_of_names_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, file, commit in (("pipe", "model_index.json", "1" * 40), ("llama", "config.json", "2" * 40)):
        folder = tmp_path / f"models--me--{name}"
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / file).write_text("{}")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    assert api.kind_of_folder("me/pipe") == "pipeline"
    assert api.kind_of_folder("me/llama@main") == "language model"
    with pytest.raises(FormatError, match=r"no model of this name[\s\S]*hf download me/none"):
        api.kind_of_folder("me/none")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, r"neither[\s\S]*an empty folder"),
        ({"adapter_config.json": "{}"}, r"neither[\s\S]*model_index\.json[\s\S]*adapter_config\.json"),
        ({"config.json": "{"}, "config.json cannot be read"),
        ({"config.json": json.dumps({"_diffusers_version": "0.41"})}, "one component of a pipeline"),
    ],
    ids=["empty", "adapter", "damaged", "component"],
)
def test_other_folders_are_refused(files: dict[str, str], problem: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=problem):
        api.kind_of_folder(tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FormatError, match=r"neither[\s\S]*found: +a file"):
        api.kind_of_folder(tmp_path / "model.safetensors")
