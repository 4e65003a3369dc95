"""`legomole train-gates` on a language model, in one process and in two of `accelerate launch`, as the page says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import legomole
from legomole.cli.gates_input import read_texts
from legomole.core.mole.trained import TrainedGates

from ..hosts.test_accelerate import free_port
from ..hosts.transformers.tiny_language import llama, lora, tokenizer
from ..test_docs import blocks
from .command import done, run, squeezed

# the libraries' own affairs
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

WORDS = [f"w{i}" for i in range(40)]
TRAIN = ("train-gates", "base", "one:0.5", "two", "--texts", "one.jsonl", "--texts", "two.jsonl", "--batch", "4")
FAST = ("--steps", "6", "--lr", "0.05", "--set", "warmup=0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a tokenizer of whole words, two adapters and examples for each."""
    monkeypatch.chdir(tmp_path)
    model = llama()
    model.save_pretrained("base")
    tokenizer().save_pretrained("base")
    for i, name in enumerate(("one", "two")):
        legomole.save(lora(model, i + 1), name, format="peft")
        g = torch.Generator().manual_seed(i)
        lines = []
        for length in (3, 4, 5):
            ids = torch.randint(1, 40, (length + 2,), generator=g).tolist()
            text = [" ".join(WORDS[j] for j in part) for part in (ids[:length], ids[length:])]
            lines.append(json.dumps({"prompt": text[0], "completion": text[1]}))
        Path(f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path("rest.jsonl").write_text('{"prompt": "w7 w8", "completion": "w9"}\n\n', encoding="utf-8")
    return tmp_path


def weights(path: str) -> dict[str, torch.Tensor]:
    gates = TrainedGates.load(path).gates
    return {f"{name}.{key}": value for name in gates.names for key, value in gates[name].state_dict().items()}


def test_the_gates_are_those_of_the_library_and_the_printed_lines_use_them() -> None:
    text = done(*TRAIN, *FAST, "--others", "rest.jsonl", "-o", "gates")
    trained = TrainedGates.load("gates.safetensors")
    assert "next-token on LlamaForCausalLM: 1 gate, 7 texts, 6 steps" in text
    assert "wrote gates.safetensors" in text
    assert trained.training["texts"] == [3, 3, 1]
    assert trained.training["strengths"] == [0.5, 1.0]
    from legomole.core.train import FitSettings
    from legomole.hosts.transformers.mixing import experts
    from legomole.hosts.transformers.training import load_model, train_gates

    model, tokenizer = load_model("base")
    examples = [
        [tuple(json.loads(line).values()) for line in Path(f"{name}.jsonl").read_text().splitlines() if line]
        for name in ("one", "two", "rest")
    ]
    loras = experts(model, [legomole.load(name) for name in ("one", "two")])
    gates = legomole.GateSettings(reads="hidden", activation="softmax-null", granularity="network")
    mixture = legomole.Mixture(loras, legomole.GateSet(2, gates), strengths=[0.5, 1])
    settings = FitSettings(steps=6, learning_rate=0.05, warmup=0, batch=4)
    direct = train_gates(model, mixture, examples[:2], tokenizer, settings, others=examples[2])
    direct.gates.save("direct.safetensors")
    for name, value in weights("direct.safetensors").items():
        assert torch.equal(weights("gates.safetensors")[name], value)
    found: dict[str, Any] = {}
    code = text.split("To use them:\n\n")[1]
    exec(code.replace("'..'", "'w3 w4'"), found)
    assert found["ids"].shape[1] > 2
    assert found["mixture"].strengths == (0.5, 1.0)


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_reach_what_one_reaches() -> None:
    """With the configuration that docs/llm_mole.md shows."""
    done(*TRAIN, *FAST, "-o", "alone")
    (config,) = blocks("llm_mole.md", "yaml")
    Path("ddp.yaml").write_text(config, encoding="utf-8")
    command = (
        *(sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--config_file", "ddp.yaml"),
        *("--main_process_port", str(free_port()), "-m", "legomole", *TRAIN, *FAST, "--json", "-o", "together"),
    )
    env = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    facts = json.loads(ran.stdout)  # of one of the two
    assert (facts["steps"], facts["texts"]) == (6, [3, 3, 0])
    alone, together = (weights(f"{name}.safetensors") for name in ("alone", "together"))
    assert alone.keys() == together.keys()
    assert max(float(value.abs().max()) for name, value in alone.items() if name.endswith("weight")) > 0.05
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-6)


def test_gates_per_token_learn_from_plain_texts() -> None:
    for name in ("one", "two"):
        Path(f"{name}.jsonl").write_text('{"text": "w1 w2 w3"}\n', encoding="utf-8")
    result = run(*TRAIN, *FAST, "-o", "gates")
    assert (result.exit_code, "does not say where it ends" in squeezed(result.output)) == (3, True)
    data = json.loads(done(*TRAIN, *FAST, "--reads", "token", "--granularity", "block", "--json", "-o", "gates"))
    assert (data["reads"], data["granularity"], data["texts"], len(data["loss"])) == ("token", "block", [1, 1, 0], 2)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("[1]", "[1]"),
        ("{", "{"),
        ('{"prompt": "w1"}', "prompt"),
        ('{"text": 3}', "text"),
        ("[" * 100_000, "[[["),
        ('{"text": ' * 100_000, "text"),
    ],
)
def test_a_line_that_is_no_example_is_named(line: str, found: str) -> None:
    Path("two.jsonl").write_text(f'{{"text": "w1 w2"}}\n{line}\n', encoding="utf-8")
    error = json.loads(run(*TRAIN, "--json", "-o", "gates").stdout)["error"]
    assert error["file"] == "two.jsonl, line 2"
    assert found in error["found"]


def test_examples_are_read_as_json_says() -> None:
    """Half a character is no text, and what Unicode takes for the end of a line may stand inside one."""
    lines = ['{"text": "a\\ud800"}', '{"text": "a\u2028b"}', "", '{"prompt": "c\x85", "completion": "d"}']
    Path("x.jsonl").write_bytes("\r\n".join(lines).encode())
    assert read_texts(Path("x.jsonl")) == ["a?", "a\u2028b", ("c\x85", "d")]


def test_what_cannot_be_trained_with_is_refused_first() -> None:
    result = run(*TRAIN[:6], "-o", "gates")
    assert (result.exit_code, "2 LoRAs and 1 times --texts" in squeezed(result.output)) == (2, True)
    result = run(*TRAIN, "--words", "x", "-o", "gates")
    assert (result.exit_code, "for which there is no --words" in squeezed(result.output)) == (2, True)
    assert "steps = 0" in squeezed(run(*TRAIN, "--steps", "0", "-o", "gates").output)
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{}", encoding="utf-8")
    for model, problem in (
        ("empty", "neither a diffusers pipeline nor a transformers model"),
        ("broken", "The language model cannot be loaded"),
        ("nothing", "no model of this name"),
    ):
        error = json.loads(run("train-gates", model, *TRAIN[2:], "--json", "-o", "gates").stdout)["error"]
        assert (problem in error["problem"], error["file"]) == (True, model)


def test_an_interrupted_training_goes_on_to_the_same_file(interrupt: Any) -> None:
    done(*TRAIN, *FAST, "-o", "whole")
    interrupt(3)
    result = run(*TRAIN, *FAST, "--state", "state", "-o", "gates")
    assert (result.exit_code, "A checkpoint is kept in state" in squeezed(result.output)) == (130, True)
    interrupt(-1)
    done(*TRAIN, *FAST, "--state", "state", "-o", "gates")
    assert Path("gates.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
