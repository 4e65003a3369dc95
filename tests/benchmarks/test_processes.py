"""Benchmarks that run in several processes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # benchmarks are not in the package; last, so that nothing is shadowed
    sys.path.append(str(ROOT))

from benchmarks import processes  # noqa: E402
from benchmarks.nano import train  # noqa: E402
from benchmarks.nano.data import Examples  # noqa: E402


def _training(path: Path) -> tuple[object, ...]:
    """Return a small training and its arguments, which other processes can unpickle without this module."""
    latents = torch.randn(6, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    data = Examples(latents, tuple(("star", "flat") for _ in range(6)))
    options = {"batch": 4, "say": print, "every": 2}
    return train.stage, path, print, partial(train.resumable_base, path.with_suffix(".state"), data, 3, **options)


def test_two_processes_train_the_weights_of_one(tmp_path):
    paths = {count: tmp_path / f"{count}.safetensors" for count in (1, 2)}
    for count, path in paths.items():
        processes.together(count, *_training(path))
    expected, weights = (load_file(path) for path in paths.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-4, rtol=2e-3)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("count", [1, 2])
def test_independent_jobs_all_run_and_errors_are_raised(tmp_path, count):
    folders = [tmp_path / name for name in "ab"]
    processes.apart(count, Path.mkdir, folders)
    assert all(folder.is_dir() for folder in folders)
    with pytest.raises(FileExistsError):
        processes.apart(count, Path.mkdir, [*folders, tmp_path / "c"])


def test_without_other_processes_a_batch_is_whole():
    batch = [torch.arange(4), torch.ones(4, 2)]
    assert all(part is not None and part.equal(x) for part, x in zip(processes.own_share(batch), batch, strict=True))
    assert processes.is_first()
