"""``python -m benchmarks.gates``, from the project's root: how gates that read the text follow prompts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from legomole.core.formats import load
from legomole.core.mole.gates import GateSet
from legomole.core.mole.trained import TrainedGates
from legomole.nano.demo import STYLE, SUBJECT
from legomole.nano.store import Store

from . import report, synonyms, tags
from .encoders import MiniLM, Nano
from .measure import Row, mean_gates, measure, token_gates
from .prompts import NANO_PAIRS, PAIRS

_HERE = Path(__file__).parent
_BEGAN = time.monotonic()
_PARTS = ("minilm", "nano", "pictures")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="default: all")
    parser.add_argument("--out", type=Path, default=_HERE, help="folder for results.json, table.md and tags.png")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    chosen.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    mean_rows: list[Row] = []
    words, shut = [], {}
    if "minilm" in chosen.parts:
        encoder = MiniLM()
        for pair in PAIRS:
            say(f"minilm: {pair.subject}, {pair.style}")
            names = [[pair.subject], [pair.style]]
            rows += measure("minilm", encoder, pair, token_gates(encoder, names))
            mean_rows += measure("minilm", encoder, pair, mean_gates(encoder, names))
        say("minilm: words that are not listed")
        words, shut = synonyms.measure(encoder)
    if "nano" in chosen.parts:
        small = Nano()
        for pair in NANO_PAIRS:
            say(f"nano: {pair.subject}, {pair.style}")
            names = [[pair.subject], [pair.style]]
            gates = shipped_gates() if (pair.subject, pair.style) == (SUBJECT, STYLE) else token_gates(small, names)
            rows += measure("nano", small, pair, gates)
            mean_rows += measure("nano", small, pair, mean_gates(small, names))
    if rows:
        report.write(chosen.out, rows, mean_rows, words, shut)
        print((chosen.out / "table.md").read_text())
    if "pictures" in chosen.parts:
        say("nano: pictures")
        store = Store()
        columns = tags.columns(store, tags.mixtures(store))
        tags.sheet(columns).quantize(256).save(chosen.out / "tags.png", optimize=True)


def shipped_gates() -> GateSet:
    """The trained gates of the demo's two LoRAs."""
    store = Store()
    loras = [load(store.lora(concept)) for concept in (SUBJECT, STYLE)]
    return TrainedGates.load(store.folder / "gates.safetensors").of(loras)


def say(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:4.0f} s] {text}", flush=True)


if __name__ == "__main__":
    main()
