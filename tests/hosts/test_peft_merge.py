"""Merged PEFT folders in PEFT: its logits with them, and its own merges of the same adapters.

All tests use the command line. PEFT's warnings (missing keys, settings that it does not know or ignores) are errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from legomole.cli import app  # noqa: E402
from legomole.core.formats import load  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from .transformers.models_for_peft import gpt2, llama, logits  # noqa: E402

# warnings within the libraries: deprecations, and PEFT's about tied embeddings and embeddings that it saved
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:.*embedding layers",
    "ignore:.*tie_word_embeddings",
)

WEIGHTS = (0.7, -1.5)


def small(**settings: Any) -> Any:
    return llama(2, **settings)


def adapter(folder: Path, model: Any, config: Any, seed: int, **saving: Any) -> Path:
    """An adapter with random factors (and random changes of its other trained parameters), saved by PEFT."""
    torch.manual_seed(seed)
    config.init_lora_weights = False
    model.name_or_path = "tiny"
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(str(folder), **{"save_embedding_layers": False, **saving})
    return folder


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def merged(folders: Sequence[Path], *options: str, weights: Sequence[float] = WEIGHTS) -> Path:
    output = folders[0].parent / "merged"
    run("merge", *(f"{f}:{w}" for f, w in zip(folders, weights, strict=True)), *options, "-o", f"{output}/")
    return output


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def added(model: Any, folders: Sequence[Path], base: Callable[[], Any], weights: Sequence[float] = WEIGHTS) -> Tensor:
    """Logits of a model with the delta of each adapter added to the weights, as PEFT computes it for it alone."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for folder, weight in zip(folders, weights, strict=True):
        for name, part in peft.PeftModel.from_pretrained(base(), str(folder)).named_modules():
            if isinstance(part, LoraLayer):
                with torch.no_grad():
                    layer = model.get_submodule(name.removeprefix("base_model.model."))
                    layer.weight += weight * part.get_delta_weight("default")
    return logits(model)


def loaded(model: Any, folder: Path) -> Any:
    """PEFT's model of a merged folder, with no missing and no unexpected keys."""
    model = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    result = peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder)))
    assert result.unexpected_keys == []
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    targets = {
        name.removeprefix("base_model.model.") for name, part in model.named_modules() if isinstance(part, LoraLayer)
    }
    assert sorted(targets) == config_of(folder)["target_modules"]
    return model


def lora(**settings: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"target_modules": ["q_proj", "up_proj"], **settings})


PATTERNS = {
    "rank_pattern": {r"layers\.1\.mlp\.up_proj": 2, "q_proj": 3},
    "alpha_pattern": {"up_proj": 5, r".*\.1\..*": 7},
}
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]] = {
    "alike": (small, lora(r=4, lora_alpha=6), lora(r=4, lora_alpha=8)),
    "rsLoRA": (small, lora(r=4, lora_alpha=6, use_rslora=True), lora(r=3, lora_alpha=5)),
    "both rsLoRA": (small, lora(r=4, lora_alpha=6, use_rslora=True), lora(r=4, lora_alpha=6, use_rslora=True)),
    "patterns": (small, lora(r=4, **PATTERNS), lora(r=4, use_rslora=True, **PATTERNS)),
    "one layer": (small, lora(layers_to_transform=[1], layers_pattern="layers"), lora(layers_to_transform=1)),
    "different layers": (small, lora(layers_to_transform=[0]), lora(layers_to_transform=[1])),
    "many layers": (llama, lora(layers_to_transform=[*range(1, 12)]), lora(target_modules=["up_proj"])),
    "different kinds": (small, lora(target_modules=["q_proj"]), lora(target_modules=["v_proj", "down_proj"])),
    "regex": (small, lora(target_modules=r".*layers\.0.*\.(q|k)_proj"), lora(exclude_modules=["layers.0.mlp.up_proj"])),
    "all-linear": (small, lora(target_modules="all-linear", r=2), lora(r=4)),
    "Conv1D": (
        gpt2,
        lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, r=4),
        lora(target_modules=["attn.c_proj", "c_fc"], fan_in_fan_out=True, r=2, lora_alpha=3),
    ),
    "Conv1D, different kinds": (
        gpt2, lora(target_modules=["c_attn"], fan_in_fan_out=True), lora(target_modules=["c_fc"], fan_in_fan_out=True)
    ),
    "embeddings": (small, lora(target_modules=["embed_tokens", "q_proj"], r=4), lora(target_modules=["embed_tokens"])),
    "head and embeddings": (small, lora(target_modules=["lm_head", "embed_tokens"]), lora(target_modules=["lm_head"])),
    "embeddings of tied": (lambda: small(tie_word_embeddings=True), lora(target_modules=["embed_tokens"]), lora()),
    "head of tied": (lambda: small(tie_word_embeddings=True), lora(target_modules=["lm_head"]), lora()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_exact_sum(case: str, tmp_path: Path) -> None:
    """``concat`` is the weighted sum of the deltas, for any scales, ranks and layers."""
    base, *configs = CASES[case]
    folders = [adapter(tmp_path / f"a{i}", base(), config(), i) for i, config in enumerate(configs)]
    result = merged(folders, "--method", "concat")
    expected = added(base(), folders, base)
    assert (expected - logits(base())).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded(base(), result)), expected, rtol=1e-4, atol=1e-5)
    config = config_of(result)
    ranks = [part.rank for part in load(result).modules.values()]
    assert config["r"] == max(sorted(set(ranks)), key=ranks.count)
    assert config["base_model_name_or_path"] == "tiny"
    assert not config["use_rslora"]


