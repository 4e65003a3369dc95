"""Names of dtypes: torch's, and the short ones. Imports no torch."""

from __future__ import annotations

DTYPES = ("float32", "float16", "bfloat16")
SHORT_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def full_dtype_name(name: str) -> str:
    """torch's name of a dtype: ``bf16`` and ``torch.bfloat16`` become ``bfloat16``; other text stays as it is."""
    name = name.removeprefix("torch.")
    return SHORT_NAMES.get(name, name)
