"""Fuzzed inputs of every kind of file that legomole reads. A case is determined by its seed and number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from legomole.nano.store import FOLDER

from .container import Container, Raw, dumps, read, tensor
from .mutations import CONFIG, damage, mutate, odd

KINDS = ("lora", "folder", "gates", "statistics", "state", "recipe", "texts", "model")


@dataclass(frozen=True)
class Case:
    """A fuzzed input on disk.

    Args:
        kind: Kind of file, one of `KINDS`.
        path: Path of the file or folder.
    """

    kind: str
    path: Path


def make(seed: int, number: int, folder: Path) -> Case:
    """Write the case; the same seed and number always give the same bytes."""
    rng = Random(f"{seed}/{number}")
    kind = rng.choices(KINDS, (46, 16, 10, 8, 4, 12, 3, 4))[0]
    return Case(kind, _WRITERS[kind](folder, rng))


def sound(dialect: str, rank: int = 2, seed: int = 1) -> Container:
    """Return a small valid LoRA in one of the dialects."""
    names, suffixes = {
        "kohya": (("lora_unet_a_to_q", "lora_unet_b_conv"), ("lora_down.weight", "lora_up.weight", "alpha")),
        "comfy": (
            ("diffusion_model.a.to_q", "diffusion_model.b.conv"),
            ("lora_down.weight", "lora_up.weight", "alpha"),
        ),
        "diffusers": (("unet.a.to_q", "unet.b.conv"), ("lora_A.weight", "lora_B.weight")),
        "peft": (("base_model.model.a.to_q", "base_model.model.b.conv"), ("lora_A.weight", "lora_B.weight")),
    }[dialect]
    entries = []
    for name, ones, kernel in zip(names, ((), (1, 1)), ((), (3, 3)), strict=True):
        entries += [
            tensor(f"{name}.{suffixes[0]}", (rank, 6, *kernel), seed=seed),
            tensor(f"{name}.{suffixes[1]}", (5, rank, *ones), seed=seed + 1),
        ]
        if len(suffixes) == 3:
            entries.append(tensor(f"{name}.alpha", (), b"\0\0\x80\x3f"))
    return Container(entries, {"ss_network_dim": str(rank)})


def _damaged(c: Container, rng: Random) -> bytes:
    if rng.random() < 0.85:
        mutate(c, rng)
    raw = c.to_bytes()
    return damage(raw, rng) if rng.random() < 0.25 else raw


def _lora(folder: Path, rng: Random) -> Path:
    path = folder / "fuzzed.safetensors"
    path.write_bytes(_damaged(sound(rng.choice(("kohya", "comfy", "diffusers", "peft"))), rng))
    return path


def _folder(folder: Path, rng: Random) -> Path:
    path = folder / "fuzzed"
    path.mkdir()
    config = {"peft_type": rng.choice(("LORA", "LORA", "LORA", "LOHA", "LOKR")), "r": 2, "lora_alpha": 4}
    for _ in range(rng.randrange(4)):
        config[rng.choice(CONFIG)] = odd(rng)
    text = dumps(config).encode("utf-8", "surrogatepass")
    (path / "adapter_config.json").write_bytes(damage(text, rng) if rng.random() < 0.2 else text)
    weights = _damaged(sound("peft"), rng) if rng.random() < 0.5 else sound("peft").to_bytes()
    if rng.random() < 0.8:
        (path / "adapter_model.safetensors").write_bytes(weights)
    else:
        part, other = (f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2))
        listed = {"base_model.model.a.to_q.lora_A.weight": part, "x": odd(rng) if rng.random() < 0.5 else part}
        if rng.random() < 0.5:  # the second part has the same keys or others
            second = sound(rng.choice(("peft", "diffusers")), seed=3)
            listed |= {entry.key: other for entry in second.entries}
            (path / other).write_bytes(_damaged(second, rng))
        index = {"weight_map": listed if rng.random() < 0.7 else odd(rng)}
        (path / part).write_bytes(weights)
        (path / "adapter_model.safetensors.index.json").write_text(dumps(index), encoding="utf-8", errors="replace")
    return path


def _with_odd_metadata(c: Container, rng: Random) -> Container:
    """Replace a value in the metadata with probability 1/2, because random damage rarely hits one."""
    if rng.random() < 0.5:
        c.metadata[rng.choice([key for key in c.metadata if key != "kind"])] = dumps(odd(rng))
    return c


def _gates(folder: Path, rng: Random) -> Path:
    path = folder / "gates.safetensors"
    path.write_bytes(_damaged(_with_odd_metadata(read(FOLDER / "gates.safetensors"), rng), rng))
    return path


def _statistics(folder: Path, rng: Random) -> Path:
    from hashlib import sha256

    hashes = [sha256(sound("kohya", seed=seed).to_bytes()).hexdigest() for seed in (1, 2)]
    header = {"kind": "legomole.statistics.1", "adapters": json.dumps(hashes), "measured": "{}", "strengths": "[1, 1]"}
    names = [f"lora_unet_a_to_q/{kind}" for kind in ("own/0", "own/1", "joint/0,1", "base")]
    c = Container([tensor(name, (6, 6)) for name in names], header | {"same": '{"b": "lora_unet_a_to_q"}'})
    path = folder / "statistics.safetensors"
    path.write_bytes(_damaged(_with_odd_metadata(c, rng), rng))
    return path


def _state(folder: Path, rng: Random) -> Path:
    entries = [tensor("0/value", (3,)), tensor("0/exp_avg", (3,)), tensor("0/exp_avg_sq", (3,)), tensor("0/step", ())]
    run = '{"losses": [1.0, 0.5], "entropies": [0.1, 0.1]}'
    c = Container(entries, {"kind": "legomole.training.1", "key": "k", "run": run})
    (folder / "run").mkdir()
    (folder / "run" / "state.safetensors").write_bytes(_damaged(_with_odd_metadata(c, rng), rng))
    return folder / "run"


_YAML = (
    "{}", "[]", "null", "~", "1", "-1", ".nan", ".inf", "1e999", "1:2:3:4", "2026-13-45", "2026-99-99T99:99:99", "0o9",
    "!!python/object/apply:os.system ['touch owned']", "!!python/name:os.system", "!!int x", "!!float x",
    "!!timestamp x", "hf://a/b@/etc/hostname", "hf://a/b@C:/x", "hf://a\\b", "hf://", "hf://a/b@\\\\host\\share\\x",
    "!!binary '==='", "!!set {a, b}", "&a [*a]", "*a", "'", "\"\\ud800\"", "\t", "[" * 3000, "{a: " * 3000, "9" * 5000,
    "0x" + "f" * 5000, "? [a]\n: b", "<<: *x", "%TAG", "---\n---", "|\n x", "'\0'", "\x1b[2J", "/etc/passwd", "../../x",
    "hf://a/b", "hf://../..@x", "\\\\host\\share\\x", "a.safetensors", ".", "16", "1.5x", "95%", "auto", "lego", "ties",
    "- path: a.safetensors", "{'*': .nan}", "{'[': 2}", "true", "float16", "kohya", "=", "!!bool maybe", "!!omap [1]",
    "&x [" + ", ".join(["lol"] * 9) + "]\nb: &y [" + ", ".join(["*x"] * 9) + "]\nc: &z [" + ", ".join(["*y"] * 9)
    + "]\nsettings: {a: [" + ", ".join(["*z"] * 9) + "]}",
)  # fmt: skip


def _recipe(folder: Path, rng: Random) -> Path:
    for name, seed in (("a", 1), ("b", 2)):
        (folder / f"{name}.safetensors").write_bytes(sound("kohya", seed=seed).to_bytes())
    if rng.random() < 0.25:  # a recipe in the metadata of a merged file
        recipe = {"method": "concat", "inputs": [{"path": "a.safetensors"}, {"path": "b.safetensors"}]}
        recipe[rng.choice((*recipe, "settings", "module_weights", "dtype", "x"))] = odd(rng)
        c = sound("kohya")
        c.metadata["legomole"] = dumps({"recipe": recipe if rng.random() < 0.8 else odd(rng), "report": odd(rng)})
        path = folder / "recipe.safetensors"
        path.write_bytes(_damaged(c, rng))
        return path
    kind = rng.choice(("yaml", "yaml", "yaml", "toml"))
    if kind == "yaml":
        lines = [
            "method: lego", "settings:\n  rank: 2\n  seed: 0", "inputs:\n- path: a.safetensors\n  weight: 0.8",
            "module_weights:\n  '*to_q': 0.5", "normalize: false", "dtype: float16", "convert_rank: 4",
        ]  # fmt: skip
    else:
        lines = ['method = "svd"', "normalize = false", '[[inputs]]\npath = "a.safetensors"', "[settings]\nrank = 2"]
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(lines))
        head = lines[at].rsplit(":" if kind == "yaml" else "=", 1)[0]
        value = rng.choice(_YAML) if kind == "yaml" else dumps(odd(rng))
        lines[at] = f"{head}{': ' if kind == 'yaml' else ' = '}{value}"
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    path = folder / f"recipe.{kind}"
    path.write_bytes(damage(raw, rng) if rng.random() < 0.3 else raw)
    return path


def _texts(folder: Path, rng: Random) -> Path:
    lines: list[str] = []
    for _ in range(rng.randrange(5)):
        entry: dict[str, object] = {"prompt": "a", "completion": "b"} if rng.random() < 0.6 else {"text": "a"}
        if rng.random() < 0.5:
            entry[rng.choice((*entry, "x"))] = odd(rng)
        lines.append(dumps(entry if rng.random() < 0.9 else odd(rng)))
    raw = rng.choice(("\n", "\r\n", "\n\n", "\u2028")).join(lines).encode("utf-8", "surrogatepass")
    path = folder / "texts.jsonl"
    path.write_bytes(damage(raw, rng) if rng.random() < 0.3 else raw)
    return path


def _model(folder: Path, rng: Random) -> Path:
    """Write a language model of one layer with its tokenizer."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4, "hidden_size": 4,
        "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 2, "max_position_embeddings": 8, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "hidden_act": "silu", "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    inside = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = ["lm_head", "model.embed_tokens", *(f"model.layers.0.{name}" for name in inside)]
    norms = ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
    entries = [tensor(f"{name}.weight", (4, 4)) for name in names] + [tensor(f"{name}.weight", (4,)) for name in norms]
    words = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2, "d": 3}, "unk_token": "a"}}
    texts: dict[str, dict[str, object]] = {
        "config.json": {**config},
        "tokenizer.json": {"version": "1.0", "added_tokens": [], **dict.fromkeys(
            ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")), **words},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "a"},
    }  # fmt: skip
    path = folder / "model"
    path.mkdir()
    changed = rng.choice((*texts, "weights"))
    for name, data in texts.items():
        if name == changed:
            data[rng.choice((*data, "auto_map", "x"))] = odd(rng)
        raw = dumps(data).encode("utf-8", "surrogatepass")
        (path / name).write_bytes(damage(raw, rng) if name == changed and rng.random() < 0.3 else raw)
    c = Container(entries, {"format": "pt"})
    (path / "model.safetensors").write_bytes(_damaged(c, rng) if changed == "weights" else c.to_bytes())
    return path


_WRITERS: dict[str, Callable[[Path, Random], Path]] = {
    "lora": _lora, "folder": _folder, "gates": _gates, "statistics": _statistics, "state": _state, "recipe": _recipe,
    "texts": _texts, "model": _model,
}  # fmt: skip

__all__ = ["KINDS", "Case", "Raw", "make", "sound"]
