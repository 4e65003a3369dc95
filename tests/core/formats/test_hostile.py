"""Malicious files: the cases that fuzzing has found. Each small file requests unbounded time or memory."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import FormatError, MergeError
from legomole.core.formats import load, save, summarise
from legomole.core.formats.suffixes import role_of
from legomole.core.lowrank import LowRank
from legomole.core.merge.engine import merge
from legomole.core.merge.methods import METHODS
from legomole.core.merge.statistics import Statistics
from legomole.core.mole.trained import TrainedGates
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.run import run
from safetensors.torch import save_file
from torch import Tensor

from ... import lora_files as files

X = "lora_unet_x"
DEEP = "[" * 100_000 + "]" * 100_000
ODD_JSON = ["5", "[1]", '{"a": 1}', "null", '"x"', '{"unet.r": Infinity}', DEEP, '{"unet.r": ' + "9" * 400 + "}"]


def pair(A: tuple[int, ...], B: tuple[int, ...], **more: Tensor) -> dict[str, Tensor]:
    made = {f"{X}.lora_down.weight": torch.ones(A), f"{X}.lora_up.weight": torch.ones(B)}
    return made | {f"{X}.{name}": tensor for name, tensor in more.items()}


def folder(path: Path, config: Mapping[str, Any] | str, tensors: Mapping[str, Tensor] | None = None) -> Path:
    path.mkdir()
    prefix = "base_model.model.a.q"
    made = tensors or {f"{prefix}.lora_A.weight": torch.ones(2, 3), f"{prefix}.lora_B.weight": torch.ones(4, 2)}
    save_file(dict(made), path / "adapter_model.safetensors")
    text = config if isinstance(config, str) else json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config})
    (path / "adapter_config.json").write_text(text)
    return path


# ---- small files that expand to enormous tensors

BOMBS = {
    "Tucker core": (
        lambda: pair((1, 50_000, 1, 1), (1, 1, 1, 1), **{"lora_mid.weight": torch.ones(1, 1, 50_000)}),
        "larger than those of any model",
    ),
    "LoHa": (
        lambda: {f"{X}.hada_w{i}_{x}": torch.ones((9, 3000) if x == "a" else (3000, 9)) for i in (1, 2) for x in "ab"},
        "larger than those of any model",
    ),
    "LoKr": (lambda: {f"{X}.lokr_w{i}": torch.ones(30_000, 1) for i in (1, 2)}, "larger than those of any model"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_products_larger_than_any_model(case: str, tmp_path: Path) -> None:
    made, match = BOMBS[case]
    path = files.write(tmp_path / "x.safetensors", made())
    with pytest.raises(FormatError, match=rf"{match}[\s\S]*x\.safetensors[\s\S]*{X}|{match}") as error:
        load(path, convert_rank=4)
    assert X in str(error.value)
    assert summarise(path).modules == 1


def test_a_rank_above_the_width_of_a_small_layer_is_fine(tmp_path: Path) -> None:
    """Trainers use one rank for all layers, also for narrow ones."""
    path = files.write(tmp_path / "x.safetensors", pair((128, 36), (64, 128)))
    assert load(path).modules[X].rank == 128


def test_a_rank_far_above_the_width_is_reduced_to_the_width(tmp_path: Path) -> None:
    """The file may be malicious, with a few kB, or a concatenation of many LoRAs."""
    path = files.write(tmp_path / "x.safetensors", pair((20_000, 1), (1, 20_000), alpha=torch.tensor(5.0)))
    found = load(path).modules[X]
    assert found.rank == 1
    torch.testing.assert_close(found.delta(), torch.tensor([[5.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_concatenation_of_many_can_be_read_again(dtype: torch.dtype, tmp_path: Path) -> None:
    def lora(seed: int) -> Adapter:
        g = torch.Generator().manual_seed(seed)
        A, B = torch.randn(16, 3 * 3 * 4, generator=g), torch.randn(8, 16, generator=g)
        return Adapter({"unet.x": LowRank(A.to(dtype), B.to(dtype), 8.0, (3, 3))})

    loras = [lora(seed) for seed in range(40)]  # 640 units
    result = merge(loras, METHODS["concat"]()).adapter
    assert result.modules["unet.x"].rank == 640
    for format in ("diffusers", "comfy", "peft"):
        found = load(save(result, tmp_path / format, format=format)).modules["unet.x"]
        assert (found.rank, found.kernel, found.dtype) == (8, (3, 3), dtype)
        expected = sum(part.modules["unet.x"].delta().double() for part in loras)
        assert (found.delta() - expected).norm() < (2e-3 if dtype == torch.float16 else 1e-6) * expected.norm()


# ---- names and configurations


@pytest.mark.parametrize("pattern", ["(a|b|ab)*[cd]", ".*.*.*.*.*[bc]"])
@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_for_hours(
    pattern: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("legomole.core.formats.patterns._MAX_SECONDS", 0.5)
    prefix = f"base_model.model.{'a.' * 100_000}q"
    tensors = {f"{prefix}.lora_A.weight": torch.ones(2, 3), f"{prefix}.lora_B.weight": torch.ones(4, 2)}
    path = folder(tmp_path / "x", {table: {pattern: 2}}, tensors)
    with pytest.raises(FormatError, match=r"takes too long[\s\S]*file: .*x"):
        load(path)


def test_a_pattern_that_would_fill_the_memory(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"too large[\s\S]*adapter_config\.json"):
        load(folder(tmp_path / "x", {"rank_pattern": {"(a{1000}){1000}": 2}}))


@pytest.mark.parametrize(
    "config",
    [{"r": 0}, {"r": -1}, {"r": float("inf")}, {"lora_alpha": 10**400}, {"modules_to_save": 5},
     {"modules_to_save": [1]}, {"rank_pattern": [1]}, {"rank_pattern": {"a": []}},
     {"alpha_pattern": {"a": 10**400}}, {"peft_type": "LOKR", "r": 0}],
)  # fmt: skip
def test_invalid_configurations(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not valid"):
        load(folder(tmp_path / "x", config))


@pytest.mark.parametrize("text", [DEEP, '{"peft_type": ' + DEEP + "}"])
def test_a_configuration_too_deep_to_read(text: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "x", text)
    with pytest.raises(FormatError, match=r"is not JSON[\s\S]*64 levels"):
        load(path)
    assert summarise(path).modules == 1


def test_texts_larger_than_any_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("legomole.core.formats.peft_folder._MAX_TEXT", 100)
    with pytest.raises(FormatError, match=r"cannot be read[\s\S]*more than 100"):
        load(folder(tmp_path / "x", {"base_model_name_or_path": "x" * 100}))


@pytest.mark.parametrize("text", ODD_JSON)
@pytest.mark.parametrize("key", ["lora_adapter_metadata", "adapter_config", "ss_tag_frequency"])
def test_invalid_metadata(key: str, text: str, tmp_path: Path) -> None:
    """Metadata for display is dropped; metadata that holds the scale must be valid."""
    state = {"unet.a.q.lora_A.weight": torch.ones(2, 3), "unet.a.q.lora_B.weight": torch.ones(4, 2)}
    path = files.write(tmp_path / "x.safetensors", state, {key: text})
    recipe = Recipe(method="concat", inputs=[Input(path=path.name)])
    if key == "lora_adapter_metadata" and text != '{"a": 1}':  # a configuration without an entry for the unet
        with pytest.raises(FormatError, match="configuration"):
            load(path)
    else:
        assert save(run(recipe, folder=tmp_path).adapter, tmp_path / "y").is_file()
    assert summarise(path).modules == 1


def test_a_lone_surrogate_in_the_tags(tmp_path: Path) -> None:
    tags = '{"set": {"a \\ud800": 3}}'
    path = files.write(tmp_path / "x.safetensors", pair((2, 3), (4, 2)), {"ss_tag_frequency": tags})
    result = run(Recipe(method="concat", inputs=[Input(path=path.name)]), folder=tmp_path)
    assert summarise(save(result.adapter, tmp_path / "y")).metadata["ss_tag_frequency"] == '{"x/set": {"a ?": 3}}'


def test_long_names_are_classified_and_shortened_in_errors(tmp_path: Path) -> None:
    began = time.process_time()
    long = "a." * 500_000
    assert role_of(f"{long}lora_down.weight") == (long[:-1], "down")
    assert role_of(long) is None
    assert time.process_time() - began < 10
    path = files.write(tmp_path / "x.safetensors", {f"{long}lora_down.weight": torch.ones(2, 3)})
    with pytest.raises(FormatError, match=r"no partner[\s\S]*\(1000016 characters\)") as error:
        load(path)
    assert len(str(error.value)) < 5000


def test_many_extras(tmp_path: Path) -> None:
    """The time is proportional to their number; a quadratic search took hours for a hundred thousand."""
    state = {f"base_model.model.a.{i}.weight": torch.ones(1) for i in range(20_000)}
    state |= {
        "base_model.model.q.lora_A.weight": torch.ones(2, 3),
        "base_model.model.q.lora_B.weight": torch.ones(4, 2),
    }
    began = time.process_time()
    assert len(load(folder(tmp_path / "x", {}, state)).extras) == 20_000
    assert time.process_time() - began < 60


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("alpha", torch.ones((), dtype=torch.complex64)), ("diff_b", torch.ones(4, dtype=torch.complex64))],
)
def test_complex_numbers(name: str, tensor: Tensor, tmp_path: Path) -> None:
    try:
        path = files.write(tmp_path / "x.safetensors", pair((2, 3), (4, 2), **{name: tensor}))
    except KeyError:
        pytest.skip("this safetensors writes no complex numbers")
    with pytest.raises(FormatError, match=rf"{X}"):
        load(path)


# ---- gates and statistics


def statistics(path: Path, tensors: Mapping[str, Tensor] | None = None, **header: str) -> Path:
    said = {"kind": "legomole.statistics.1", "adapters": '["a"]', "measured": "{}", **header}
    return files.write(path, dict(tensors or {"x/own/0": torch.eye(3)}), said)


@pytest.mark.parametrize("key", ["adapters", "measured", "strengths", "same"])
@pytest.mark.parametrize("text", ["5", '[["x"], 1]', "{", DEEP, '{"a": "b"}', "[" + "9" * 400 + "]"])
def test_invalid_statistics(key: str, text: str, tmp_path: Path) -> None:
    path = statistics(tmp_path / "s.safetensors", **{key: text})
    texts = key in ("adapters", "measured") and text in ('{"a": "b"}', '[["x"], 1]', "[" + "9" * 400 + "]")
    if texts and (key == "adapters" or text == '{"a": "b"}'):  # read as text
        assert Statistics.load(path).modules
        return
    with pytest.raises(FormatError, match=r"could not be read[\s\S]*s\.safetensors"):
        Statistics.load(path)


@pytest.mark.parametrize(
    "tensor", [torch.ones(()), torch.ones(0), torch.ones(3, 3, dtype=torch.int8), torch.ones(2, 3)]
)
def test_statistics_that_are_not_matrices(tensor: Tensor, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="not second moments"):
        Statistics.load(statistics(tmp_path / "s.safetensors", {"x/own/0": tensor}))


def gates(path: Path, **tensors: Tensor) -> Path:
    header = {
        "kind": "legomole.gates.1", "scopes": '{"a": ""}', "settings": '{"reads": "hidden"}', "base": "",
        "training": "{}",
        "experts": json.dumps([{"label": x, "sha256": x * 64} for x in "ab"]),
    }  # fmt: skip
    made = {
        "weight": torch.ones(2, 5), "bias": torch.ones(2), "log_temperature": torch.ones(()), "mean": torch.ones(5),
        "spread": torch.ones(5), **tensors,
    }  # fmt: skip
    return files.write(path, {f"a/{name}": tensor for name, tensor in made.items()}, header)


def test_valid_gates(tmp_path: Path) -> None:
    assert TrainedGates.load(gates(tmp_path / "g.safetensors")).gates["a"].features == 5


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.ones(0, 1 << 40)},  # no data, but gates of this shape would take a terabyte
        {"weight": torch.ones(1, 5)},
        {"weight": torch.ones(2, 0)},
        {"spread": torch.zeros(5)},
        {"spread": -torch.ones(5)},
        {"owner": torch.tensor([0, 0, 1, 1, 2])},
        {"owner": torch.tensor([0, 0, 1, 1, -1])},
        {"owner": torch.ones(5)},
    ],
)
def test_invalid_gates(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"gates could not be read[\s\S]*g\.safetensors"):
        TrainedGates.load(gates(tmp_path / "g.safetensors", **tensors))
