"""Adapters of mixtures of experts, against PEFT with transformers 5, which stacks the experts of a layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from legomole import load, merge, save
from legomole.core.errors import FormatError, LegoMoleError
from legomole.core.formats.peft_experts import split_experts, stack_experts, stacked_parameters, wrapper_names
from legomole.core.lowrank import LowRank
from safetensors.torch import save_file
from torch import Tensor

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # within the libraries
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning",  # single experts, which transformers 5 lacks
    "ignore:Found missing adapter keys:UserWarning",  # of an input that has fewer layers than its targets
)

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, head_dim=8
    ),
    "mixtral": lambda: transformers.MixtralConfig(**{**SIZES, "intermediate_size": 12}, num_local_experts=4),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **{**SIZES, "intermediate_size": 12}, num_local_experts=4, head_dim=8, num_experts_per_tok=2
    ),
}
MIXER = {"qwen3_moe": "mlp", "mixtral": "block_sparse_moe"}
PROJECTIONS = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def base(kind: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())


def experts(folder: Path, kind: str, rank: int, seed: int, layers: tuple[int, ...] = (0, 1), alpha: int = 0) -> Path:
    """An adapter as PEFT with transformers 4 saves it: a LoRA per expert."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = PROJECTIONS[kind]
    shapes = {gate: (12, 16), up: (12, 16), down: (16, 12)}
    state: dict[str, Tensor] = {}
    for layer in layers:
        path = f"base_model.model.model.layers.{layer}"
        names = {f"{path}.self_attn.q_proj": (16, 16)}
        for e in range(4):
            names |= {f"{path}.{MIXER[kind]}.experts.{e}.{x}": shape for x, shape in shapes.items()}
        for name, (d_out, d_in) in names.items():
            state[f"{name}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) * 0.1
            state[f"{name}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * 0.1
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha or rank, "bias": "none"}
    config |= {"target_modules": ["q_proj", *shapes], "base_model_name_or_path": kind}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def stacked(folder: Path, kind: str, rank: int, seed: int, targets: tuple[str, ...], alpha: int = 0) -> Path:
    """An adapter of the experts' parameters, made and saved by PEFT."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha or rank, target_modules=["q_proj"], target_parameters=list(targets)
    )
    model = peft.get_peft_model(base(kind), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


def changes(kind: str, folder: Path) -> dict[str, Tensor]:
    """What PEFT adds to each weight of the model."""
    before = base(kind).state_dict()
    model = peft.PeftModel.from_pretrained(base(kind), folder)
    after = model.merge_and_unload().state_dict()
    return {name: after[name].double() - before[name].double() for name in before}


def assert_sum(kind: str, merged: Path, *inputs: Path) -> None:
    wanted = [changes(kind, folder) for folder in inputs]
    for name, change in changes(kind, merged).items():
        torch.testing.assert_close(change, sum(part[name] for part in wanted), rtol=0, atol=1e-5, msg=name)
    assert any(change.abs().max() > 0.01 for name, change in wanted[0].items() if "experts" in name)


GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_sum_of_single_experts_of_different_ranks_layers_and_scales(tmp_path: Path, kind: str) -> None:
    a = experts(tmp_path / "a", kind, 4, 1)
    b = experts(tmp_path / "b", kind, 2, 2, layers=(1,), alpha=6)
    merged = save(merge([a, b], "concat"), tmp_path / "merged")
    assert_sum(kind, merged, a, b)


@pytest.mark.parametrize(("method", "rank"), [("svd", "90%"), ("svd", "auto"), ("lego", "3")])
def test_any_rank_can_be_loaded_and_loses_only_what_the_merge_lost(tmp_path: Path, method: str, rank: str) -> None:
    a, b = experts(tmp_path / "a", "qwen3_moe", 4, 1), experts(tmp_path / "b", "qwen3_moe", 4, 2)
    result = merge([a, b], method, rank=rank)
    merged = changes("qwen3_moe", save(result, tmp_path / "merged"))
    parts = [f"model.layers.1.mlp.experts.3.{name}" for name in ("gate_proj", "up_proj")]
    wanted = torch.cat([result.adapter.modules[name].delta() for name in parts]).double()
    torch.testing.assert_close(merged["model.layers.1.mlp.experts.gate_up_proj"][3], wanted, rtol=0, atol=1e-5)


def test_experts_left_out_by_a_rule_are_zero(tmp_path: Path) -> None:
    a = experts(tmp_path / "a", "qwen3_moe", 2, 1)
    result = merge([a], "concat", module_weights={"*experts.1.*": 0, "*layers.0*up_proj": 0})
    found, before = changes("qwen3_moe", save(result, tmp_path / "merged")), changes("qwen3_moe", a)
    for name in ("gate_up_proj", "down_proj"):
        assert not found[f"model.layers.1.mlp.experts.{name}"][1].any()
        whole = f"model.layers.1.mlp.experts.{name}"
        torch.testing.assert_close(found[whole][2:], before[whole][2:], rtol=0, atol=1e-5)
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert not found[fused][:, 12:].any()
    torch.testing.assert_close(found[fused][2:, :12], before[fused][2:, :12], rtol=0, atol=1e-5)


def test_single_experts_are_saved_unchanged_where_their_ranks_are_equal(tmp_path: Path) -> None:
    a = experts(tmp_path / "a", "qwen3_moe", 2, 1)
    again = load(save(load(a), tmp_path / "again"))
    for name, part in load(a).modules.items():
        assert all(map(torch.equal, (again.modules[name].A, again.modules[name].B), (part.A, part.B)))


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("qwen3_moe", (GATE_UP, DOWN), (GATE_UP, DOWN)),
        ("qwen3_moe", (GATE_UP, DOWN), (DOWN,)),
        ("qwen3_moe", ("model.layers.1.mlp.experts.gate_up_proj",), ("experts.gate_up_proj", "experts.down_proj")),
        ("gpt_oss", (GATE_UP, "mlp.experts.gate_up_proj_bias", DOWN), (DOWN,)),
    ],
)
def test_sum_of_stacked_experts(tmp_path: Path, kind: str, first: tuple[str, ...], second: tuple[str, ...]) -> None:
    a, b = stacked(tmp_path / "a", kind, 2, 1, first), stacked(tmp_path / "b", kind, 3, 2, second, alpha=12)
    merged = save(merge([a, b], "concat"), tmp_path / "merged")
    assert_sum(kind, merged, a, b)
    for name in (a, b):  # read and written, without a merge
        assert_sum(kind, save(load(name), tmp_path / f"{name.name}-again"), name)


def test_sum_of_single_and_stacked_experts(tmp_path: Path) -> None:
    a = experts(tmp_path / "a", "qwen3_moe", 2, 1)
    b = stacked(tmp_path / "b", "qwen3_moe", 3, 2, (GATE_UP, DOWN), alpha=6)
    assert_sum("qwen3_moe", save(merge([a, b], "concat"), tmp_path / "merged"), a, b)
    assert_sum("qwen3_moe", save(merge([b, a], "concat"), tmp_path / "merged too"), a, b)


def test_a_stacked_expert_with_weight_0_keeps_its_place(tmp_path: Path) -> None:
    a = stacked(tmp_path / "a", "qwen3_moe", 2, 1, (GATE_UP, DOWN))
    found = changes("qwen3_moe", save(merge([a], "concat", module_weights={"*.3of4": 0}), tmp_path / "merged"))
    before = changes("qwen3_moe", a)
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        assert not found[name][3].any()
        torch.testing.assert_close(found[name][:3], before[name][:3], rtol=0, atol=1e-5)


def test_units_of_an_expert_by_hand() -> None:
    A = torch.tensor([[1.0], [2.0], [3.0], [4.0]])  # rank 2 of the first expert, then of the second
    B = torch.tensor([[10.0, 20.0, 30.0, 40.0]])  # first units of both experts, then second units
    parts = split_experts("x.w", A, B, 2)
    assert [(name, a.flatten().tolist(), b.flatten().tolist()) for name, (a, b) in parts.items()] == [
        ("x.w.0of2", [1, 2], [10, 30]),
        ("x.w.1of2", [3, 4], [20, 40]),
    ]
    others, stacks = stack_experts({name: LowRank(a, b, 6.0) for name, (a, b) in parts.items()})
    assert not others
    assert all(map(torch.equal, (stacks["x.w"].A, stacks["x.w"].B), (A, B)))
    assert (stacks["x.w"].rank, stacks["x.w"].alpha) == (2, 6.0)


def test_wrappers_nest_in_the_order_of_registration() -> None:
    names = wrapper_names(["m.experts.down_proj", "m.experts.gate_up_proj", "n.experts.gate_up_proj"])
    assert names == {
        "m.experts.down_proj": "m.experts",
        "m.experts.gate_up_proj": "m.experts.base_layer",
        "n.experts.gate_up_proj": "n.experts",
    }


def test_unclear_parameters_are_an_error() -> None:
    with pytest.raises(FormatError, match="unclear which factors belong to which parameter"):
        stacked_parameters(["m.experts"], ["experts.gate_up_proj", "experts.down_proj"])
    with pytest.raises(FormatError, match="unclear"):
        stacked_parameters(["m.experts", "m.experts.base_layer"], ["experts.up", "experts.down"])
    with pytest.raises(FormatError, match="unclear"):
        stacked_parameters(["m.experts.base_layer"], [])
    with pytest.raises(FormatError, match="unclear"):
        stacked_parameters(["m.q_proj"], ["experts.gate_up_proj"])
    with pytest.raises(LegoMoleError, match="order of the parameters"):
        wrapper_names(["m.experts.up", "m.experts.down"])
    with pytest.raises(FormatError, match="rank in the configuration"):
        split_experts("m", torch.zeros(3, 2), torch.zeros(2, 3), 2)
