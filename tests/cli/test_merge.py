"""`legomole merge` and `compress`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import load, save
from legomole.core.lowrank import LowRank
from legomole.core.merge.methods import METHODS
from legomole.core.recipes.text import recipe_from_text
from safetensors.torch import load_file, save_file

from .command import NAMES, done, run, squeezed, write


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


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"calibrated", "ssr"}))
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
    recipe = recipe_from_text(done("inspect", "--recipe", "out.safetensors"), "yaml")
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
    recipe = recipe_from_text(done("inspect", "--recipe", "one.safetensors"), "yaml")
    assert (recipe.settings["rank"], recipe.settings["seed"]) == (2, 9)
    assert [entry.weight for entry in recipe.inputs] == [1.0, 0.5]
    done("merge", "--config", "recipe.toml", "b.safetensors:3", "--method", "concat", "-o", "two.safetensors")
    recipe = recipe_from_text(done("inspect", "--recipe", "two.safetensors"), "yaml")
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


@pytest.mark.parametrize("layer", ["transformer_blocks.0.attn1.to_q", "double_blocks.0.processor.qkv_lora1"])
def test_names_that_all_inputs_share_are_kept(layer):
    """Bare names (LTX, XLabs) are no format's own, but their readers want them back as they were."""
    down, up = (".down.weight", ".up.weight") if "processor" in layer else (".lora_A.weight", ".lora_B.weight")
    for name in ("x", "y"):
        save_file({layer + down: torch.ones(2, 3), layer + up: torch.ones(6, 2)}, f"{name}.safetensors")
    done("merge", "x.safetensors", "y.safetensors", "--method", "concat", "-o", "xy.safetensors")
    assert load_file("xy.safetensors").keys() == {layer + down, layer + up}


def test_compress_keeps_what_it_says():
    """Rank 4 to 2 by SVD: what is kept is the energy of the two largest singular values of each module."""
    text = done("compress", "a.safetensors", "--rank", "2", "-o", "small.safetensors")
    squares = [torch.linalg.svdvals(part.delta()).square() for part in load("a.safetensors").modules.values()]
    kept = sum(float(s[:2].sum()) for s in squares) / sum(float(s.sum()) for s in squares)
    assert f"merged rank 2, {kept:.1%} of the sum's energy kept" in text
    assert {part.rank for part in load("small.safetensors").modules.values()} == {2}


def test_a_cluster_needs_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "legomole.hosts.ray", raising=False)
    result = run("merge", "a.safetensors", "--ray", "auto", "-o", "out")
    assert result.exit_code == 3
    assert "pip install 'legomole[ray]'" in squeezed(result.output)
    assert run("merge", "a.safetensors", "--ray", "auto", "--device", "cuda", "-o", "out").exit_code == 2
    assert not Path("out.safetensors").exists()


def test_cap_equalize_and_only_are_recorded_and_repeated():
    text = done(
        *("merge", "a.safetensors", "b.safetensors:2", "--cap", "2", "--equalize", "0.5", "--only", "1:*attn1*"),
        *("--method", "concat", "-o", "out.safetensors"),
    )
    assert "equalize 0.5 changed the weights" in text
    data = json.loads(done("inspect", "out.safetensors", "--recipe", "--json"))
    assert (data["cap"], data["equalize"]) == (2.0, 0.5)
    assert data["inputs"][0]["module_weights"] == {"!*attn1*": 0.0}
    done("merge", "--config", "out.safetensors", "-o", "again.safetensors")
    assert Path("out.safetensors").read_bytes() == Path("again.safetensors").read_bytes()


def test_suggest_shows_strengths_and_reasons_before_it_merges():
    shutil.copy("a.safetensors", "copy.safetensors")
    text = done("merge", "a.safetensors", "copy.safetensors", "--suggest", "-o", "out.safetensors")
    lines = text.splitlines()
    assert lines[0] == "suggested: a 0.5, copy 0.5"
    assert "strengths times 0.50, 0.50" in lines[1]
    assert "[1] a: weight 0.5" in text
    recipe = json.loads(done("inspect", "out.safetensors", "--recipe", "--json"))
    assert [entry["weight"] for entry in recipe["inputs"]] == [0.5, 0.5]
    options = ("--suggest", "--loudness", "loudest", "--rank", "1", "--json", "-o", "other.safetensors")
    data = json.loads(done("merge", "a.safetensors", "copy.safetensors:3", *options))
    assert (data["suggestion"]["method"], data["suggestion"]["rank"]) == ("lego", None)
    assert data["suggestion"]["weights"] == pytest.approx([0.75, 2.25])
    assert data["report"]["weights"] == pytest.approx([0.75, 2.25])


def test_halves_of_wan_are_refused_unless_one_has_no_weight():
    shutil.copy("a.safetensors", "wan_high_noise.safetensors")
    shutil.copy("b.safetensors", "wan_low_noise.safetensors")
    result = run("merge", "wan_high_noise.safetensors", "wan_low_noise.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 3
    assert "high and the low noise half" in squeezed(result.stderr)
    done("merge", "wan_high_noise.safetensors", "wan_low_noise.safetensors:0", "-o", "out.safetensors")
    findings = json.loads(done("inspect", "wan_high_noise.safetensors", "wan_low_noise.safetensors", "--json"))
    assert "wan_noise_halves" in [finding["kind"] for finding in findings["findings"]]
