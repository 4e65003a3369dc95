"""Freeze a mixture: gates at their mean become merge weights, and the mixture becomes one ordinary LoRA."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..errors import MergeError, name_some
from ..formats.peft_config import CONFIG_KEY, combine_configs
from ..merge.engine import MergeResult, merge
from ..merge.methods import MergeMethod
from ..progress import Progress
from .bank import Bank
from .mixture import Mixture
from .record import Record


def freeze(
    mixture: Mixture,
    bank: Bank,
    record: Record,
    method: MergeMethod,
    *,
    text_encoder_weights: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """One LoRA that acts as the mixture does with its gates held at their mean over a recorded run.

    The gates then no longer follow the prompt, the step or the image. The report says how much they varied.

    Args:
        mixture: The mixture. bank: Its bank for the model that ran.
        record: Record of the run, see `core.mole.record`.
        method: Merge method; ``concat`` equals the mixture at its mean gates exactly, at the sum of the ranks.
        text_encoder_weights: Weights of the experts' text encoder parts, which have no gates; default the strengths.
        progress: See `merge`.

    Raises:
        MergeError: Nothing was recorded, the gates were shut for all experts, or experts have regions or steps.
    """
    if mixture.is_partial:
        raise MergeError(
            "An ordinary LoRA acts everywhere and in all steps.",
            expected="a mixture without regions and steps",
            remedy="remove the regions and the start and end steps, or keep the mixture",
        )
    mean, spread = record.mean(), record.spread()
    scope_of = {module: bank.scopes[path].name for module, path in bank.paths.items()}
    missing = sorted({scope for scope in scope_of.values() if scope not in mean})
    if missing:
        raise MergeError(
            "Some gates were not recorded.", found=name_some(missing), remedy="record a whole run of the model"
        )
    module_weights = [
        {glob.escape(module): float(mean[scope][i]) for module, scope in scope_of.items() if module in adapter.modules}
        for i, adapter in enumerate(mixture.experts)
    ]
    strengths = [strength * mixture.scale for strength in mixture.strengths]
    result = merge(
        mixture.experts,
        method,
        strengths,
        text_encoder_weights=text_encoder_weights,
        module_weights=module_weights,
        progress=progress,
    )
    notes = (*result.report.notes, *_notes(mixture, bank, mean, spread))
    config = combine_configs(
        mixture.experts
    )  # PEFT's settings that depend on the base model, such as transposed layers
    metadata = {CONFIG_KEY: json.dumps(config, sort_keys=True)} if config else {}
    adapter = replace(result.adapter, metadata={**result.adapter.metadata, **metadata})
    return MergeResult(adapter, replace(result.report, notes=notes))


def _notes(mixture: Mixture, bank: Bank, mean: Mapping[str, Tensor], spread: Mapping[str, Tensor]) -> list[str]:
    n = len(mixture.experts)
    means = [float(sum(m[i] for m in mean.values()) / len(mean)) for i in range(n)]
    deviations = [float(sum(s[i] for s in spread.values()) / len(spread)) for i in range(n)]
    gates = ", ".join(
        f"{label} {m:.3g} (varied by {s:.2g})" for label, m, s in zip(mixture.labels, means, deviations, strict=True)
    )
    notes = [f"gates frozen at their mean over the recorded run: {gates}; they no longer follow the prompt or the step"]
    if mixture.mixing == "output":
        notes.append("the mixture mixed outputs of blocks; one LoRA can only sum updates of layers, an approximation")
    if bank.left_out:
        notes.append(f"merged without a gate: {name_some(bank.left_out, 3)}")
    return notes
