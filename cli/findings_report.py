"""Findings of LoRAs for `legomole inspect` and `legomole merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from .console import clean, out

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.merge.findings.finding import Finding
    from ..core.merge.report import MergeReport


def findings_of(adapters: Sequence[Adapter], report: MergeReport, base: str | None) -> Sequence[Finding]:
    """The findings of a report, and those that need the base model, if one is given.

    Args:
        adapters: The adapters of the report. report: A report at weights of 1.
        base: Path of the base model.

    Raises:
        FormatError: The base model has no weight for a layer.
    """
    if base is None:
        return report.findings
    from ..core.formats import BaseWeights
    from ..core.merge.findings.base import findings_with_base
    from ..core.merge.findings.finding import most_severe_first

    merged = {module.name for module in report.modules}
    weights = [{name: float(name in merged) for name in adapter.modules} for adapter in adapters]
    return most_severe_first([*report.findings, *findings_with_base(adapters, weights, BaseWeights(Path(base)))])


def print_findings(labels: Sequence[str], findings: Sequence[Finding]) -> None:
    """Print a traffic light per LoRA, and every finding with what to do."""
    from ..core.merge.findings.finding import lights

    for label, light, _ in lights(labels, findings):
        out().print(Text("● ", style=light).append(clean(f"{label}: {light}"), style="default"))
    for finding in findings:
        out().print(clean(f"  {finding.line}"), markup=False)
    if not findings:
        out().print("no findings", markup=False)
