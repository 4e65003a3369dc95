"""The command line as a user meets it: what is printed, the exit code, and what lies on the disk afterwards."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import legomole
import pytest
import torch
import typer
from legomole.cli import app, console
from legomole.cli.arguments import parse_input, parse_module_weight, parse_setting
from legomole.cli.options import DtypeName, FormatName, MethodName
from legomole.core.adapter import Adapter
from legomole.core.formats import FORMATS, load, save
from legomole.core.lowrank import LowRank
from legomole.core.merge.methods import METHODS
from legomole.core.recipes.recipe import from_text
from PIL import Image
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

NAMES = [f"lora_unet_down_blocks_0_{kind}_to_{x}" for kind in ("attn1", "attn2") for x in "qk"]


def write(path: Path, rank: int = 2, seed: int = 0, *, names=NAMES, d_in: int = 6, **metadata: str) -> Path:
    g = torch.Generator().manual_seed(seed)
    modules = {n: LowRank(torch.randn(rank, d_in, generator=g), torch.randn(5, rank, generator=g)) for n in names}
    return save(Adapter(modules, metadata=metadata), path, format="kohya")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with two LoRAs: a of rank 4, b of rank 2."""
    monkeypatch.chdir(tmp_path)
    write(Path("a.safetensors"), 4, 1, ss_base_model_version="sd_v1")
    write(Path("b.safetensors"), 2, 2)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def squeezed(text: str) -> str:
    """Text of a panel without its frame and line breaks."""
    return " ".join(text.replace("│", " ").split())


def process(*arguments: str, **kw) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONSAFEPATH": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "legomole", *arguments], capture_output=True, text=True, env=env, check=False, **kw
    )


# ---- merge


def test_merge_writes_the_weighted_sum(folder):
    text = done("merge", "a.safetensors:0.5", "b.safetensors:-2", "--method", "concat", "-o", "out.safetensors")
    assert "concat: 2 LoRAs, 4 modules, merged rank 6, 100.0% of the sum's energy kept" in text
    assert "wrote out.safetensors" in text
    a, b, out = (load(f"{name}.safetensors") for name in ("a", "b", "out"))
    assert out.source.format == "kohya"
    for name in NAMES:
        torch.testing.assert_close(
            out.modules[name].delta(), 0.5 * a.modules[name].delta() - 2 * b.modules[name].delta()
        )


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"calibrated"}))
def test_every_method_runs(method):
    done("merge", "a.safetensors", "b.safetensors", "--method", method, "-o", "out.safetensors")
    assert load("out.safetensors").modules.keys() == set(NAMES)


def test_the_default_is_lego_at_the_mean_rank():
    """Ranks 4 and 2: the mean is 3."""
    text = done("merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors")
    assert text.startswith("lego: 2 LoRAs, 4 modules, merged rank 3")


def test_every_option_reaches_the_recipe():
    options = (
        "--rank 2 --geometry paper --no-parameter-reweight --output-reweight --norm l2 --seed 5 --set centroid=sum "
        "--normalize --dtype bfloat16 --convert-rank 4 --module-weight 1:*attn1*=0.5 --module-weight *attn2*=2"
    )
    done("merge", "a.safetensors:0.8:0.4", "b.safetensors", *options.split(), "-o", "out.safetensors")
    recipe = from_text(done("inspect", "--recipe", "out.safetensors"), "yaml")
    assert recipe.settings == {
        "rank": 2,
        "geometry": "paper",
        "centroid": "sum",
        "parameter_reweight": False,
        "output_reweight": True,
        "norm": "l2",
        "starts": 0,
        "seed": 5,
    }
    assert (recipe.normalize, recipe.dtype, recipe.convert_rank) == (True, "bfloat16", 4)
    assert (recipe.inputs[0].weight, recipe.inputs[0].text_encoder_weight) == (0.8, 0.4)
    assert recipe.inputs[0].module_weights == {"*attn1*": 0.5}
    assert recipe.module_weights == {"*attn2*": 2.0}
    assert load("out.safetensors").dtype == torch.bfloat16


def test_a_merged_file_is_repeated_byte_for_byte():
    done("merge", "a.safetensors:0.7", "b.safetensors", "--rank", "95%", "-o", "first.safetensors")
    done("merge", "--config", "first.safetensors", "-o", "again.safetensors")
    assert Path("first.safetensors").read_bytes() == Path("again.safetensors").read_bytes()


