"""Bad input and wrong usage: a message of its own, exit code 3 or 2, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from legomole.core.formats import load
from safetensors.torch import save_file

from .command import NAMES, done, run, squeezed, write


def broken(name: str) -> list[str]:
    """Make a bad input; returns the arguments of a merge with it."""
    bad = Path("bad.safetensors")
    whole = Path("a.safetensors").read_bytes()
    part = load("a.safetensors").modules[NAMES[0]]
    down, up = part.A.clone(), part.B.clone()
    key = NAMES[0]
    match name:
        case "truncated":
            bad.write_bytes(whole[: len(whole) // 2])
        case "cut in the header":
            bad.write_bytes(whole[:100])
        case "no safetensors":
            bad.write_bytes(b"GIF89a, certainly not a LoRA, but long enough to look at")
        case "empty":
            bad.write_bytes(b"")
        case "pickle":
            bad = Path("bad.pt")
            torch.save({"x": torch.ones(1)}, bad)
        case "NaN" | "Inf":
            down[0, 0] = float(name)
            save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, bad)
        case "A and B do not fit":
            save_file({f"{key}.lora_down.weight": down[:2].clone(), f"{key}.lora_up.weight": up}, bad)
        case "another base model":
            write(bad, d_in=9)
        case "unknown keys":
            save_file({"first_stage_model.encoder.weight": up}, bad)
        case "lokr":
            save_file({f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.ones(2, 2)}, bad)
        case "missing":
            pass
        case _:
            raise AssertionError(name)
    return ["merge", "a.safetensors", str(bad), "--rank", "2", "-o", "out.safetensors"]


BAD = {
    "truncated": "cut off",
    "cut in the header": "cut off",
    "no safetensors": "not a safetensors file",
    "empty": "The file is empty",
    "pickle": "a pickle, which can run any program",
    "NaN": "NaN or infinite numbers",
    "Inf": "NaN or infinite numbers",
    "A and B do not fit": "do not fit together",
    "another base model": "for different base models",
    "unknown keys": "holds no LoRA",
    "lokr": "--convert-rank 32",
    "missing": "no such file",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_its_own_error_and_leaves_nothing(folder, name):
    arguments = broken(name)
    before = {p.name for p in folder.iterdir()}
    result = run(*arguments)
    assert result.exit_code == 3, result.output
    assert BAD[name] in squeezed(result.stderr)
    assert "bad." in result.stderr
    assert "Traceback" not in result.output
    assert {p.name for p in folder.iterdir()} == before
    again = run(*arguments, "--json")
    assert again.exit_code == 3
    error = json.loads(again.stdout)["error"]
    assert BAD[name] in " ".join(error.values())
    assert again.stderr == ""


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480])
def test_a_header_whose_length_reads_like_a_pickle_is_none(length):
    """640 is 80 02 in bytes, which is also how a pickle of protocol 2 begins."""
    part = load("a.safetensors").modules[NAMES[0]]
    state = {"x.lora_down.weight": part.A.clone(), "x.lora_up.weight": part.B.clone()}
    for pad in range(length):
        save_file(state, "odd.safetensors", {"note": "-" * pad})
        if int.from_bytes(Path("odd.safetensors").read_bytes()[:8], "little") == length:
            break
    assert Path("odd.safetensors").read_bytes()[0] == 0x80
    done("merge", "odd.safetensors", "-o", "out.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.safetensors", "--rank", "0"], "not a rank"),
        (["a.safetensors", "--rank", "-2"], "not a rank"),
        (["a.safetensors", "b.safetensors", "--rank", "7"], "larger than all the LoRAs' ranks together"),
        (["a.safetensors:nan"], "not a finite number"),
        (["a.safetensors:inf"], "not a finite number"),
        (["a.safetensors:0"], "every weight is 0"),
        (["a.safetensors", "--module-weight", "*nowhere*=2"], "matches nothing"),
        (["a.safetensors", "--method", "svd", "--geometry", "paper"], "no such setting"),
        (["a.safetensors", "--set", "colour=red"], "no such setting"),
        (["a.safetensors", "--set", "starts=many"], "cannot have this value"),
        (["a.safetensors", "--method", "ties", "--density", "2"], "density is out of range"),
        (["a.safetensors", "--method", "calibrated"], "needs a setting"),
        (["a.safetensors:1e30", "--dtype", "float16"], "overflow"),
        (["a.safetensors", "--device", "abacus"], "device cannot be used"),
        (["--config", "a.safetensors"], "not made by a legomole merge"),
        (["--config", "none.yaml"], "cannot be read"),
    ],
)
def test_bad_settings_are_refused(folder, arguments, message):
    before = {p.name for p in folder.iterdir()}
    result = run("merge", *arguments, "-o", "out.safetensors")
    assert result.exit_code == 3, result.output
    assert message in squeezed(result.stderr)
    assert {p.name for p in folder.iterdir()} == before


def test_no_common_module_is_an_error():
    write(Path("other.safetensors"), names=["lora_unet_somewhere_else"])
    result = run("merge", "a.safetensors", "other.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 3, result.output
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "a.safetensors"], "--output"),
        (["merge", "-o", "out.safetensors"], "Give at least one LoRA"),
        (["merge", "a.safetensors:loud", "-o", "out.safetensors"], "not a number"),
        (["merge", "a.safetensors", "--module-weight", "x", "-o", "out.safetensors"], "PATTERN=FACTOR"),
        (["merge", "a.safetensors", "--module-weight", "2:*=1", "-o", "out.safetensors"], "LoRA that does not exist"),
        (["merge", "a.safetensors", "--set", "x", "-o", "out.safetensors"], "NAME=VALUE"),
        (["merge", "a.safetensors", "--set", "rank=8", "-o", "out.safetensors"], "use the option --rank 8"),
        (["merge", "a.safetensors", "--set", "output-reweight=1", "-o", "out.safetensors"], "--output-reweight"),
        (["merge", "a.safetensors", *2 * ["--set", "starts=1"], "-o", "out.safetensors"], "starts twice"),
        (["merge", "a.safetensors", "--method", "magic", "-o", "out.safetensors"], "magic"),
        (["merge", "a.safetensors", "--convert-rank", "0", "-o", "out.safetensors"], "convert-rank"),
        (["juggle"], "juggle"),
        (["inspect"], "LORA"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in squeezed(result.stderr)
    again = run(*arguments, "--json")
    assert again.exit_code == 2
    if arguments != ["juggle"]:
        assert message in json.loads(again.stdout)["error"]["problem"]
