"""Write the comparison to files: ``results.json``, ``table.md`` and ``plot.png``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..common import write
from .cases import CASES

_OURS = "legomole-lego"
_FLOOR = "floor"
_INERTIA = "inertia.json"


@dataclass(frozen=True)
class Row:
    """Result of one tool on one case.

    Args:
        seconds: Median of the rounds.
        peak_mb: Peak memory of the process without pages of mapped files.
        extrapolated: Whether the time is extrapolated from one layer of every shape.
    """

    case: str
    tool: str
    seconds: float
    peak_mb: float
    extrapolated: bool


@dataclass
class Results:
    """All results of one machine.

    Args:
        machine: Description of the machine.
        rows: Results by case and tool.
        inertia: Case -> ratio of our clusters' inertia to scikit-learn's, on the same units.
    """

    machine: str
    rows: list[Row] = field(default_factory=list)
    inertia: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, out: Path, machine: str) -> Results:
        """Read the results in a folder, if they were measured on this machine."""
        results = cls(machine)
        if (out / "results.json").exists():
            data = json.loads((out / "results.json").read_text())
            if data["machine"] == machine:
                results.rows = [Row(**row) for row in data["rows"]]
                results.inertia = json.loads((out / _INERTIA).read_text())
        return results

    def replace(self, case: str, rows: Sequence[Row], inertia: float | None) -> None:
        """Replace all rows of a case, because only times of one run are comparable."""
        rows = [row for row in self.rows if row.case != case] + list(rows)
        self.rows = sorted(rows, key=lambda row: list(CASES).index(row.case))  # tools stay in their order
        if inertia is not None:
            self.inertia[case] = inertia

    def publish(self, out: Path) -> None:
        write(out / "results.json", {"machine": self.machine, "rows": [asdict(row) for row in self.rows]})
        write(out / _INERTIA, self.inertia)
        write(out / "table.md", self.table())
        self._plot(out / "plot.png")

    def table(self) -> str:
        """Return Markdown tables, one per case, with ratios to the floor and to `legomole-lego`."""
        parts = [self.machine]
        for case, rows in self._cases().items():
            seconds = {row.tool: row.seconds for row in rows}
            lines = [
                f"## {case}",
                "",
                "| | seconds | floor = 1 | legomole-lego = 1 | own memory, MB |",
                "|---|---|---|---|---|",
            ]
            for row in rows:
                ratios = [f"{row.seconds / seconds[by]:.3g}" if by in seconds else "" for by in (_FLOOR, _OURS)]
                name = f"{row.tool} (extrapolated)" if row.extrapolated else row.tool
                lines.append(f"| {name} | {row.seconds:.3g} | {ratios[0]} | {ratios[1]} | {row.peak_mb:.0f} |")
            if case in self.inertia:
                lines += ["", f"Inertia of our clusters, scikit-learn's with n_init=10 as 1: {self.inertia[case]:.4f}"]
            parts.append("\n".join(lines))
        return "\n\n".join(parts)

    def _cases(self) -> dict[str, list[Row]]:
        return {case: [r for r in self.rows if r.case == case] for case in dict.fromkeys(r.case for r in self.rows)}

    def _plot(self, path: Path) -> None:
        """Plot the seconds, one panel per case; open bars are extrapolated."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot as plt

        cases = self._cases()
        figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 4.2), squeeze=False)
        for axis, (case, rows) in zip(axes[0], cases.items(), strict=True):
            for i, row in enumerate(reversed(rows)):
                color = "C0" if row.tool.startswith("legomole") else "C7" if row.tool == _FLOOR else "C1"
                axis.barh(i, row.seconds, fill=not row.extrapolated, edgecolor=color, color=color)
            axis.set_yticks(range(len(rows)), [row.tool for row in reversed(rows)], fontsize=8)
            axis.set(xscale="log", xlabel="seconds", title=case)
        figure.tight_layout()
        figure.savefig(path, dpi=100)
        plt.close(figure)
