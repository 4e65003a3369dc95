"""Damage to files: in their values, names, header, metadata and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

from .container import SIZES, Container, Raw, tensor

_PATTERNS = (
    b"\0", b"\xff", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\1\0\0\0", b"\xff\xff\x7f\x7f", b"\0\x7c",
    b"\xff\x7b", b"\x80\x7f", b"\0\0\0\0\0\0\xf0\x7f", b"\0\0\x80\x3f", b"\0\0\0\x80",
)  # fmt: skip
"""Zeros, NaN and infinity of several widths, denormals, the largest values, one, minus zero."""

_SUFFIXES = (
    ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".lora_A.weight", ".lora_B.weight", ".lora_A", ".alpha",
    ".lora_A.default.weight", ".lora.down.weight", ".lora_B.bias", ".diff", ".diff_b", ".dora_scale", ".hada_w1_a",
    ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w2_b",
    ".lokr_t2",
    ".w_norm", ".b_norm", ".oft_blocks", ".ia3_l", ".lora_embedding_A", ".processor.to_q_lora.up.weight", "", ".",
)  # fmt: skip
_NAMES = (
    "", " ", ".", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "a\nb", "\x1b]0;owned\x07\x1b[31m", "[/x]",
    "[bold]", "[link=file:///etc/passwd]x[/link]", "\u202e", "é", "\U0001f600", "<script>alert(1)</script>", "{}", "%s",
    "lora_unet_a_b", "lora_unet_a.b", "unet.a.b", "base_model.model.a.b", "diffusion_model.a.b", "__metadata__", "NaN",
    "lora_te_text_model_encoder_layers_0_mlp_fc1", "unet.up_blocks.0.attentions.0.proj_in", "*", "[a-z", "(a+)+$",
    Raw('"\\ud800"'), Raw('"\\u0000"'),
)  # fmt: skip
KNOWN = (
    "legomole", "adapter_config", "lora_adapter_metadata", "ss_tag_frequency", "modelspec.architecture",
    "modelspec.trigger_phrase", "ss_base_model_version", "kind", "format", "settings", "experts", "scopes", "training",
    "adapters", "measured", "strengths", "same", "key", "run", "base", "modelspec.title",
)  # fmt: skip
CONFIG = (
    "peft_type", "r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias",
    "modules_to_save", "target_modules", "trainable_token_indices", "fan_in_fan_out", "init_lora_weights",
    "base_model_name_or_path", "layer_replication", "ensure_weight_tying", "revision", "task_type", "auto_mapping",
)  # fmt: skip


def deep(rng: Random) -> Raw:
    """Return nested JSON, from harmless depths to far beyond a parser's stack."""
    n = rng.choice((50, 500, 5_000, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return Raw(opening * n + "1" + closing * n)


def odd(rng: Random, depth: int = 0) -> Any:
    """Return an unexpected JSON value."""
    simple = (
        None, True, False, 0, -1, 1, 3, 2**63, -(2**63), 0.5, 1e308, 1e-320, "", "x", "1", "LORA", "lokr", "1e999",
        "x" * 10_000, [], {}, Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1" + "0" * 400), Raw('"\\ud800"'),
        Raw("9" * 5000), "[/]", "\x1b[2J", "all", [[]], {"": ""}, {"a": {"b": [1, 2, {"c": None}]}},
        {"(a+)+b": 4}, {"(a|aa)+$": 4}, {".*.*.*.*.*.*.*x": 2}, {"(": 1}, {"a": "much"}, {"a": -1}, {"x": 0},
    )  # fmt: skip
    if rng.random() < 0.1:
        return deep(rng)
    if depth < 2 and rng.random() < 0.2:
        return [odd(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 2 and rng.random() < 0.2:
        return {rng.choice((*KNOWN, *CONFIG, "loss", "a")): odd(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(simple)


# ---- functions that change a container in place


def numbers(c: Container, rng: Random) -> None:
    entry = rng.choice(c.entries)
    pattern = rng.choice(_PATTERNS) if rng.random() < 0.8 else rng.randbytes(64)
    size = len(entry.data)
    spread = pattern * (size // len(pattern) + 1)
    start = 0 if rng.random() < 0.5 else rng.randrange(size + 1)
    entry.data = entry.data[:start] + spread[: size - start]


def dtype(c: Container, rng: Random) -> None:
    entry = rng.choice(c.entries)
    entry.dtype = rng.choice(list(SIZES))
    size = math.prod(entry.shape) * SIZES[entry.dtype]
    entry.data = (entry.data * (size // max(1, len(entry.data)) + 1))[:size].ljust(size, b"\0")


def shape(c: Container, rng: Random) -> None:
    """Change a tensor's shape, with a consistent header."""
    entry = rng.choice(c.entries)
    dims = [rng.choice((0, 1, 1, 2, 3, 4, 8, 16, 64)) for _ in range(rng.randrange(7))]
    while math.prod(dims) > 1 << 16:
        dims.pop()
    if rng.random() < 0.1:  # an empty tensor with huge dimensions
        dims = [0, rng.choice((1 << 20, 1 << 31, 1 << 40, 1 << 62)), *([1 << 40] if rng.random() < 0.3 else [])]
        rng.shuffle(dims)
    other = tensor(entry.key, dims, dtype=entry.dtype)
    entry.shape, entry.data = other.shape, other.data


def name(c: Container, rng: Random) -> None:
    entry = rng.choice(c.entries)
    old = entry.key if isinstance(entry.key, str) else "x"
    stem = old.rsplit(".", 2)[0]
    choice = rng.random()
    if choice < 0.4:
        entry.key = stem + rng.choice(_SUFFIXES)
    elif choice < 0.7:
        new = rng.choice(_NAMES)
        entry.key = new if isinstance(new, Raw) else new + rng.choice(_SUFFIXES)
    elif choice < 0.8:
        entry.key = rng.choice(("a", ".", "a.", "lora_unet_")) * rng.choice((300, 30_000)) + rng.choice(_SUFFIXES)
    else:
        entry.key = rng.choice(c.entries).key


def duplicate(c: Container, rng: Random) -> None:
    """Repeat a tensor, under the same name or another spelling."""
    entry = rng.choice(c.entries)
    c.entries.append(tensor(entry.key, entry.shape, dtype=entry.dtype, seed=3))
    if rng.random() < 0.7:
        name(Container([c.entries[-1]]), rng)


def missing(c: Container, rng: Random) -> None:
    if len(c.entries) > 1:
        c.entries.pop(rng.randrange(len(c.entries)))


def large(c: Container, rng: Random) -> None:
    """Add small tensors that describe huge ones: ranks, Tucker cores, products."""
    x, n = "lora_unet_large", rng.choice((300, 3_000, 30_000))
    c.entries += rng.choice(
        (
            lambda: [tensor(f"{x}.lora_down.weight", (n, 1)), tensor(f"{x}.lora_up.weight", (1, n))],
            lambda: [
                tensor(f"{x}.lora_down.weight", (1, n, 1, 1)),
                tensor(f"{x}.lora_up.weight", (1, 1, 1, 1)),
                tensor(f"{x}.lora_mid.weight", (1, 1, n)),
            ],
            lambda: [tensor(f"{x}.{k}", s) for k, s in zip(
                ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ((2, n), (n, 2)) * 2, strict=True)],
            lambda: [tensor(f"{x}.lokr_w1", (n, 1)), tensor(f"{x}.lokr_w2", (n, 1))],
            lambda: [tensor(f"{x}.lokr_w1", (1, n)), tensor(f"{x}.lokr_w2", (n, 1))],
            lambda: [tensor(f"{x}.diff", (n, 4))],
            lambda: [tensor(f"{x}.diff_b", (n, 0, 7))],
        )
    )()  # fmt: skip


def many_keys(c: Container, rng: Random) -> None:
    """Add a hundred thousand keys."""
    suffixes = rng.choice(((".lora_down.weight", ".lora_up.weight"), (".alpha",), (".diff_b",), (".bias",)))
    stem = rng.choice(("lora_unet_", "unet.a.", "base_model.model.layers."))
    for i in range(100_000 // len(suffixes)):
        c.entries += [tensor(f"{stem}{i}{suffix}", (1, 1)) for suffix in suffixes]


def metadata(c: Container, rng: Random) -> None:
    if not isinstance(c.metadata, dict) or rng.random() < 0.1:
        c.metadata = odd(rng)
        return
    key = rng.choice((*KNOWN, "x", rng.choice(_NAMES)))
    value = odd(rng)
    if rng.random() < 0.9:  # the format requires strings
        from .container import dumps

        value = dumps(value)
    if rng.random() < 0.05:
        value = "x" * 3_000_000
    c.metadata = {**c.metadata, key: value}


def wrong_header(c: Container, rng: Random) -> None:
    """Make the header disagree with the data."""
    entry = rng.choice(c.entries)
    size = len(entry.data)
    word, value = rng.choice(
        (
            ("data_offsets", [rng.randrange(-2, 200), rng.randrange(-2, 400)]),
            ("data_offsets", [size, 0]),
            ("data_offsets", [0, rng.choice((2**31, 2**63 - 1, 2**64 - 1, 2**64, -1))]),
            ("data_offsets", odd(rng)),
            ("shape", [rng.choice((-1, 2**31, 2**32, 2**62, 2**64, 0.5, None, "2")), rng.choice((1, 2**33, -1))]),
            ("shape", [2**32, 2**32, 2**32]),
            ("shape", odd(rng)),
            ("shape", [1] * rng.choice((20, 70, 5000)) + [*entry.shape]),
            ("dtype", rng.choice((*SIZES, "F4", "F6_E2M3", "float32", "", "🦙"))),
            ("dtype", odd(rng)),
            (rng.choice(("extra", "dtype", "shape")), deep(rng)),
        )
    )
    entry.header = {**entry.header, word: value}


def frame(c: Container, rng: Random) -> None:
    """Change the length of the header, or the bytes around it."""
    choice = rng.randrange(5)
    if choice == 0:
        c.length = max(0, len(c.to_bytes()) + rng.choice((-100, -9, -8, -7, -1, 0, 1, 100)))
    elif choice == 1:
        c.length = rng.choice((0, 1, 2, 100_000_000, 2**31, 2**63, 2**64 - 1))
    elif choice == 2:
        c.head = rng.choice((b" ", b" " * 100_000, b"x", b"}", b"\0", b"\xff\xfe", b"\xef\xbb\xbf"))
    elif choice == 3:
        c.tail = rng.choice((b"\0", b"x" * 1000, b"PK\3\4"))
    else:
        c.entries = []


MUTATIONS: tuple[tuple[Callable[[Container, Random], None], int], ...] = (
    (numbers, 10), (dtype, 10), (shape, 10), (name, 14), (duplicate, 6), (missing, 6), (large, 5), (metadata, 14),
    (wrong_header, 12), (frame, 5),
)  # fmt: skip
"""Changes of a container with their relative frequencies."""


def mutate(c: Container, rng: Random) -> None:
    """Apply one to four changes, and rarely `many_keys`."""
    changes, often = zip(*MUTATIONS, strict=True)
    for change in rng.choices(changes, often, k=rng.randint(1, 4)):
        if c.entries:
            change(c, rng)
    if rng.random() < 0.004:
        many_keys(c, rng)


def damage(raw: bytes, rng: Random) -> bytes:
    """Flip, delete, repeat or insert bytes."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if not data:
            break
        at = rng.randrange(min(len(data), 2000) if rng.random() < 0.7 else len(data))
        choice = rng.randrange(4)
        if choice == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif choice == 1:
            data[at] = rng.randrange(256)
        elif choice == 2:
            del data[at : at + rng.choice((1, 8, 100, len(data)))]
        else:
            data[at:at] = rng.choice((rng.randbytes(4), bytes(data[at : at + 50]), b"\xff", b'"', b"}"))
    return bytes(data)
