"""Merge what is sound in LoRAs that may be broken, to see what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..adapter import Adapter
from ..errors import FormatError
from ..merge.engine import MergeResult, merge
from ..merge.findings.find import without_broken_layers
from ..merge.methods import MergeMethod


def merge_sound_layers(
    adapters: Sequence[Adapter], method: MergeMethod, *arguments: Any, **options: Any
) -> MergeResult:
    """`merge`, but layers with NaN or infinity are left out and become findings of the report.

    Args:
        adapters, method: See `merge`. arguments, options: The others, see there.

    Raises:
        MergeError: See `merge`.
    """
    try:
        return merge(adapters, method, *arguments, **options)
    except FormatError:
        sound, findings = without_broken_layers(adapters)
        if not findings:
            raise
    result = merge(sound, method, *arguments, **options)
    return replace(result, report=replace(result.report, findings=(*findings, *result.report.findings)))