def test_ranks_that_differ_from_layer_to_layer(tmp_path: Path) -> None:
    """Each layer keeps its rank, with scale 1 everywhere: also right for readers that know one alpha and one r only."""
    folders = [adapter(tmp_path / f"a{i}", small(), lora(r=4)(), i) for i in range(2)]
    result = merged(folders, "--method", "svd", "--rank", "80%")
    ours, config = load(result), config_of(result)
    ranks = {name: part.rank for name, part in ours.modules.items()}
    assert len(set(ranks.values())) > 1
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert sorted(config["rank_pattern"].values()) == sorted(r for r in ranks.values() if r != config["r"])
    base = small()
    with torch.no_grad():
        for name, part in ours.modules.items():
            base.get_submodule(name).weight += part.B @ part.A
    torch.testing.assert_close(logits(loaded(small(), result)), logits(base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_that_keep_tied_layers_tied(tied: bool, tmp_path: Path) -> None:
    """``ensure_weight_tying``: the head has the embeddings' delta. Merged with an untied adapter, each has its own."""

    def base() -> Any:
        return small(tie_word_embeddings=True)

    first = lora(target_modules=["embed_tokens"], ensure_weight_tying=True)()
    second = lora(target_modules=["embed_tokens"], ensure_weight_tying=tied)()
    folders = [adapter(tmp_path / "a0", base(), first, 1), adapter(tmp_path / "a1", base(), second, 2)]
    result = merged(folders, "--method", "concat")
    assert config_of(result)["ensure_weight_tying"] is tied
    torch.testing.assert_close(logits(loaded(base(), result)), added(base(), folders, base), rtol=1e-4, atol=1e-5)


METHODS = {
    "linear": (["linear"], "linear", {}),
    "concat": (["concat"], "cat", {}),
    "svd": (["svd", "--rank", "3"], "svd", {"svd_rank": 3}),
    "ties": (["ties", "--rank", "3", "--density", "0.4"], "ties_svd", {"svd_rank": 3, "density": 0.4}),
}


@pytest.mark.parametrize("method", METHODS)
def test_pefts_own_merges(method: str, tmp_path: Path) -> None:
    """``linear``, ``cat``, ``svd`` and ``ties_svd`` of PEFT's add_weighted_adapter.

    Ours differ on purpose (docs/llm.md): PEFT's ``ties`` votes on entries of the factors, which have no meaning alone,
    ours and its ``ties_svd`` on entries of the deltas; from rsLoRAs PEFT keeps ``use_rslora``, so that its result is
    too large by sqrt(r); where ranks differ by layer it uses the largest everywhere.
    """
    names, theirs, options = METHODS[method]
    configs = [lora(r=4, lora_alpha=6)(), lora(r=4, lora_alpha=3)()]
    folders = [adapter(tmp_path / f"a{i}", small(), config, i) for i, config in enumerate(configs)]
    weights = (0.7, 1.5)
    model = peft.PeftModel.from_pretrained(small(), str(folders[0]), adapter_name="a0").eval()
    model.load_adapter(str(folders[1]), adapter_name="a1")
    model.base_model.add_weighted_adapter(["a0", "a1"], list(weights), "both", combination_type=theirs, **options)
    model.base_model.set_adapter("both")
    result = merged(folders, "--method", *names, weights=weights)
    torch.testing.assert_close(logits(loaded(small(), result)), logits(model), rtol=1e-4, atol=1e-4)


def test_layers_saved_whole(tmp_path: Path) -> None:
    """The head that one adapter trained whole is in the merge unchanged, and listed in the configuration."""
    folders = [
        adapter(tmp_path / "a0", small(), lora(r=4, modules_to_save=["lm_head"])(), 1),
        adapter(tmp_path / "a1", small(), lora(r=2)(), 2),
    ]
    result = merged(folders, "--method", "concat")
    assert config_of(result)["modules_to_save"] == ["lm_head"]
    state = load_file(folders[0] / "adapter_model.safetensors")
    base = small()
    with torch.no_grad():
        base.lm_head.weight.copy_(state["base_model.model.lm_head.weight"])
    torch.testing.assert_close(logits(loaded(small(), result)), added(base, folders, small), rtol=1e-4, atol=1e-5)


def test_of_two_heads_the_first_is_kept_and_the_other_reported(tmp_path: Path) -> None:
    """A classifier: PEFT saves its head unasked, and needs it to load the adapter."""

    def base() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(small().config).eval()

    folders = [adapter(tmp_path / f"a{i}", base(), lora(r=4, task_type="SEQ_CLS")(), i) for i in range(2)]
    output = tmp_path / "merged"
    report = run(
        "merge", *(f"{f}:{w}" for f, w in zip(folders, WEIGHTS, strict=True)), "--method", "concat", "-o", str(output)
    )
    assert "base_model.model.score.weight of a1: it cannot be added, and a0 has another one" in report
    assert config_of(output)["modules_to_save"] == ["score"]  # no adapter has a classifier
    changed = base()
    with torch.no_grad():
        changed.score.weight.copy_(load_file(folders[0] / "adapter_model.safetensors")["base_model.model.score.weight"])
    changed.config.pad_token_id = 0
    tuned = loaded(base(), output)
    tuned.config.pad_token_id = 0
    torch.testing.assert_close(logits(tuned), added(changed, folders, base), rtol=1e-4, atol=1e-5)


def test_embeddings_of_one_and_a_lora_on_them_of_another(tmp_path: Path) -> None:
    """The first saves them for a larger vocabulary, the second adapts them: PEFT then looks in a wrapped layer."""

    def base() -> Any:
        model = small()
        torch.manual_seed(5)
        model.resize_token_embeddings(40)
        return model

    first = base()
    with torch.no_grad():
        embeddings = first.model.embed_tokens.weight.normal_().clone()
    folders = [
        adapter(tmp_path / "a0", first, lora(r=4)(), 1, save_embedding_layers=True),
        adapter(tmp_path / "a1", base(), lora(r=2, target_modules=["embed_tokens"])(), 2),
    ]
    result = merged(folders, "--method", "concat")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(result / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" in load_file(result / "adapter_model.safetensors")
    changed = base()
    with torch.no_grad():
        changed.model.embed_tokens.weight.copy_(embeddings)
    torch.testing.assert_close(logits(loaded(base(), result)), added(changed, folders, base), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(added(base(), folders, base), logits(changed), atol=1e-2)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_one_trained(bias: str, tmp_path: Path) -> None:
    """Biases are extras: carried along, also those of layers that only the other adapter adapts."""

    def base() -> Any:
        return small(attention_bias=True)

    folders = [
        adapter(tmp_path / "a0", base(), lora(r=4, bias=bias, target_modules=["o_proj"])(), 1),
        adapter(tmp_path / "a1", base(), lora(r=2, target_modules=["v_proj"])(), 2),
    ]
    result = merged(folders, "--method", "concat")
    assert config_of(result)["bias"] == bias
    changed = base()
    whole = {key: x for key, x in load_file(folders[0] / "adapter_model.safetensors").items() if key.endswith(".bias")}
    assert len(whole) == (2 if bias == "lora_only" else 8)
    with torch.no_grad():
        for key, value in whole.items():
            name = key.removeprefix("base_model.model.").replace(".base_layer", "")
            changed.get_parameter(name).copy_(value)
    expected = added(changed, folders, base)
    torch.testing.assert_close(logits(loaded(base(), result)), expected, rtol=1e-4, atol=1e-5)
    assert (expected - added(base(), folders, base)).abs().max() > 1e-3


def test_trained_tokens(tmp_path: Path) -> None:
    folders = [
        adapter(tmp_path / "a0", small(), lora(r=4, trainable_token_indices=[1, 5])(), 1),
        adapter(tmp_path / "a1", small(), lora(r=2)(), 2),
    ]
    result = merged(folders, "--method", "concat")
    assert config_of(result)["trainable_token_indices"] == [1, 5]
    rows = load_file(folders[0] / "adapter_model.safetensors")
    (values,) = (value for key, value in rows.items() if key.endswith("trainable_tokens_delta"))
    base = small()
    with torch.no_grad():
        base.model.embed_tokens.weight[[1, 5]] = values
    expected = added(base, folders, small)
    torch.testing.assert_close(logits(loaded(small(), result)), expected, rtol=1e-4, atol=1e-5)
    assert (expected - added(small(), folders, small)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_loha_and_lokr_as_peft_converts_them(kind: str, tmp_path: Path) -> None:
    """Both give the best approximation of the rank. PEFT needs the base model and dense deltas, we need factors."""
    config = getattr(peft, f"{kind}Config")(
        r=2, alpha=3, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 1}, init_weights=False
    )
    torch.manual_seed(1)
    theirs = peft.get_peft_model(small(), config)
    theirs.save_pretrained(str(tmp_path / "x"))
    converted, state = peft.convert_to_lora(theirs, rank=2)
    run("convert", str(tmp_path / "x"), "--convert-rank", "2", "-o", str(tmp_path / "y"))
    ours = load(tmp_path / "y")
    assert converted.lora_alpha == converted.r
    assert len(ours.modules) == 4
    for name, part in ours.modules.items():
        A, B = (state[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert part.rank == 2
        torch.testing.assert_close(part.delta(), B @ A, rtol=1e-4, atol=1e-5)
    assert config_of(tmp_path / "y")["target_modules"] == sorted(ours.modules)
    loaded(small(), tmp_path / "y")


def test_shards_written_by_transformers(tmp_path: Path) -> None:
    model = small()
    torch.manual_seed(1)
    try:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")  # 5.24 needs a PEFT that is not released yet
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "parts", max_shard_size="1KB")
    assert len(list((tmp_path / "parts").glob("adapter_model-*-of-*.safetensors"))) > 1
    one, parts = load(tmp_path / "one"), load(tmp_path / "parts")
    assert one.modules.keys() == parts.modules.keys()
    for name, part in one.modules.items():
        torch.testing.assert_close(parts.modules[name].delta(), part.delta(), rtol=0, atol=0)
    result = merged([tmp_path / "parts"], "--method", "concat", weights=[1.0])
    torch.testing.assert_close(logits(loaded(small(), result)), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"a{i}", small().to(dtype), lora(r=4)(), i) for i in range(2)]
    for folder in folders:
        state = load_file(folder / "adapter_model.safetensors")
        save_file({key: value.to(dtype) for key, value in state.items()}, folder / "adapter_model.safetensors")
    result = merged(folders, "--method", "concat")
    assert {tensor.dtype for tensor in load_file(result / "adapter_model.safetensors").values()} == {dtype}
    torch.testing.assert_close(logits(loaded(small(), result)), added(small(), folders, small), rtol=0.02, atol=0.02)


def test_different_names_of_the_base_model_are_a_note(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"a{i}", small(), lora(r=4)(), i) for i in range(2)]
    config = config_of(folders[1]) | {"base_model_name_or_path": "elsewhere/tiny", "key_of_a_later_peft": {"x": 1}}
    (folders[1] / "adapter_config.json").write_text(json.dumps(config))
    output = run("merge", *map(str, folders), "-o", str(tmp_path / "merged"))
    assert "base_model_name_or_path differs: tiny (a0), elsewhere/tiny (a1)" in output
    assert "base_model_name_or_path" not in config_of(tmp_path / "merged")
    loaded(small(), tmp_path / "merged")


def other_shapes(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    wide = {key: value.repeat(1, 2) if "lora_A" in key else value for key, value in state.items()}
    save_file(wide, folder / "adapter_model.safetensors")


def other_words(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    save_file(state | {"base_model.model.lm_head.weight": torch.ones(33, 16)}, folder / "adapter_model.safetensors")


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def half_of_the_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def no_configuration(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def another_kind(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | {"peft_type": "IA3"}))


HARM = {
    other_shapes: "for different base models",
    other_words: "one layer that they carry whole has different sizes",
    no_weights: "the download or save was interrupted",
    half_of_the_weights: "The file is cut off",
    no_configuration: "so the scale is unknown",
    another_kind: "it multiplies outputs of layers",
}


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_bad_input_loses_nothing(harm: Callable[[Path], None], tmp_path: Path) -> None:
    """The error says what is wrong; inputs and an older result are unchanged, and nothing else is left."""
    first = adapter(tmp_path / "a0", small(), lora(r=4, modules_to_save=["lm_head"])(), 0)
    second = adapter(tmp_path / "a1", small(), lora(r=4)(), 1)
    output = merged([first, second], "--method", "concat")
    harm(second)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, ["merge", str(first), str(second), "-o", str(output), "--overwrite", "--json"])
    assert result.exit_code == 3, result.output
    assert HARM[harm] in result.output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
