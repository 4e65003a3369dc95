"""Finding: one fault or risk of LoRAs, with the measured value, its threshold and a remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "not_finite",
    "overflow",
    "spike",
    "larger_than_weights",
    "wan_noise_halves",
    "base_models",
    "loudness",
    "duplicate",
    "contained",
    "opposed",
    "text_encoder_loud",
    "intruder",
    "dead",
    "rank_unused",
    "speed_up",
    "slider",
]
Level = Literal["fault", "warning", "note"]
Light = Literal["red", "yellow", "green"]

_FAULTS = ("not_finite", "overflow", "spike", "larger_than_weights", "wan_noise_halves", "base_models")
_NOTES = ("intruder", "dead", "rank_unused", "speed_up", "slider")
_LEVELS: tuple[Level, ...] = ("fault", "warning", "note")
_LIGHTS: dict[Level, Light] = {"fault": "red", "warning": "yellow", "note": "green"}


@dataclass(frozen=True)
class Finding:
    """One fault or risk.

    Args:
        kind: What was found.
        loras: Labels of the LoRAs that it is about; of a pair the first is the one that the sentence begins with.
        layers: Names of the layers where it was found; empty if it is about whole LoRAs.
        value: The measured value. threshold: The value from which on it is reported.
        text: One sentence with the value and the threshold.
        remedy: What to do about it, for ``to do: ..``.
    """

    kind: Kind
    loras: tuple[str, ...]
    layers: tuple[str, ...]
    value: float
    threshold: float
    text: str
    remedy: str

    @property
    def level(self) -> Level:
        """``fault``: the result is likely to be broken. ``warning``: a LoRA may be lost. ``note``: good to know."""
        return "fault" if self.kind in _FAULTS else "note" if self.kind in _NOTES else "warning"

    @property
    def line(self) -> str:
        """Level, sentence and remedy in one line."""
        return f"{self.level}: {self.text}. To do: {self.remedy}."


def most_severe_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Sort findings by level; within a level the order stays."""
    return tuple(sorted(findings, key=lambda finding: _LEVELS.index(finding.level)))


def lights(labels: Sequence[str], findings: Sequence[Finding]) -> list[tuple[str, Light, str]]:
    """Return a traffic light per LoRA: its label, the colour, and the sentence of its most severe finding.

    Args:
        labels: Labels of the LoRAs.
        findings: Their findings.
    """
    rows: list[tuple[str, Light, str]] = []
    for label in labels:
        about = most_severe_first([finding for finding in findings if label in finding.loras])
        rows.append((label, _LIGHTS[about[0].level], about[0].text) if about else (label, "green", "nothing found"))
    return rows


def largest_first(values: Mapping[str, float], threshold: float) -> list[str]:
    """The names whose values are at least `threshold`, the largest first."""
    return sorted((name for name, value in values.items() if value >= threshold), key=lambda name: -values[name])
