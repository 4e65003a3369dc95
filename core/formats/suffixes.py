"""Key suffixes: the module of a key in a LoRA file, and the role of its tensor there.

One file may mix spellings, so every key is classified by itself: ``a.b.lora_down.weight`` has the role ``down`` in the
module ``a.b``. Keys that match no rule have no role; their tensors are carried along as extras.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

Roles = dict[str, dict[str, str]]  # module -> role -> key

_SUFFIXES = {
    # low-rank factors: delta = scale * up @ down
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_B.default.bias": "up_bias",
    ".alpha": "alpha",
    # full differences, added unchanged
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".diff_m": "diff_m",  # of a parameter named modulation
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    # DoRA magnitudes
    ".dora_scale": "dora",
    ".lora_magnitude_vector": "dora",
    ".lora_magnitude_vector.weight": "dora",
    ".lora_magnitude_vector.default.weight": "dora",
    # factors of LoHa and LoKr
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    ".lokr_t1": "lokr_t1",
    ".lokr_t2": "lokr_t2",
    # multiplicative or input-dependent: no additive delta without the base weights
    ".oft_blocks": "OFT/BOFT",
    ".oft_R.weight": "OFT/BOFT",
    ".oft_diag": "OFT/BOFT",
    ".boft_R": "OFT/BOFT",
    ".boft_s": "OFT/BOFT",
    **{f".{name}.weight": "GLoRA" for name in ("a1", "a2", "b1", "b2")},
    ".on_input": "IA3",
    ".ia3_l": "IA3",
    ".lambda_layer": "T-LoRA",
    ".q_layer.weight": "T-LoRA",
    ".p_layer.weight": "T-LoRA",
    ".vera_lambda_b": "VeRA",
    ".vera_lambda_d": "VeRA",
}
UNSUPPORTED = ("T-LoRA", "OFT/BOFT", "GLoRA", "IA3", "VeRA")

_MAX_DOTS = max(suffix.count(".") for suffix in _SUFFIXES)
_EMBEDDING = re.compile(r"(.+\.lora_embedding)_([AB])(?:\.default)?(?:\.weight)?")
# XLabs' `processor.qkv_lora1.down.weight` and the first diffusers' `processor.to_q_lora.down.weight`
_PROCESSOR = re.compile(r"(.+_lora\d?)\.(down|up)\.weight")
_OLD_ATTENTION = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora")


def role_of(key: str) -> tuple[str, str] | None:
    """The module of a key and the role of its tensor, or ``None`` for a key that is not part of a LoRA's update."""
    if match := _EMBEDDING.fullmatch(key):
        # the module name keeps the suffix: factors of an embedding act on the transposed weight
        return match[1], "down" if match[2] == "A" else "up"
    if match := _PROCESSOR.fullmatch(key):
        return _current_name(match[1]), match[2]
    parts = key.rsplit(".", _MAX_DOTS)
    for n in range(1, len(parts)):  # the shortest module name wins, which is the longest suffix
        suffix = f".{'.'.join(parts[n:])}"
        if suffix in _SUFFIXES and (module := ".".join(parts[:n])):
            return module, _SUFFIXES[suffix]
    return None


def _current_name(module: str) -> str:
    """The layer of an old attention processor's factor; XLabs' names, which are fused layers, stay."""
    match = _OLD_ATTENTION.fullmatch(module)
    if match is None:
        return module
    if match[1].endswith("self_attn"):  # a CLIP text encoder
        return f"{match[1]}.{match[2]}_proj"
    return f"{match[1]}.to_{match[2]}" + (".0" if match[2] == "out" else "")


def classify(keys: Iterable[str]) -> tuple[Roles, list[str]]:
    """Sort a file's keys into modules and roles.

    Returns:
        Module -> role -> key, and the remaining keys: those without a role, and second spellings of a role.
    """
    roles: Roles = defaultdict(dict)
    rest: list[str] = []
    for key in keys:
        match = role_of(key)
        if match is None or match[1] in roles[match[0]]:
            rest.append(key)
        else:
            roles[match[0]][match[1]] = key
    return dict(roles), rest
