"""Every key of every input is merged, passed on, or named in the report."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.adapter import Adapter
from legomole.core.formats import load
from legomole.core.formats.suffixes import role_of
from legomole.core.merge.engine import MergeResult, merge
from legomole.core.merge.methods import METHODS
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.run import run
from safetensors.torch import load_file
from torch import Tensor

from ... import lora_files as files

LAYERS: files.Shapes = {"lora_unet_a": (4, 3), "lora_unet_b": (4, 3), "lora_te_x": (4, 3)}
EXTRA = st.one_of(
    st.sampled_from(
        [
            *(f"lora_unet_{layer}.{end}" for layer in "ac" for end in ("diff", "diff_b")),
            *(f"lora_unet_{layer}.{end}" for layer in "ac" for end in ("set_weight", "reshape_weight", "diff_m")),
            "lora_unet_a.lora_B.bias",
            "lora_unet_norm.w_norm",
            "lora_unet_norm.b_norm",
            "bundle_emb.word.clip_l",
            "base_model.model.lm_head.weight",
            "single_blocks.0.norm.key_norm.scale",
            ".alpha",
        ]
    ),
    # unknown keys; half an update (one that has a role) is refused, which reports it too
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=300)
    .map("odd/{}".format)
    .filter(lambda key: role_of(key) is None),
)
EXTRAS = st.dictionaries(EXTRA, st.integers(0, 1), max_size=8)
FILE = st.tuples(
    st.sets(st.sampled_from(list(LAYERS)), min_size=1).map(lambda chosen: {*chosen, "lora_unet_b"}), EXTRAS
)


def state(chosen: set[str], extras: dict[str, int], seed: int) -> dict[str, Tensor]:
    layers = files.state_dict({name: LAYERS[name] for name in sorted(chosen)}, seed=seed)
    fresh = {key: torch.full((4,), float(value)) for key, value in extras.items() if key not in layers}
    # the bias of factors that are not there would be refused, which reports it too
    return layers | {key: value for key, value in fresh.items() if "lora_B.bias" not in key or "lora_unet_a" in chosen}


def unaccounted(keys: list[str], result: MergeResult) -> list[str]:
    report = result.report
    merged = {module.name for module in report.modules}
    listed = [*report.passed_on, *report.dropped]

    def known(key: str) -> bool:
        if any(line.startswith((f"{key} (", f"{key} of ")) for line in listed):
            return True
        module, role = role_of(key) or ("", "")
        parameter = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation", "up_bias": "bias"}.get(role)
        if parameter is not None:
            return any(line.startswith(f"{module}.{parameter} (added") for line in listed)
        return role in ("down", "up", "alpha") and module in merged

    return [key for key in keys if not known(key)]


@settings(max_examples=60, deadline=None)
@given(st.lists(FILE, min_size=1, max_size=3))
def test_every_key_is_accounted_for(contents: list[tuple[set[str], dict[str, int]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in range(len(contents))]
        keys: set[str] = set()
        for i, (path, (chosen, extras)) in enumerate(zip(paths, contents, strict=True)):
            keys |= load_file(files.write(path, state(chosen, extras, i))).keys()
        result = run(Recipe(method="concat", inputs=[Input(path=str(path), weight=0.5) for path in paths]))
        assert unaccounted(sorted(keys), result) == []
        assert unaccounted(sorted(keys), merge([load(path) for path in paths], METHODS["concat"]())) == []
        carried: Adapter = result.adapter
        for path in paths:
            for key, tensor in load(path).extras.items():
                same = torch.equal(carried.extras[key], tensor)
                assert same or any(line.startswith(f"{key} of {path.stem}:") for line in result.report.dropped)
