"""Statistics measured on a diffusers pipeline: their module names, layers and values."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.rank import Rank
from legomole.core.train.measure import CalibrationSettings
from legomole.hosts.diffusers.calibration import calibrate_pipeline
from legomole.hosts.diffusers.layer_names import key_map, to_kohya

from . import tiny_pipelines as tiny

# deprecations inside the libraries
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")

SMALL = CalibrationSettings(samples=2, mode="thorough")
CONCEPTS = [["ember"], ["heart"]]


def measured(pipe, *loras: Adapter, settings: CalibrationSettings = SMALL):
    return calibrate_pipeline(pipe, loras, CONCEPTS[: len(loras)], settings=settings, size=(16, 16))


@pytest.mark.parametrize("mode", ["light", "thorough"])
@pytest.mark.parametrize("kind", ["SD 1.5", "Flux"])
def test_every_layer_of_the_merge_is_measured(kind, mode):
    pipe = tiny.build(kind)
    before = {name: p.clone() for name, p in tiny_model(pipe).state_dict().items()}
    loras = [tiny.lora(pipe, 1), tiny.lora(pipe, 2)]
    statistics = measured(pipe, *loras, settings=CalibrationSettings(samples=2, mode=mode, width=4))
    assert any(moments.light for moments in statistics.modules.values()) == (mode == "light")
    merged = merge(loras, Calibrated(Rank(2), statistics))
    assert not [note for note in merged.report.notes if "no statistics" in note]
    for name, part in merged.adapter.modules.items():
        moments = statistics.modules[name]
        assert moments.d_in == part.d_in
        assert set(moments.own) == {0, 1}
        assert set(moments.joint) == {(0, 1)}
        for C in moments.moments():  # second moments: symmetric, no negative eigenvalue
            assert torch.equal(C, C.mT)
            assert torch.linalg.eigvalsh(C.double()).min() > -1e-5 * C.abs().max()
    assert all(torch.equal(before[name], p) for name, p in tiny_model(pipe).state_dict().items())


def test_files_of_two_dialects_are_measured_under_their_merged_names():
    pipe = tiny.build("SD 1.5")
    kohya, diffusers = to_kohya(tiny.lora(pipe, 1)), tiny.lora(pipe, 2)
    statistics = measured(pipe, kohya, diffusers)
    from legomole.core.layers.align import align

    names = {name for adapter in align([kohya, diffusers], key_map=key_map) for name in adapter.modules}
    assert set(statistics.modules) == names


def test_kohya_names_are_kept_where_all_files_have_them():
    pipe = tiny.build("SD 1.5")
    statistics = measured(pipe, to_kohya(tiny.lora(pipe, 1)), to_kohya(tiny.lora(pipe, 2)))
    assert all(name.startswith("lora_unet_") for name in statistics.modules)


def test_adapters_of_another_model_are_refused():
    pipe = tiny.build("SD 1.5")
    with pytest.raises(MergeError, match="another base model"):
        measured(pipe, tiny.lora(tiny.build("Flux"), 1))


def test_words_are_needed_for_every_lora():
    pipe = tiny.build("SD 1.5")
    with pytest.raises(MergeError):
        calibrate_pipeline(pipe, [tiny.lora(pipe, 1), tiny.lora(pipe, 2)], CONCEPTS[:1], settings=SMALL)


def tiny_model(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet
