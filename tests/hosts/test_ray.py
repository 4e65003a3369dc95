"""A merge on a Ray cluster of two workers writes the same bytes as in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="legomole[ray] is not installed: merging on a cluster is NOT TESTED")

from legomole.cli import app  # noqa: E402
from legomole.core.adapter import Adapter  # noqa: E402
from legomole.core.errors import FormatError, MergeError  # noqa: E402
from legomole.core.formats import load, save  # noqa: E402
from legomole.core.lowrank import LowRank  # noqa: E402
from legomole.core.merge.engine import merge  # noqa: E402
from legomole.core.merge.merged import Merged  # noqa: E402
from legomole.core.merge.methods import METHODS  # noqa: E402
from legomole.core.merge.pool import Pool  # noqa: E402
from legomole.core.recipes.remote import RemoteInputs  # noqa: E402
from legomole.hosts.ray import ray_runner  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

SHAPES = [(5, 6), (7, 6), (5, 9)]
NAMES = [f"model.layers.{i}.{kind}_proj" for i in range(4) for kind in "qkv"]


@pytest.fixture(scope="module", autouse=True)
def connected() -> Iterator[None]:
    """A cluster of two workers on this machine, which import the package from the same place as this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", partial(ray.init, num_cpus=2))
        with ray_runner("local"):
            yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three PEFT adapters, the first without its last layers."""
    monkeypatch.chdir(tmp_path)
    paths: list[Path] = []
    for i, rank in enumerate((4, 2, 3)):
        g = torch.Generator().manual_seed(i)
        modules = {
            name: LowRank(torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g), 2.0 * rank)
            for name, (d_out, d_in) in zip(NAMES[: 9 if i == 0 else 12], SHAPES * 4, strict=False)
        }
        paths.append(save(Adapter(modules), Path(f"adapter{i}"), format="peft"))
    return paths


def remote_inputs(paths: list[Path]) -> RemoteInputs:
    return RemoteInputs.of([load(path) for path in paths], [path.absolute() for path in paths], None, None)


def arguments(paths: list[Path], *more: str) -> list[str]:
    return ["merge", *map(str, paths), *more]


def succeed(*texts: str) -> None:
    result = CliRunner().invoke(app, list(texts))
    assert result.exit_code == 0, result.output


@dataclass(frozen=True)
class Logged:
    """A method that names its process in a remark, and touches a file per module."""

    batch: ClassVar[int] = 1

    folder: Path
    fault: str = ""

    def __call__(self, pool: Pool) -> Merged:
        (self.folder / pool.names[0]).touch()
        if self.fault and pool.names[0] == self.fault:
            raise ZeroDivisionError(pool.names[0])
        return replace(METHODS["concat"]()(pool), remarks={pool.names[0]: f"in process {os.getpid()}"})


@dataclass(frozen=True)
class Slow(Logged):
    def __call__(self, pool: Pool) -> Merged:
        time.sleep(0.3)
        return super().__call__(pool)


@pytest.mark.parametrize("method", ["lego", "svd", "ties"])
def test_the_bytes_are_those_of_one_process(method: str, adapters: list[Path]) -> None:
    more = ("--method", method, "--rank", "3", "--module-weight", "2:*q_proj=0.5")
    succeed(*arguments(adapters, *more, "-o", "here"))
    succeed(*arguments(adapters, *more, "-o", "there", "--ray", "auto"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("there", name).read_bytes() == Path("here", name).read_bytes()
    assert {part.rank for part in load("there").modules.values()} == {3}


def test_workers_merge_and_progress_is_reported(tmp_path: Path, adapters: list[Path]) -> None:
    loaded, calls = [load(path) for path in adapters], []
    with ray_runner("auto") as runner:
        result = merge(
            loaded,
            Logged(tmp_path),
            each=partial(runner, remote_inputs(adapters)),
            progress=lambda *call: calls.append(call),
        )
    assert [(n, total) for n, total, _ in calls] == [(n, 12) for n in range(1, 13)]
    notes = " ".join(result.report.notes)
    assert "in process" in notes
    assert f"in process {os.getpid()}:" not in notes
    for name, part in merge(loaded, METHODS["concat"]()).adapter.modules.items():
        assert torch.equal(result.adapter.modules[name].A, part.A)


def test_only_json_is_printed(adapters: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Ray would write to the process's streams, past Python's."""
    result = CliRunner().invoke(app, arguments(adapters, "--rank", "3", "--json", "-o", "there", "--ray", "auto"))
    assert json.loads(result.stdout)["output"] == "there"
    assert (result.stderr, *capfd.readouterr()) == ("", "", "")


def test_an_address_without_a_cluster(adapters: list[Path]) -> None:
    """In a new process, because this one is connected already."""
    more = arguments(adapters, "--rank", "3", "--json", "-o", "there", "--ray", "nowhere")
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "legomole", *more], capture_output=True, text=True, env=env, check=False
    )
    assert ran.returncode == 3, ran.stdout + ran.stderr
    assert json.loads(ran.stdout)["error"]["found"].startswith("nowhere: ")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("method", "factor", "problem"),
    [
        (("concat", "--dtype", "float16"), "1e12", "overflow"),
        (("svd", "--rank", "3"), "1e300", "too large or too small to be decomposed"),
    ],
)
def test_an_error_in_a_worker_is_reported_as_in_one_process(
    method: tuple[str, ...], factor: str, problem: str, adapters: list[Path]
) -> None:
    more = ("--method", *method, "--module-weight", f"1:model.layers.1.k_proj={factor}", "-o", "out")
    outputs = []
    for option in ((), ("--ray", "auto")):
        result = CliRunner().invoke(app, [*arguments(adapters, *more, "--json"), *option])
        assert result.exit_code == 3
        outputs.append(json.loads(result.stdout))
    assert outputs[0] == outputs[1]
    assert "model.layers.1.k_proj" in outputs[1]["error"]["module"]
    assert problem in outputs[1]["error"]["problem"]
    assert not Path("out").exists()


def test_a_bug_in_a_worker_is_not_reported_as_a_cluster_error(tmp_path: Path, adapters: list[Path]) -> None:
    loaded, method = [load(path) for path in adapters], Logged(tmp_path, NAMES[3])
    with ray_runner("auto") as runner, pytest.raises(ZeroDivisionError, match=NAMES[3]):
        merge(loaded, method, each=partial(runner, remote_inputs(adapters)))


def test_a_worker_that_sees_another_file_reports_it(adapters: list[Path]) -> None:
    loaded, inputs = [load(path) for path in adapters], remote_inputs(adapters)
    changed = Adapter({n: LowRank(p.A, 2 * p.B, p.alpha) for n, p in loaded[1].modules.items()})
    save(changed, adapters[1], format="peft")
    with ray_runner("auto") as runner, pytest.raises(FormatError, match="another file") as caught:
        merge(loaded, METHODS["concat"](), each=partial(runner, inputs))
    assert caught.value.file == str(adapters[1].absolute())
    assert "share" in str(caught.value.remedy)


def test_cancelling_drops_pending_tasks(tmp_path: Path, adapters: list[Path]) -> None:
    """Cancelled after the first of 12 tasks: only tasks that were running by then finish."""
    touched = tmp_path / "touched"
    touched.mkdir()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    loaded, inputs = [load(path) for path in adapters], remote_inputs(adapters)
    with pytest.raises(KeyboardInterrupt), ray_runner("auto") as runner:
        merge(loaded, Slow(touched), each=partial(runner, inputs), progress=stop)
    ray.get(ray.remote(num_cpus=2)(lambda: None).remote())  # runs after all tasks that are left
    assert 1 <= len(list(touched.iterdir())) < 12


def test_more_threads_than_any_machine_has_cpus(monkeypatch: pytest.MonkeyPatch, adapters: list[Path]) -> None:
    """Ray would keep such tasks waiting forever."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with ray_runner("auto") as runner, pytest.raises(MergeError, match="OMP_NUM_THREADS=2"):
        merge([load(path) for path in adapters], METHODS["concat"](), each=partial(runner, remote_inputs(adapters)))
