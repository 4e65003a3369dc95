"""What a merged file says about itself, and what it keeps for other tools."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.lowrank import LowRank
from legomole.core.merge.report import MergeReport, ModuleReport
from legomole.core.recipes.metadata import KEY, compact, disagreements, file_metadata
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.text import recipe_from_data

MODULE = ModuleReport(
    name="m",
    adapters=(0, 1, 2),
    ranks_in=(2, 1, 2),
    rank_out=3,
    norms=(1.0, 1.0, 1.0),
    cosine=((1.0, 0.123456, -0.5), (0.123456, 1.0, 0.25), (-0.5, 0.25, 1.0)),
    error=0.5,
    clusters=((1, 0, 0), (1, 1, 2), (1, 0, 0)),
)
REPORT = MergeReport(
    ("a", "b", "c"), (1.0, 1.0, 1.0), "lego", (MODULE,), passed_on=("k1", "k2"), dropped=("gone",), notes=("n",)
)


def adapter(label: str, sha256: str = "", **metadata: str) -> Adapter:
    part = LowRank(torch.ones(1, 2), torch.ones(2, 1))
    return Adapter({"m": part}, metadata=metadata, source=Source(f"/home/me/{label}.safetensors", sha256, "kohya"))


def metadata_of(*adapters: Adapter, **fields) -> dict[str, str]:
    inputs = [Input(path=a.source.path) for a in adapters]
    recipe = Recipe(method="lego", settings={"rank": 3}, inputs=inputs, **fields)
    return file_metadata(recipe, REPORT, adapters)


def test_the_recipe_is_there_with_names_and_hashes_but_no_folders():
    metadata = metadata_of(adapter("a", "11"), adapter("b", "22"), normalize=True)
    recipe = recipe_from_data(json.loads(metadata[KEY])["recipe"])
    assert [(entry.path, entry.sha256) for entry in recipe.inputs] == [("a.safetensors", "11"), ("b.safetensors", "22")]
    assert recipe.normalize
    assert "/home/me" not in json.dumps(metadata)


def test_windows_folders_are_private_too():
    recipe = Recipe(
        method="calibrated",
        settings={"rank": 1, "statistics": "D:\\secret\\stats.safetensors"},
        inputs=[Input(path="C:\\Users\\me\\a.safetensors")],
    )
    metadata = file_metadata(recipe, REPORT, [adapter("a")])
    assert "Users" not in metadata[KEY]
    assert "secret" not in metadata[KEY]
    assert recipe_from_data(json.loads(metadata[KEY])["recipe"]).settings["statistics"] == "stats.safetensors"


def test_every_value_is_a_string_and_the_text_never_varies():
    first, second = (metadata_of(adapter("a"), adapter("b")) for _ in range(2))
    assert first == second
    assert all(isinstance(value, str) for value in first.values())
    assert list(json.loads(first[KEY])) == ["recipe", "report"] or sorted(json.loads(first[KEY])) == [
        "recipe",
        "report",
    ]


def test_the_compact_report_row():
    """error 0.5 keeps 1 - 0.25; the cosines of (1,2), (1,3), (2,3); two pure units, one that blends 1 + 1 + 2."""
    data = compact(REPORT)
    row = dict(zip(data["columns"], data["modules"]["m"], strict=True))
    assert row == {
        "loras": [1, 2, 3],
        "ranks_in": (2, 1, 2),
        "rank_out": 3,
        "energy_kept": 0.75,
        "overlap": [0.1235, -0.5, 0.25],
        "clusters": "2x1+0+0 1x1+1+2",
    }
    assert (data["passed_on"], data["dropped"], data["notes"]) == (2, ("gone",), ("n",))


def test_what_the_inputs_agree_on_is_kept_and_the_rest_named():
    a = adapter("a", ss_base_model_version="sdxl_base_v1-0", ss_v2="False")
    b = adapter("b", ss_base_model_version="sd_v1", ss_v2="False")
    silent = adapter("c")
    metadata = metadata_of(a, b, silent)
    assert metadata["ss_v2"] == "False"  # c does not say, which is no disagreement
    assert "ss_base_model_version" not in metadata
    assert disagreements([a, b, silent]) == ["ss_base_model_version differs: sdxl_base_v1-0 (a), sd_v1 (b)"]


def test_title_and_sources_for_other_tools():
    metadata = metadata_of(adapter("a"), adapter("b"))
    assert metadata["modelspec.title"] == "a + b (lego)"
    assert metadata["modelspec.merged_from"] == "a, b"


def test_trigger_phrases_are_joined_once_each():
    phrases = ["ohwx man", "in zvl style", "ohwx man"]
    adapters = [adapter(str(i), **{"modelspec.trigger_phrase": phrase}) for i, phrase in enumerate(phrases)]
    assert metadata_of(*adapters)["modelspec.trigger_phrase"] == "ohwx man, in zvl style"


def test_the_most_frequent_tags_of_every_data_set_are_kept():
    many = json.dumps({"10_ohwx": {f"tag{i}": i for i in range(100)}})
    few = json.dumps({"10_ohwx": {"zvl": 3}})
    metadata = metadata_of(adapter("a", ss_tag_frequency=many), adapter("b", ss_tag_frequency=few))
    tags = json.loads(metadata["ss_tag_frequency"])
    assert tags["a/10_ohwx"] == {f"tag{i}": i for i in range(99, 79, -1)}
    assert tags["b/10_ohwx"] == {"zvl": 3}


@pytest.mark.parametrize("junk", ["not json", "[]", "3", '{"x": 3}', '{"x": {"tag": "many", "other": null}}', "null"])
def test_junk_in_tags_does_no_harm(junk):
    assert "ss_tag_frequency" not in metadata_of(adapter("a", ss_tag_frequency=junk))


def test_peft_configurations_keep_what_all_say():
    a = adapter("a", adapter_config=json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "base"}))
    b = adapter("b", adapter_config=json.dumps({"peft_type": "LORA", "r": 4, "base_model_name_or_path": "base"}))
    assert json.loads(metadata_of(a, b)["adapter_config"]) == {"peft_type": "LORA", "base_model_name_or_path": "base"}
    assert "adapter_config" not in metadata_of(a, adapter("c"))


def test_the_row_of_many_adapters_names_those_in_a_cluster():
    """17 LoRAs would have 136 pairs in every module; a unit of the first with two of the 17th, and one of the 9th."""
    n = 17
    clusters = ((1, *[0] * 15, 2), (*[0] * 8, 1, *[0] * 8))
    many = replace(
        MODULE,
        adapters=tuple(range(n)),
        ranks_in=(1,) * n,
        norms=(1.0,) * n,
        cosine=tuple(tuple(float(i == j) for j in range(n)) for i in range(n)),
        clusters=clusters,
    )
    data = compact(replace(REPORT, inputs=tuple(map(str, range(n))), modules=(many,)))
    row = dict(zip(data["columns"], data["modules"]["m"], strict=True))
    assert (row["overlap"], row["clusters"]) == ([], "1x1@1+2@17 1x1@9")
    assert len(data["overlap"]) == n


def test_entries_that_programs_act_on_are_kept_where_the_inputs_that_have_them_agree():
    factor = {"reference_downscale_factor": "2"}
    control = adapter("control", **factor, sshs_model_hash="1", lora_adapter_metadata="{}", ss_output_name="control")
    metadata = metadata_of(control, adapter("style"), adapter("other", **factor))
    assert metadata["reference_downscale_factor"] == "2"
    assert {"sshs_model_hash", "lora_adapter_metadata", "ss_output_name"}.isdisjoint(metadata)
    assert disagreements([control, adapter("style")]) == []
    other = adapter("other", reference_downscale_factor="3" * 200)
    assert "reference_downscale_factor" not in metadata_of(control, other)
    assert disagreements([control, other]) == [f"reference_downscale_factor differs: 2 (control), {'3' * 100} (other)"]


def test_entries_about_the_training_are_kept_where_all_inputs_agree():
    a, b = adapter("a", ss_steps="100", ss_clip_skip="2"), adapter("b", ss_steps="200", ss_clip_skip="2")
    assert metadata_of(a, b)["ss_clip_skip"] == "2"
    assert metadata_of(a)["ss_steps"] == "100"
    assert "ss_steps" not in metadata_of(a, b)
    assert "ss_clip_skip" not in metadata_of(a, adapter("c"))
    text = "about the training are not kept, because the inputs differ: "
    assert disagreements([a, b]) == [f"1 entry {text}ss_steps"]
    assert disagreements([a, adapter("c")]) == [f"2 entries {text}ss_clip_skip, ss_steps"]