def test_what_is_typed_overrides_the_config():
    Path("recipe.toml").write_text(
        'method = "lego"\nsettings = { rank = 2, seed = 1 }\n[[inputs]]\npath = "a.safetensors"\n[[inputs]]\n'
        'path = "b.safetensors"\nweight = 0.5\n'
    )
    done("merge", "--config", "recipe.toml", "--seed", "9", "-o", "one.safetensors")
    recipe = from_text(done("inspect", "--recipe", "one.safetensors"), "yaml")
    assert (recipe.settings["rank"], recipe.settings["seed"]) == (2, 9)
    assert [entry.weight for entry in recipe.inputs] == [1.0, 0.5]
    done("merge", "--config", "recipe.toml", "b.safetensors:3", "--method", "concat", "-o", "two.safetensors")
    recipe = from_text(done("inspect", "--recipe", "two.safetensors"), "yaml")
    assert (recipe.method, recipe.settings) == ("concat", {})
    assert [(entry.path, entry.weight) for entry in recipe.inputs] == [("b.safetensors", 3.0)]


def test_a_config_may_lie_elsewhere(folder):
    (folder / "sub").mkdir()
    write(folder / "sub" / "c.safetensors")
    (folder / "sub" / "r.yaml").write_text("method: concat\ninputs: [{path: c.safetensors}]\n")
    done("merge", "--config", "sub/r.yaml", "-o", "out.safetensors")
    assert Path("out.safetensors").is_file()


def test_peft_folders_stay_folders():
    save(Adapter({"model.layers.0.q_proj": LowRank(torch.ones(2, 6), torch.ones(5, 2))}), "p", format="peft")
    done("merge", "p", "-o", "merged")
    assert (Path("merged") / "adapter_config.json").is_file()
    assert (Path("merged") / "adapter_model.safetensors").is_file()


def test_compress_keeps_what_it_says():
    """Rank 4 to 2 by SVD: what is kept is the energy of the two largest singular values of each module."""
    text = done("compress", "a.safetensors", "--rank", "2", "-o", "small.safetensors")
    squares = [torch.linalg.svdvals(part.delta()).square() for part in load("a.safetensors").modules.values()]
    kept = sum(float(s[:2].sum()) for s in squares) / sum(float(s.sum()) for s in squares)
    assert f"merged rank 2, {kept:.1%} of the sum's energy kept" in text
    assert {part.rank for part in load("small.safetensors").modules.values()} == {2}


# ---- inspect, convert, demo


def test_inspect_tells_what_is_inside():
    text = squeezed(done("inspect", "a.safetensors"))
    assert "format kohya" in text
    assert "base model sd_v1" in text
    assert "modules 4" in text
    assert "ranks 4" in text


def test_inspect_modules_prints_names_alone():
    assert done("inspect", "--modules", "a.safetensors").split() == sorted(NAMES)


def test_inspect_shows_metadata_on_one_line():
    write(Path("c.safetensors"), note='{\n  "a": 1\n}')
    assert '· note { "a": 1 }' in squeezed(done("inspect", "c.safetensors"))


