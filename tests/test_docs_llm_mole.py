"""The page on mixing LLM adapters, carried out from top to bottom as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

import legomole
from legomole.core.mole.trained import TrainedGates

from .test_docs import blocks, merge


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the libraries' own
def test_the_page_works_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("llm_mole.md", "python"):
        exec(block, names)
    said = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    summed, alone, gated = (eval(said[k]) for k in ("both, untrained gates", "up alone", "both, trained gates"))
    assert alone == [10, 0]
    assert gated == [10, 10]
    assert sum(summed) < 10
    assert TrainedGates.load("gates.safetensors").training["texts"] == [5, 5, 0]
    merge("legomole inspect gates.safetensors")
    frozen = legomole.load("frozen")
    from peft import PeftModel

    model = PeftModel.from_pretrained(names["base"](), "frozen").eval()
    assert names["right"](model) != gated
    module, scope = next((m, s) for s in names["record"].scopes for m in frozen.modules if m.startswith(s))
    mean = names["record"].mean()[scope]
    expected = sum(float(mean[i]) * e.modules[module].delta() for i, e in enumerate(names["mixture"].experts))
    assert float((frozen.modules[module].delta() - expected).abs().max()) < 1e-4
