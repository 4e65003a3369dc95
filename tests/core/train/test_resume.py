"""Interrupted fits: by exceptions, by a kill, and with damaged or other files in the folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import legomole
import pytest
import torch
from legomole.core.errors import FormatError
from legomole.core.formats.files import read_tensors, write_tensors
from legomole.core.train.fit import FitRecord, fit
from legomole.core.train.objectives import Regression
from torch import Tensor

from .toy import SETTINGS, Stop, equal, stopping


class TestResume:
    @pytest.mark.parametrize("at", [1, 7, 12])
    def test_after_an_exception_at_any_step(self, plain, at, tmp_path: Path):
        whole, run = plain.trained()
        with pytest.raises(Stop):
            plain.trained(folder=tmp_path, key="k", progress=stopping(at))
        resumed, again = plain.trained(folder=tmp_path, key="k")
        assert equal(resumed, whole)
        assert (again.losses, again.entropies) == (run.losses, run.entropies)

    def test_after_two_exceptions_with_another_kind_of_gate(self, plain, tmp_path: Path):
        kw = {"folder": tmp_path / "new" / "folder", "key": "k", "reads": "experts"}
        whole, _ = plain.trained(reads="experts")
        for at in (3, 4):
            with pytest.raises(Stop):
                plain.trained(progress=stopping(at), **kw)
        assert equal(plain.trained(**kw)[0], whole)

    def test_an_error_of_the_model_costs_no_step(self, plain, tmp_path: Path):
        class Failing(Regression):
            calls = 0

            def loss(self, indices: Sequence[int]) -> Tensor:
                self.calls += 1
                if self.calls == 6:
                    raise MemoryError
                return super().loss(indices)

        whole, _ = plain.trained()
        with plain.attached() as (at, objective), pytest.raises(MemoryError):
            fit(at, Failing(objective.denoiser, objective.examples), SETTINGS, folder=tmp_path, key="k")
        done: list[int] = []
        found, _ = plain.trained(folder=tmp_path, key="k", progress=lambda done_, *_: done.append(done_))
        assert done[0] == 6
        assert equal(found, whole)

    def test_killed(self, plain, tmp_path: Path):
        """A killed process: the fit continues from the last state that was saved."""
        settings = SETTINGS.model_copy(update={"steps": 30})
        root = Path(legomole.__file__).parent
        code = (
            f"import os, signal, sys; sys.path.append({str(root)!r})\n"
            "import torch; torch.set_num_threads(1)\n"
            "from pathlib import Path\n"
            "from tests.core.train.toy import SETTINGS, toy\n"
            "def kill(done, total, what):\n"
            "    if done == 27: os.kill(os.getpid(), signal.SIGKILL)\n"
            "longer = SETTINGS.model_copy(update={'steps': 30})\n"
            "toy().trained(longer, folder=Path(sys.argv[1]), key='k', progress=kill)\n"
        )
        env = os.environ | {"PYTHONSAFEPATH": "1"}
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        steps: list[int] = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found, run = plain.trained(settings, folder=tmp_path, key="k", progress=lambda d, *_: steps.append(d))
            whole, uninterrupted = plain.trained(settings)
        finally:
            torch.set_num_threads(threads)
        assert steps == [26, 27, 28, 29, 30]
        assert equal(found, whole)
        assert run.losses == uninterrupted.losses

    def test_the_record_is_filled_after_a_cancel_too(self, plain):
        run = FitRecord()
        with pytest.raises(Stop):
            plain.trained(progress=stopping(5), record=run)
        assert len(run.losses) == 5

    def test_another_training_in_the_folder(self, plain, tmp_path: Path):
        with pytest.raises(Stop):
            plain.trained(folder=tmp_path, key="k", progress=stopping(3))
        before = (tmp_path / "state.safetensors").read_bytes()
        with pytest.raises(FormatError, match=r"another training[\s\S]*state\.safetensors[\s\S]*other[\s\S]*found: +k"):
            plain.trained(folder=tmp_path, key="other")
        assert (tmp_path / "state.safetensors").read_bytes() == before

    def test_a_damaged_state(self, plain, tmp_path: Path):
        path = tmp_path / "state.safetensors"
        with pytest.raises(Stop):
            plain.trained(folder=tmp_path, key="k", progress=stopping(3))
        sound = path.read_bytes()
        path.write_bytes(sound[:-20])
        with pytest.raises(FormatError, match=r"cut off[\s\S]*state\.safetensors[\s\S]*start again"):
            plain.trained(folder=tmp_path, key="k")
        path.write_bytes(b"not a file of ours")
        with pytest.raises(FormatError, match=r"state\.safetensors[\s\S]*start again"):
            plain.trained(folder=tmp_path, key="k")
        path.write_bytes(sound)
        tensors, header = read_tensors(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        for changed, message in (
            ((tensors, header | {"run": "{"}), "Expecting"),
            ((tensors, header | {"run": "[1]"}), "indices"),
            ((tensors | {"0/value": torch.zeros(7)}, header), "size"),
            (({n: t for n, t in tensors.items() if n != "0/value"}, header), "0/value"),
            ((tensors | {"0/value": tensors["0/value"][None]}, header), "size"),
            ((tensors | {"0/exp_avg": torch.zeros(7)}, header), "size"),
            (({n: t for n, t in tensors.items() if n != "0/exp_avg"}, header), "size or kind"),
            ((tensors, header | {"run": '{"losses": ["x"], "entropies": []}'}), "could not convert"),
            ((tensors, header | {"run": "[" * 10_000}), "levels deep"),
        ):
            write_tensors(path, *changed)
            with pytest.raises(FormatError, match=rf"cannot be resumed[\s\S]*{message}[\s\S]*start again"):
                plain.trained(folder=tmp_path, key="k")
