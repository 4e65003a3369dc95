"""The page on language models, carried out from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import legomole
import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from .test_docs import blocks, merge  # noqa: E402


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the libraries' own
def test_the_page_works_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged folder acts as our deltas added to the base model's weights by hand."""
    monkeypatch.chdir(tmp_path)
    make, use = blocks("llm.md", "python")
    (commands,) = blocks("llm.md", "sh")
    names: dict[str, Any] = {}
    exec(make, names)
    for command in commands.splitlines():
        merge(command)
    exec(use, names)

    merged = legomole.load("merged")
    config = json.loads(Path("merged/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("base", 8, 8)
    assert config["rank_pattern"] == {}
    assert config["target_modules"] == sorted(merged.modules)
    kinds = {name.rsplit(".", 1)[1] for name in merged.modules}
    assert (len(merged.modules), kinds) == (6, {"q_proj", "v_proj", "up_proj"})
    base = names["LlamaForCausalLM"].from_pretrained("base")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = base(ids).logits
        for name, part in merged.modules.items():
            base.get_submodule(name).weight += part.delta()
        torch.testing.assert_close(names["logits"], base(ids).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(names["model"](ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5)
    assert (names["logits"] - before).abs().max() > 1e-2
