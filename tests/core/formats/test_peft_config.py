"""adapter_config.json of one adapter, and of a merge of several."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from legomole.core.adapter import CONFIG_KEY, Adapter, Source, base_model
from legomole.core.errors import FormatError, MergeError, SaveError
from legomole.core.formats import FORMATS, from_state_dict, to_state_dict
from legomole.core.formats.peft import Peft
from legomole.core.formats.peft_config import combine_configs
from legomole.core.layers.align import align
from legomole.core.layers.keymap import MappedRows
from legomole.core.lowrank import LowRank
from legomole.core.merge.engine import merge
from legomole.core.merge.methods import METHODS
from legomole.core.recipes.metadata import disagreements
from torch import Tensor

from ... import lora_files as files

Q, V = "model.layers.0.q_proj", "model.layers.0.v_proj"
PREFIX = "base_model.model."


def adapter(
    label: str = "a", modules: tuple[str, ...] = (Q,), extras: dict[str, Tensor] | None = None, **config: Any
) -> Adapter:
    return Adapter(
        {name: LowRank(torch.ones(2, 3), torch.ones(4, 2)) for name in modules},
        extras={f"{PREFIX}{key}": value for key, value in (extras or {}).items()},
        metadata={CONFIG_KEY: json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config})},
        source=Source(label, format="peft"),
    )


def written(*adapters: Adapter) -> dict[str, Any]:
    """The configuration of the adapters' merge."""
    merged = merge(align(adapters), METHODS["concat"]()).adapter
    peft = FORMATS["peft"]
    assert isinstance(peft, Peft)
    metadata = {CONFIG_KEY: json.dumps(combine_configs(adapters))}
    return peft.config(Adapter(merged.modules, merged.diffs, merged.extras, metadata))


OTHER_KINDS = {
    "PROMPT_TUNING": "to the prompt and no matrix",
    "PREFIX_TUNING": "to the prompt and no matrix",
    "P_TUNING": "to the prompt and no matrix",
    "IA3": "multiplies outputs of layers",
    "VERA": "not a LoRA[\\s\\S]*save_as_lora",
    "SOMETHING_NEW": "not a LoRA[\\s\\S]*peft_type SOMETHING_NEW",
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_adapter_are_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(FormatError, match=OTHER_KINDS[kind]):
        from_state_dict({f"{PREFIX}prompt_embeddings": torch.ones(2, 2)}, {CONFIG_KEY: json.dumps({"peft_type": kind})})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("arrow_config", {"top_k": 3}),
    ],
)
def test_loras_with_another_kind_of_update_are_refused(key: str, value: Any) -> None:
    state = files.state_dict({Q: (4, 3)}, files.PEFT, alpha=None, prefix=PREFIX)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    assert from_state_dict(state, {CONFIG_KEY: json.dumps({**plain, key: None})}).modules
    with pytest.raises(FormatError, match=rf"cannot be merged from its files[\s\S]*{key} is set"):
        from_state_dict(state, {CONFIG_KEY: json.dumps({**plain, key: value})})


def test_entries_about_extras_are_kept_if_one_adapter_has_them() -> None:
    head, score = {"lm_head.weight": torch.ones(9, 3)}, {"score.weight": torch.ones(2, 3)}
    a = adapter("a", extras=head, modules_to_save=["lm_head"], bias="none", task_type="CAUSAL_LM", r=2)
    b = adapter("b", extras=score, modules_to_save=["classifier", "(", "score"], bias="all", fan_in_fan_out=True)
    config = written(a, b)
    assert config["modules_to_save"] == ["lm_head", "score"]  # no adapter has extras of a classifier, or of "("
    assert config["fan_in_fan_out"] is True
    assert config["bias"] == "none"  # no adapter has one among its extras
    assert "task_type" not in config


def test_the_bias_setting_that_includes_the_others() -> None:
    a = adapter("a", extras={f"{Q}.bias": torch.ones(4)}, bias="lora_only")
    assert written(a, adapter("b", bias="none"))["bias"] == "lora_only"
    assert written(a, adapter("b", bias="all"))["bias"] == "all"


def test_training_settings_are_dropped() -> None:
    """PEFT warns about them where the initialisation is another."""
    config = written(adapter(init_lora_weights="eva", eva_config={"rho": 2.0}, loftq_config={"x": 1}, later_key=3))
    assert not {"eva_config", "loftq_config"} & config.keys()
    assert (config["init_lora_weights"], config["later_key"]) == (True, 3)


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("alora_invocation_tokens", [1, 2], [1, 3]),
        ("alora_invocation_tokens", [1, 2], None),
        ("layer_replication", [[0, 2], [1, 3]], None),
        ("trainable_token_indices", [1], [2]),
    ],
)
def test_contradictions(key: str, first: Any, second: Any) -> None:
    with pytest.raises(MergeError, match=rf"contradict each other in {key}[\s\S]*\(a\)[\s\S]*\(b\)"):
        align([adapter("a", **{key: first}), adapter("b", **{key: second})])
    align([adapter("a", **{key: first}), adapter("b", **{key: first})])


