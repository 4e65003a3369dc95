"""A folder of untrained weights with the layout of the shipped one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import save
from legomole.core.lowrank import LowRank
from legomole.nano import model, oracle, vae
from legomole.nano.comfyui import CONCEPTS
from legomole.nano.store import Store
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Seeded weights of every model, in float16, and a LoRA per concept."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("weights")
    (folder / "loras").mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, module in {"base": model.build(), "vae": vae.build(), "oracle": oracle.Oracle()}.items():
            state = module.state_dict()
            halves = {n: w.half() if w.is_floating_point() else w for n, w in state.items()}
            save_file(halves, folder / f"{name}.safetensors")
    store = Store(folder)
    for seed, concept in enumerate(CONCEPTS):
        save(_lora(seed), store.lora(concept), format="diffusers")
    return store


def _lora(seed: int) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    names = [f"transformer.transformer_blocks.{i}.attn.{kind}" for i in range(3) for kind in ("to_q", "to_v")]
    return Adapter({
        name: LowRank(torch.randn(4, 192, generator=rng), 0.1 * torch.randn(192, 4, generator=rng)) for name in names
    })  # fmt: skip


@pytest.fixture
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
