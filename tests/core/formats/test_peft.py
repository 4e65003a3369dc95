"""PEFT's scale rules, computed by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import SaveError
from legomole.core.formats import FORMATS, from_state_dict, load, save, summarise, to_state_dict
from legomole.core.formats.peft import Peft
from legomole.core.lowrank import LowRank
from safetensors.torch import load_file

from ... import lora_files as files


def scales(shapes: files.Shapes, **config: object) -> dict[str, float]:
    state = files.state_dict(shapes, files.PEFT, alpha=None, prefix="base_model.model.")
    metadata = {"adapter_config": json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config})}
    return {name: part.scale for name, part in from_state_dict(state, metadata).modules.items()}


def test_alpha_over_r() -> None:
    assert set(scales(files.LLAMA).values()) == {2.0}


def test_rslora_divides_by_the_root() -> None:
    assert set(scales(files.LLAMA, use_rslora=True).values()) == {8 / math.sqrt(4)}


def test_a_pattern_matches_the_end_of_a_name_after_a_dot() -> None:
    q, gate, gate_11 = files.LLAMA
    assert scales(files.LLAMA, alpha_pattern={"q_proj": 2}) == {q: 0.5, gate: 2.0, gate_11: 2.0}
    assert scales(files.LLAMA, alpha_pattern={"gate_proj": 2}) == {q: 2.0, gate: 0.5, gate_11: 0.5}
    assert scales(files.LLAMA, alpha_pattern={r"layers\.1\.mlp\.gate_proj": 2}) == {q: 2.0, gate: 0.5, gate_11: 2.0}
    assert scales(files.LLAMA, alpha_pattern={"_proj": 2}) == dict.fromkeys(files.LLAMA, 2.0)  # no dot before it
    assert scales(files.LLAMA, alpha_pattern={"gate_proj": 4, r".*11.*": 2})[gate_11] == 1.0  # the first match counts


def test_a_single_file_has_scale_one() -> None:
    state = files.state_dict(files.LLAMA, files.PEFT, alpha=None, prefix="base_model.model.")
    found = from_state_dict(state)
    assert {part.scale for part in found.modules.values()} == {1.0}
    assert list(found.modules) == list(files.LLAMA)


def test_written_configuration() -> None:
    modules = {
        "a.x": LowRank(torch.ones(2, 3), torch.ones(3, 2)),
        "b.x": LowRank(torch.ones(2, 3), torch.ones(3, 2), alpha=1.0),
        "b.x.x": LowRank(torch.ones(3, 3), torch.ones(3, 3), alpha=0.5),
        "e.lora_embedding": LowRank(torch.ones(2, 9), torch.ones(3, 2)),
    }
    given = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "m", "use_rslora": True, "r": 99}
    peft = FORMATS["peft"]
    assert isinstance(peft, Peft)
    config = peft.config(Adapter(modules, metadata={"adapter_config": json.dumps(given)}))
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == {r"^b\.x\.x": 3}
    assert config["alpha_pattern"] == {r"^b\.x": 1, r"^b\.x\.x": 0.5}
    assert config["target_modules"] == ["a.x", "b.x", "b.x.x", "e"]
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "m")
    assert config["use_rslora"] is False


def test_extras_keep_the_key_of_the_file() -> None:
    state = files.state_dict({"x": (4, 3)}, files.PEFT, alpha=None, prefix="base_model.model.")
    state["base_model.model.lm_head.weight"] = torch.ones(2, 2)
    found = from_state_dict(state)
    assert found.extras.keys() == {"base_model.model.lm_head.weight"}
    assert to_state_dict(found, "peft").keys() == state.keys()


def test_patterns_apply_to_embeddings() -> None:
    state = {
        "base_model.model.embed.lora_embedding_A": torch.ones(2, 9),
        "base_model.model.embed.lora_embedding_B": torch.ones(3, 2),
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"embed": 2}, "alpha_pattern": {"embed": 1}}
    found = from_state_dict(state, {"adapter_config": json.dumps(config)})
    assert {name: part.scale for name, part in found.modules.items()} == {"embed.lora_embedding": 0.5}


def test_the_weight_file_of_a_folder_has_the_folders_scale(tmp_path: Path) -> None:
    part = LowRank(torch.ones(2, 3), torch.ones(3, 2), alpha=8.0)
    folder = save(Adapter({"a.x": part}), tmp_path / "x", format="peft")
    found = load(folder / "adapter_model.safetensors")
    assert found.modules["a.x"].scale == 4.0
    assert found.source.format == summarise(folder / "adapter_model.safetensors").format == "peft"


def test_a_single_file_stays_one_with_the_scale_folded_in(tmp_path: Path) -> None:
    state = files.state_dict({"double_blocks.0.x": (4, 3)}, files.PEFT, alpha=None, prefix="base_model.model.")
    lone = load(files.write(tmp_path / "in.safetensors", state))
    scaled = replace(lone, modules={name: replace(part, alpha=2.0) for name, part in lone.modules.items()})
    path = save(scaled, tmp_path / "out.safetensors")
    written = load_file(path)
    assert written.keys() == state.keys()
    name = "base_model.model.double_blocks.0.x.lora_"
    torch.testing.assert_close(
        written[f"{name}B.weight"] @ written[f"{name}A.weight"],
        0.5 * state[f"{name}B.weight"] @ state[f"{name}A.weight"],
    )


def test_biases_beside_embeddings_are_refused() -> None:
    part = LowRank(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(SaveError, match=r"none for embeddings[\s\S]*e\.lora_embedding"):
        to_state_dict(Adapter({"a.x": part, "e.lora_embedding": part}, {"a.x.bias": torch.ones(3)}), "peft")
