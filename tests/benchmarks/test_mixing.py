"""The mixing benchmark: equal outputs of its models, operations of a mixed layer, statistics. Nothing is timed."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train.features import standardise_features
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft")
pytest.importorskip("diffusers")

# warnings inside the libraries: deprecations, and PEFT's about `proj_out`, which another layer's name ends in as well
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")

SMALL = ("--width", "64", "--tokens", "16", "--rank", "2", "--threads", str(torch.get_num_threads()))


@pytest.fixture(scope="module")
def mixing() -> ModuleType:
    """The script, as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "speed" / "mixing.py"
    spec = importlib.util.spec_from_file_location("mixing_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mixing_benchmark"] = module  # dataclasses look the module up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("case", "kinds"), [("dit", 9), ("unet", 9), ("llm", 8)])
def test_every_model_gives_the_output_of_the_merged_one(mixing: ModuleType, tmp_path: Path, case: str, kinds: int):
    """The script compares the outputs before it times the models, and stops if they differ."""
    mixing.main([*SMALL, "--cases", case, "--experts", "3", "--rounds", "1", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    names = {row["model"] for row in rows}
    assert len(names) == len(rows) == kinds
    assert {"merged", "even, untrained", "hidden gates, per layer", "experts gates, per block"} < names
    assert {name for name in names if "PEFT" in name} == {"PEFT, unmerged"} | (
        {"PEFT X-LoRA"} if case == "llm" else set()
    )


def test_compiled_models_give_the_output_of_the_compiled_merged_one(
    mixing: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled: list[Any] = []
    original = torch.compile

    def traced(model: Any) -> Any:  # without code generation, which takes minutes
        compiled.append(model)
        return original(model, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    out = tmp_path / "out.json"
    mixing.main([*SMALL, "--compile", "--cases", "llm", "--experts", "2", "--rounds", "1", "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["device"].endswith("compiled")
    assert len(compiled) == len(result["rows"]) == 7
    assert "PEFT X-LoRA" not in {row["model"] for row in result["rows"]}


def test_a_different_output_raises(mixing: ModuleType):
    base, merged = torch.zeros(4), torch.ones(4)
    mixing.check({"merged": lambda: merged, "same": lambda: merged + 1e-4}, base, torch.float32)
    with pytest.raises(SystemExit, match=r"other differs from the merged model by 0\.5 of"):
        mixing.check({"merged": lambda: merged, "other": lambda: merged / 2}, base, torch.float32)


def test_ratios_are_taken_within_a_round(mixing: ModuleType):
    """Ratios 2, 1.5 and 1 have the median 1.5 and the quartiles 1.25 and 1.75."""
    found = list(mixing.summary({"merged": [1.0, 2.0, 4.0], "ours": [2.0, 3.0, 4.0]}))
    assert found[1] == {"model": "ours", "seconds": 3.0, "ratio": 1.5, "low": 1.25, "high": 1.75}
    assert found[0]["ratio"] == 1.0


class Operations(TorchDispatchMode):
    """Counts operations by name, without those that only return a view."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if not func.is_view and name not in ("_unsafe_view", "promote_types"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reads", ["text", "hidden", "experts"])
def test_a_mixed_layer_runs_two_products_and_one_scaling_without_synchronising(mixing: ModuleType, reads: Any):
    """On the meta device reading a value raises, and copies to it are counted."""
    case = mixing.dit(64, 16)
    model = case.model.eval()
    adapters = mixing.loras(case, 3, 2)
    layers = len(adapters[0].modules)
    settings = GateSettings(reads=reads, granularity="block")
    with torch.no_grad():
        plain = copy.deepcopy(model).to("meta")
        attachment = attach(model, Mixture(tuple(adapters), mixing.untrained_gates(case, 3, settings)))
        gates = standardise_features(attachment, lambda: model(**case.inputs))
        model.to("meta")
        attachment.bank.to("meta")
        inputs = {name: x.to("meta") for name, x in case.inputs.items()}
        with Operations() as base:
            plain(**inputs)
        with Operations() as ours:
            model(**inputs)
    more = ours.counts - base.counts
    assert not [name for name in more if "copy" in name], more
    assert more["addmm_"] == layers == 44, more
    # beyond two products and a scaling per layer: operations shared by all gates, and those of each gate
    # (of the text: 12 for all gates at once, and 15 for the scores of its tokens and their maximum)
    shared, each = {"text": (12 + 15, 1), "hidden": (0, 12), "experts": (0, 20)}[reads]
    assert more.total() <= 3 * layers + shared + each * len(gates.names), more


def test_a_profile_lists_the_operations_of_a_mixed_step(mixing: ModuleType, capsys: pytest.CaptureFixture[str]):
    mixing.main([*SMALL, "--cases", "llm", "--experts", "2", "--rounds", "1", "--profile"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    spent = {line[0]: (float(line[1]), float(line[2])) for line in lines if len(line) == 3 and line[1][0].isdigit()}
    merged, mixed = spent["all"]
    assert merged > 0
    assert mixed > 0
    assert len(spent) == 11
    spent = mixing.profile(lambda: torch.ones(3) @ torch.ones(3))
    assert spent["dot"] > 0
    assert spent["mm"] == 0