def test_a_closed_pipe_is_no_bug():
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    for option in ("--modules", "--json"):
        command = [sys.executable, "-m", "legomole", "inspect", option, "a.safetensors"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as started:
            assert started.stdout is not None
            assert started.stderr is not None
            started.stdout.close()  # long before anything is written
            assert started.stderr.read() == b""
        assert started.returncode == 141


def test_inspect_works_on_files_that_cannot_be_merged():
    save_file({"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(2, 2)}, "lokr.safetensors")
    assert "lokr_w1" in done("inspect", "lokr.safetensors")


def test_inspect_of_a_merged_file_tells_how():
    done("merge", "a.safetensors:0.5", "b.safetensors", "-o", "out.safetensors")
    text = squeezed(done("inspect", "out.safetensors"))
    assert "merged from a.safetensors:0.5, b.safetensors:1" in text
    assert f"merged by legomole {legomole.__version__}, lego" in text


@pytest.mark.parametrize("name", ["report.png", "report.html"])
def test_inspect_plots_a_report(name):
    text = done("inspect", "a.safetensors", "b.safetensors", "--plot", name)
    assert "LEGO at rank 3 keeps" in text
    assert f"wrote {name}" in text
    first = Path(name).read_bytes()
    assert first.startswith(b"\x89PNG\r\n\x1a\n" if name.endswith("png") else b"<!doctype html>")
    assert sorted(path.name for path in Path().iterdir()) == ["a.safetensors", "b.safetensors", name]
    text = done("inspect", "a.safetensors", "b.safetensors", "--plot", name, "--overwrite", "--rank", "2")
    assert "LEGO at rank 2 keeps" in text
    assert Path(name).read_bytes() != first
    data = json.loads(done("inspect", "a.safetensors", "--plot", name, "--overwrite", "--json"))
    assert data["plot"] == name
    assert data["summary"] == ["Rank 3 keeps 97% of its energy; all of it needs rank 4."]


def test_inspect_does_not_plot_over_files():
    Path("report.html").write_text("precious")
    for arguments, code in (
        (["--plot", "report.html"], 4),
        (["--plot", "gone/report.html"], 4),
        (["--plot", "a.safetensors", "--overwrite"], 2),
        (["--plot", "x.png", "--recipe"], 2),
        (["--rank", "4"], 2),
        (["--plot", "x.png", "--rank", "no"], 3),
    ):
        assert run("inspect", "a.safetensors", *arguments).exit_code == code
    assert Path("report.html").read_text() == "precious"
    assert not Path("x.png").exists()


def test_inspect_says_what_it_draws_with(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = run("inspect", "a.safetensors", "--plot", "x.png")
    assert result.exit_code == 3
    assert "legomole[plots]" in squeezed(result.output)


def test_inspect_of_several_files_shows_their_overlap():
    """A LoRA overlaps fully with itself."""
    write(Path("twin.safetensors"), 4, 1)
    data = json.loads(done("inspect", "--json", "a.safetensors", "twin.safetensors"))
    assert data["overlap"]["pairs"][0]["shared_modules"] == 4
    assert data["overlap"]["pairs"][0]["cosine"] == pytest.approx(1.0)
    assert "+1.000" in done("inspect", "a.safetensors", "twin.safetensors")


def test_convert_changes_the_format_and_the_numbers():
    done("convert", "a.safetensors", "--to", "comfy", "--dtype", "float16", "-o", "out.safetensors")
    a, out = load("a.safetensors"), load("out.safetensors")
    assert out.dtype == torch.float16
    for name in NAMES:
        torch.testing.assert_close(out.modules[name].delta(), a.modules[name].delta(), atol=2e-2, rtol=2e-2)
    assert out.metadata["ss_base_model_version"] == "sd_v1"


def test_dialects_are_translated():
    """kohya's names to diffusers' and back; the deltas stay what they were, but for float rounding of the scale."""
    pytest.importorskip("diffusers")
    generator = torch.Generator().manual_seed(0)

    def layers(prefix: str, rank: int, *, dots: bool, alpha: float | None) -> Adapter:
        block = "down_blocks.0.attentions.0.transformer_blocks.0"
        names = [
            f"{block}.{layer}" for layer in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.0.proj", "ff.net.2")
        ]
        draw = [torch.randn(shape, generator=generator).half() for _ in names for shape in ((rank, 16), (16, rank))]
        return Adapter(
            {
                f"{prefix}{name if dots else name.replace('.', '_')}": LowRank(A, B, alpha)
                for name, A, B in zip(names, draw[::2], draw[1::2], strict=True)
            }
        )

    Path("d").mkdir()
    save(layers("lora_unet_", 8, dots=False, alpha=4.0), "d/style", format="kohya")
    save(layers("unet.", 4, dots=True, alpha=None), "d/subject", format="diffusers")
    done("convert", "d/style.safetensors", "--to", "diffusers", "-o", "there.safetensors")
    done("convert", "there.safetensors", "--to", "kohya", "-o", "back.safetensors")
    style, back = load("d/style.safetensors"), load("back.safetensors")
    assert set(load("there.safetensors").modules) == set(load("d/subject.safetensors").modules)
    assert set(back.modules) == set(style.modules)
    for name, part in style.modules.items():
        torch.testing.assert_close(back.modules[name].delta(), part.delta(), atol=1e-4, rtol=1e-2)
    # the first LoRA's format, without asking: what every program reads
    done("merge", "d/style.safetensors", "d/subject.safetensors", "-o", "both.safetensors")
    both = load("both.safetensors")
    assert both.source.format == "kohya"
    assert set(both.modules) == set(style.modules)
    assert (both.metadata["ss_network_dim"], both.metadata["ss_network_alpha"]) == ("6", "6")


def test_demo_paints_every_way_and_says_what_one_sees(monkeypatch):
    """Few pictures; what they show is for the benchmark. The files are there, and the merge is a LoRA."""
    pytest.importorskip("diffusers")
    from legomole.nano import demo

    monkeypatch.setattr(demo, "ROWS", {kind: pairs[:1] for kind, pairs in demo.ROWS.items()})
    monkeypatch.setattr(demo, "_EACH", 1)
    text = squeezed(done("demo", "there"))
    assert "What you see" in text
    assert {part.rank for part in load("there/lego.safetensors").modules.values()} == {4}
    with Image.open("there/demo.png") as picture:
        assert picture.width > 6 * 128
        assert len(picture.getcolors(1 << 20)) > 1000
    scores = json.loads(done("demo", "there", "--json"))["scores"]
    assert list(scores) == ["no LoRA", "heart LoRA", "ember LoRA", "sum", "LEGO", "MoLE"]
    assert all(set(row) == {"both", "subject", "style", "neither"} for row in scores.values())


def test_demo_refuses_a_file_in_the_place_of_its_folder_and_what_is_no_comfyui():
    pytest.importorskip("diffusers")
    Path("there").write_text("mine")
    assert "The demo's folder is a file" in squeezed(run("demo", "there").stderr)
    assert "not ComfyUI's folder" in squeezed(run("demo", "--comfyui", "there").stderr)
    assert Path("there").read_text() == "mine"


@pytest.mark.parametrize("layer", ["transformer_blocks.0.attn1.to_q", "double_blocks.0.processor.qkv_lora1"])
def test_names_that_all_inputs_share_are_kept(layer):
    """Bare names (LTX, XLabs) are no format's own, but their readers want them back as they were."""
    down, up = (".down.weight", ".up.weight") if "processor" in layer else (".lora_A.weight", ".lora_B.weight")
    for name in ("x", "y"):
        save_file({layer + down: torch.ones(2, 3), layer + up: torch.ones(6, 2)}, f"{name}.safetensors")
    done("merge", "x.safetensors", "y.safetensors", "--method", "concat", "-o", "xy.safetensors")
    assert load_file("xy.safetensors").keys() == {layer + down, layer + up}


# ---- outputs are never replaced by accident


def test_an_existing_output_is_kept_unless_told_otherwise():
    Path("out.safetensors").write_bytes(b"precious")
    result = run("merge", "a.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 4
    assert "exists already" in result.output
    assert Path("out.safetensors").read_bytes() == b"precious"
    done("merge", "a.safetensors", "-o", "out.safetensors", "--overwrite")
    assert load("out.safetensors").modules


@pytest.mark.parametrize("output", ["a.safetensors", "a", "./b.safetensors"])
def test_an_input_is_never_the_output(output):
    before = Path("a.safetensors").read_bytes()
    result = run("merge", "a.safetensors", "b.safetensors", "-o", output, "--overwrite")
    assert result.exit_code == 4
    assert "one of the inputs" in result.output
    assert Path("a.safetensors").read_bytes() == before


def test_a_missing_suffix_is_added():
    done("merge", "a.safetensors", "-o", "v1.5")
    assert Path("v1.5.safetensors").is_file()


# ---- bad input: its own message, exit code 3, nothing left behind


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
        (["a.safetensors", "--set", "seed=many"], "cannot have this value"),
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
        (["merge", "a.safetensors", "--module-weight", "2:*=1", "-o", "out.safetensors"], "no LoRA number 2"),
        (["merge", "a.safetensors", "--set", "x", "-o", "out.safetensors"], "NAME=VALUE"),
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


# ---- outputs that cannot be written: exit code 4, nothing left behind


def test_a_missing_output_folder_is_said_before_the_work():
    result = run("merge", "a.safetensors", "-o", "nowhere/out.safetensors")
    assert result.exit_code == 4
    assert "output folder does not exist" in squeezed(result.stderr)
    assert not Path("nowhere").exists()


def test_a_folder_is_no_file(folder):
    (folder / "there").mkdir()
    result = run("merge", "a.safetensors", "-o", "there/")
    assert result.exit_code == 4
    assert "The output is a folder" in squeezed(result.stderr)
    assert not Path("there.safetensors").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder not even root can write to")
def test_a_folder_that_cannot_be_written():
    result = run("merge", "a.safetensors", "-o", "/proc/out.safetensors")
    assert result.exit_code == 4, result.output
    assert "/proc/out.safetensors" in squeezed(result.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_full_disk_leaves_nothing_behind(folder, extra):
    """A limit on the size of files stops the writing half way, as a full disk does."""
    write(folder / "big.safetensors", 4, d_in=4000)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    before = {p.name for p in folder.iterdir()}
    done = process("merge", "big.safetensors", "-o", "out.safetensors", *extra, preexec_fn=limit)
    assert done.returncode == 4, done.stderr
    assert "out.safetensors" in (done.stdout if extra else done.stderr)
    assert "Traceback" not in done.stderr
    assert {p.name for p in folder.iterdir()} == before


# ---- the process itself


def test_cancelling_exits_with_130(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("legomole.core.formats.load", interrupt)
    monkeypatch.setattr("legomole.core.recipes.run.load", interrupt)
    result = run("merge", "a.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 130
    assert "Nothing was written" in result.stderr
    assert not Path("out.safetensors").exists()


def test_a_bug_is_called_one_and_exits_with_1(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("legomole.core.recipes.run.merge", fail)
    result = run("merge", "a.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 1
    assert "ZeroDivisionError: oops" in result.stderr
    assert "bug in legomole" in squeezed(result.stderr)
    assert json.loads(run("merge", "a.safetensors", "-o", "out.safetensors", "--json").stdout)["exit_code"] == 1


def test_json_is_all_there_is_on_standard_output(folder):
    finished = process("merge", "a.safetensors", "b.safetensors", "--json", "-o", "out.safetensors")
    assert finished.returncode == 0, finished.stderr
    data = json.loads(finished.stdout)
    assert data["output"] == "out.safetensors"
    assert {module["name"] for module in data["report"]["modules"]} == set(NAMES)
    assert finished.stderr == ""


def test_version_and_module_entry():
    assert process("--version").stdout == f"legomole {legomole.__version__}\n"


@pytest.mark.parametrize("command", [[], ["merge"], ["inspect"], ["convert"], ["compress"], ["demo"]])
def test_help_loads_no_torch(command):
    code = (
        "import sys\nfrom legomole.cli import app\n"
        f"try: app({[*command, '--help']!r}, prog_name='legomole')\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "Usage: legomole" in shown.stdout
    if command:
        assert "--json" in shown.stdout


def test_help_shows_examples_and_exit_codes():
    assert "legomole merge --config" in squeezed(done("merge", "--help"))
    assert "Exit codes: 0 done" in squeezed(done("--help"))


# ---- arguments


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("a.st", {"path": "a.st"}),
        ("a.st:0.8", {"path": "a.st", "weight": 0.8}),
        ("a.st:-1:.5", {"path": "a.st", "weight": -1.0, "text_encoder_weight": 0.5}),
        ("C:\\loras\\a.st", {"path": "C:\\loras\\a.st"}),
        ("C:\\loras\\a.st:0.8", {"path": "C:\\loras\\a.st", "weight": 0.8}),
        ("C:/loras/a.st:0.8:1", {"path": "C:/loras/a.st", "weight": 0.8, "text_encoder_weight": 1.0}),
        ("D:a.st", {"path": "D:a.st"}),
        ("dir:1/a.st", {"path": "dir:1/a.st"}),
    ],
)
def test_weights_after_colons(text, entry):
    assert parse_input(text) == entry


def test_a_file_whose_name_ends_like_a_weight_is_that_file():
    Path("v:2").write_bytes(b"")
    assert parse_input("v:2") == {"path": "v:2"}
    assert parse_input("v:2:3") == {"path": "v:2", "weight": 3.0}


def test_patterns_and_settings():
    assert parse_module_weight("*attn2*=0.5") == (None, "*attn2*", 0.5)
    assert parse_module_weight("12:a=b=2") == (12, "a=b", 2.0)
    assert parse_setting("joint-scale = 1.2") == ("joint_scale", "1.2")
    for parse, text in ((parse_input, "ab:c"), (parse_module_weight, "*=x"), (parse_setting, "=1")):
        with pytest.raises(typer.BadParameter):
            parse(text)


def test_the_choices_are_those_of_the_tables():
    """The command line names them itself so that --help needs no torch."""
    assert list(get_args(MethodName)) == list(METHODS)
    assert set(get_args(FormatName)) == set(FORMATS)
    assert all(getattr(torch, name).is_floating_point for name in get_args(DtypeName))


def test_a_cluster_needs_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "legomole.hosts.ray", raising=False)
    result = run("merge", "a.safetensors", "--ray", "auto", "-o", "out")
    assert result.exit_code == 3
    assert "pip install 'legomole[ray]'" in squeezed(result.output)
    assert run("merge", "a.safetensors", "--ray", "auto", "--device", "cuda", "-o", "out").exit_code == 2
    assert not Path("out.safetensors").exists()


def test_bars_come_one_after_the_other_and_say_what_time_is_left(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(console, "err", lambda: Console(file=stream, force_terminal=True, width=100))
    with console.progress_bars("reading", "merging", quiet=False) as (reading, merging):
        reading(1, 2, "a")
        reading(2, 2, "b")
        merging(5, 40, "layer")
    text = Text.from_ansi(stream.getvalue()).plain
    assert text.index("reading") < text.index("merging")
    assert re.search(r"merging .* 5/40 .* left", text)
