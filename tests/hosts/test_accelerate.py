"""Two processes that share every batch train the same gates as one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from legomole.core.mole.trained import TrainedGates
from legomole.core.train.fit import Devices

# Trains gates on a toy network with conditioning per prompt, alone or as one of several processes. Then also on a toy
# language model with the interface that `train_gates` needs, once whole and once sharded.
SCRIPT = """
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from legomole.core.adapter import Adapter
from legomole.core.mole.attach import attach
from legomole.core.lowrank import LowRank
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import FitSettings, TrainSettings, prompts_for, train
from legomole.hosts.transformers.training import train_gates

out, alone = Path(sys.argv[1]), sys.argv[2] == "alone"
devices = None
if not alone:
    from legomole.hosts.accelerate import AcceleratorDevices

    devices = AcceleratorDevices.launched(cpu=True)
    assert devices is not None and devices.world == 2
    print(f"rank {devices.rank}", devices.mean(torch.tensor([1.0 + devices.rank])).item())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(2)])

    def forward(self, x, context):
        x = x + context.mean(1)[:, None]
        for block in self.blocks:
            x = x + block(x)
        return x


words = [["style"], ["subject"]]
prompts = prompts_for(words)
g = torch.Generator().manual_seed(0)
conditioning = torch.randn(len(prompts), 3, 6, generator=g)


def lora():
    names = [f"blocks.{b}.{i}" for b in (0, 1) for i in (0, 2)]
    return Adapter({n: LowRank(torch.randn(2, 6, generator=g), torch.randn(6, 2, generator=g)) for n in names})


torch.manual_seed(0)
model = Net().requires_grad_(False)


class Denoiser:
    def sample(self, prompts, seed):
        x = torch.randn(len(prompts), 4, 6, generator=torch.Generator().manual_seed(seed))
        return x - 0.1 * model(x, conditioning[prompts])

    def noised(self, latents, t, noise):
        return torch.lerp(latents, noise, t.view(-1, 1, 1))

    def predict(self, noisy, t, prompts):
        return model(noisy, conditioning[prompts])


mixture = Mixture((lora(), lora()))
settings = TrainSettings(steps=30, batch=9, accumulation=2, examples=32, samples=16, warmup=2)
written = []
folder = out / ("alone" if alone else f"state{devices.rank}")  # per process, to see which process writes


def progress(done, total, what):
    if done == 28 and what.startswith("loss"):
        written.extend(path.name for path in folder.glob("*") if path.is_file())


with attach(model, mixture) as attachment:
    result = train(
        attachment, mixture, Denoiser(), prompts, words, settings, folder=folder, devices=devices, progress=progress
    )
name = "alone" if alone else f"rank{devices.rank}"
result.gates.save(out / f"{name}.safetensors")
(out / f"{name}.txt").write_text(" ".join(sorted(written)))


class Language(Net):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 6), nn.Linear(6, 12)

    def can_generate(self):
        return True

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask, use_cache):
        x = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(super().forward(x, torch.zeros(len(x), 1, 6))))


torch.manual_seed(0)
model = Language().requires_grad_(False)
mixture = Mixture((lora(), lora()), GateSet(2, GateSettings(reads="hidden", granularity="block")))
pairs = [(torch.randint(12, (2 + i % 3,), generator=g), torch.randint(12, (3,), generator=g)) for i in range(9)]
settings = FitSettings(steps=6, batch=5, accumulation=2, warmup=0, learning_rate=0.05)
result = train_gates(model, mixture, [pairs[:4], pairs[4:7]], None, settings, others=pairs[7:], devices=devices)
result.gates.save(out / f"{name}.text.safetensors")

if devices is not None:  # again, with half of every weight in each process
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    assert model.blocks[0][0].weight.to_local().shape == (3, 6)
result = train_gates(model, mixture, [pairs[:4], pairs[4:7]], None, settings, others=pairs[7:], devices=devices)
result.gates.save(out / f"{name}.sharded.safetensors")
if devices is not None:
    devices.accelerator.end_training()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_train_the_same_gates_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    env = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path), "together"]
    running = [
        subprocess.Popen(command, env=env | {"RANK": rank, "LOCAL_RANK": rank}, stdout=-1, stderr=-1, text=True)
        for rank in ("0", "1")
    ]
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path), "alone"])
    exec(SCRIPT, {})
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert [text for text, _ in outputs] == ["rank 0 1.5\n", "rank 1 1.5\n"]

    for kind in ("", ".text", ".sharded"):
        names = (f"{name}{kind}.safetensors" for name in ("alone", "rank0", "rank1"))
        alone, *ranks = (TrainedGates.load(tmp_path / name) for name in names)
        moved = torch.stack([alone.gates[scope].weight.abs().max() for scope in alone.gates.names])
        assert float(moved.detach().max()) > 0.05
        for other in ranks:
            torch.testing.assert_close(
                torch.tensor(other.training["losses"]), torch.tensor(alone.training["losses"]), rtol=1e-5, atol=1e-6
            )
            for scope in alone.gates.names:
                pairs = zip(other.gates[scope].parameters(), alone.gates[scope].parameters(), strict=True)
                for found, expected in pairs:
                    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # only the first process writes examples and state
    assert (tmp_path / "rank0.txt").read_text() == "examples.safetensors state.safetensors"
    assert (tmp_path / "alone.txt").read_text() == "examples.safetensors state.safetensors"
    assert (tmp_path / "rank1.txt").read_text() == ""
    assert not (tmp_path / "state1").exists()


def test_a_single_process_has_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from legomole.hosts.accelerate import AcceleratorDevices

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert AcceleratorDevices.launched() is None
    assert set(Devices.__annotations__) == {"rank", "world"}