def test_names_of_wrapped_layers() -> None:
    """Read under the names of the plain model, written under those of PEFT's: base_layer where there is a LoRA."""
    state = files.state_dict({Q: (4, 3)}, files.PEFT, alpha=None, prefix=PREFIX)
    odd = {
        f"{Q}.base_layer.bias": torch.ones(4),
        f"{V}.base_layer.bias": torch.ones(4),
        "lm_head.modules_to_save.default.weight": torch.ones(9, 3),
        "model.norm.weight": torch.ones(3),
    }
    found = from_state_dict(state | {f"{PREFIX}{key}": value for key, value in odd.items()})
    plain = {f"{Q}.bias", f"{V}.bias", "lm_head.weight", "model.norm.weight"}
    assert {key.removeprefix(PREFIX) for key in found.extras} == plain
    kept = {key.removeprefix(PREFIX) for key in to_state_dict(found, "peft") if "lora" not in key}
    assert kept == plain - {f"{Q}.bias"} | {f"{Q}.base_layer.bias"}


def test_a_layer_that_is_saved_whole_cannot_have_a_lora() -> None:
    a = adapter("a", extras={"lm_head.weight": torch.ones(4, 3)}, modules_to_save=["lm_head"])
    b = adapter("b", modules=("lm_head", Q))
    merged = merge(align([a, b]), METHODS["concat"]()).adapter
    both = Adapter(merged.modules, extras=merged.extras, metadata={CONFIG_KEY: json.dumps(combine_configs([a, b]))})
    with pytest.raises(SaveError, match=r"PEFT has no place for both[\s\S]*--module-weight '\*lm_head\*=0'"):
        to_state_dict(both, "peft")
    quiet = merge([a, b], METHODS["concat"](), module_weights=[{}, {"*lm_head*": 0}]).adapter
    assert to_state_dict(Adapter(quiet.modules, extras=quiet.extras, metadata=both.metadata), "peft")


def test_vocabularies_of_different_size() -> None:
    def with_words(label: str, n: int) -> Adapter:
        return adapter(label, extras={"model.embed_tokens.weight": torch.ones(n, 3)})

    align([with_words("a", 9), with_words("b", 9)])
    with pytest.raises(MergeError, match=r"carry whole has different sizes[\s\S]*\(9, 3\) and \(10, 3\)"):
        align([with_words("a", 9), with_words("b", 10)])
    part = LowRank(torch.ones(2, 9), torch.ones(3, 2))  # of embeddings (9, 3)
    on_them = Adapter(
        {"model.embed_tokens.lora_embedding": part, Q: adapter().modules[Q]}, source=Source("c", format="peft")
    )
    align([with_words("a", 9), on_them])
    with pytest.raises(MergeError, match=r"model\.embed_tokens\.weight"):
        align([with_words("a", 10), on_them])


def test_one_base_model_with_no_layer_in_common() -> None:
    """Attention and feed-forward layers: allowed if both name one base model, and a host does not contradict."""

    def absent(_: object) -> Any:
        raise MergeError("diffusers is not installed")

    a, b = adapter("a", base_model_name_or_path="m"), adapter("b", (V,), base_model_name_or_path="m")
    same = {name: (MappedRows(name),) for name in (Q, V)}
    for host in (None, absent, lambda _: {}, lambda _: same):
        assert align([a, b], key_map=host) == [a, b]
    for other in (adapter("b", (V,), base_model_name_or_path="n"), adapter("b", (V,))):
        with pytest.raises(MergeError, match="no layer in common"):
            align([a, other])
        with pytest.raises(MergeError, match="diffusers is not installed"):
            align([a, other], key_map=absent)
    for name, fits in (("layers.0.v_proj", False), ("lm_head", True), ("model.embed_tokens.lora_embedding", True)):
        other = adapter("b", (name,), base_model_name_or_path="m")
        if fits:
            assert align([a, other]) == [a, other]
        else:  # the same model without the wrapper of the first
            with pytest.raises(MergeError, match="no layer in common"):
                align([a, other])


def test_the_base_model_in_the_words_of_the_file() -> None:
    a, b = adapter("a", base_model_name_or_path="m", revision="1"), adapter("b", base_model_name_or_path="n")
    assert base_model(a.metadata) == "m"
    assert base_model({CONFIG_KEY: "{"}) is None
    assert base_model({"ss_base_model_version": "sd_v1"}) == "sd_v1"
    assert disagreements([a, b]) == ["base_model_name_or_path differs: m (a), n (b)"]
    assert disagreements([a, a]) == []
    for junk in ("{", "[]", "3"):  # under that key in a file of another format
        other = Adapter(a.modules, metadata={CONFIG_KEY: junk}, source=Source("c", format="kohya"))
        assert disagreements([a, other]) == []
        assert combine_configs([a, other]) == {}


@pytest.mark.parametrize("kind", ["LOHA", "LOKR"])
def test_loha_and_lokr_keep_only_entries_that_hold_for_a_lora(kind: str) -> None:
    """PEFT scales a LoKr of two whole factors by alpha / r, LyCORIS does not."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b") if kind == "LOHA" else ("lokr_w1", "lokr_w2")
    state = {f"{PREFIX}{Q}.{name}": torch.full((2, 2), 2.0) for name in names}
    config = {"peft_type": kind, "r": 2, "alpha": 3, "alpha_pattern": {"q_proj": 5}, "task_type": "CAUSAL_LM"}
    with pytest.raises(FormatError, match="--convert-rank"):
        from_state_dict(state, {CONFIG_KEY: json.dumps(config)})
    found = from_state_dict(state, {CONFIG_KEY: json.dumps(config)}, convert_rank=1)
    size, entry = (2, 8 * 8) if kind == "LOHA" else (4, 2 * 2)  # (2 2 + 2 2)^2, and 2 * 2 everywhere
    torch.testing.assert_close(found.modules[Q].delta(), torch.full((size, size), 5 / 2 * entry))
    assert json.loads(found.metadata[CONFIG_KEY]) == {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
