"""Trained gates as a file: bit-equal, matched by the LoRAs' hashes, and errors for other files."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.errors import FormatError, MergeError, SaveError
from legomole.core.formats.files import read_tensors, write_tensors
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.trained import Expert, TrainedGates

from ..merge.pools import close
from .kinds import READS
from .mixtures import Values, lora, random_detector, trained
from .models import FEATURES, InPlace, Transformer, call, inputs


def file_of(model: torch.nn.Module, seed: int, **kw) -> Adapter:
    """A LoRA from a file."""
    return lora(model, seed, source=Source(f"loras/{'abc'[seed]}.safetensors", f"{seed}" * 64, "kohya"), **kw)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(1)


@pytest.fixture(scope="module")
def experts(model) -> list[Adapter]:
    return [file_of(model, seed, rank=1 + seed) for seed in range(3)]


def made(model, experts, reads="experts", granularity="layer", activation="softmax", **kw) -> TrainedGates:
    settings = GateSettings(reads=reads, granularity=granularity, activation=activation, ceiling=2.0)
    mixture = trained(model, experts, settings)
    return TrainedGates(mixture.gates, tuple(map(Expert.of, experts)), "SDXL", {"steps": 3, "losses": [0.5, 0.1]}, **kw)


class TestRoundTrip:
    @pytest.mark.parametrize("reads", READS)
    @pytest.mark.parametrize("granularity", ["network", "layer"])
    def test_is_bit_equal(self, model, experts, reads, granularity, tmp_path):
        before = made(model, experts, reads, granularity)
        before.save(tmp_path / "g.safetensors")
        after = TrainedGates.load(tmp_path / "g.safetensors")
        assert after.experts == before.experts
        assert [expert.label for expert in after.experts] == ["a", "b", "c"]
        assert after.base == "SDXL"
        assert after.training == {"steps": 3, "losses": [0.5, 0.1]}
        assert after.gates.names == before.gates.names
        assert after.gates.settings == before.gates.settings
        for name in before.gates.names:
            one, other = before.gates[name], after.gates[name]
            assert one.layer == other.layer
            assert bool(one.layer) == (reads == "hidden")
            assert one.state_dict().keys() == other.state_dict().keys()
            assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in one.state_dict().items())
        detector, read = before.gates.detector, after.gates.detector
        assert (detector is None) == (read is None) == (reads != "text")
        if detector is not None and read is not None:
            assert read.words == detector.words == (("w0",), ("w1",), ("w2",))
            assert torch.equal(read.weight, detector.weight)
            assert torch.equal(read.bias, detector.bias)

    def test_words_of_all_kinds(self, model, experts, tmp_path):
        words = (("ember style", 'a "quoted" word'), (), ("猫", "café/(x)"))
        settings = GateSettings(granularity="network")
        gate = Gate(3, 3, settings, owner=torch.arange(3))
        gates = GateSet(3, settings, {"": gate}, random_detector(3, FEATURES, words=words))
        TrainedGates(gates, tuple(map(Expert.of, experts))).save(tmp_path / "g")
        read = TrainedGates.load(tmp_path / "g").gates.detector
        assert read is not None
        assert read.words == words

    def test_the_same_gates_give_the_same_bytes(self, model, experts, tmp_path):
        for name in ("a", "b"):
            made(model, experts).save(tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_may_be_saved_over_the_file_they_came_from(self, model, experts, tmp_path):
        path = tmp_path / "g.safetensors"
        made(model, experts).save(path)
        loaded, before = TrainedGates.load(path), path.read_bytes()
        loaded.save(path)
        assert path.read_bytes() == before

    def test_untrained_gates(self, experts, model, tmp_path):
        untrained = TrainedGates(Mixture(tuple(experts)).gates, tuple(map(Expert.of, experts)))
        untrained.save(tmp_path / "g")
        assert not TrainedGates.load(tmp_path / "g").gates.trained

    def test_the_record_cannot_be_changed(self, model, experts):
        with pytest.raises(TypeError):
            made(model, experts).training["steps"] = 4  # type: ignore[index]


class TestOf:
    @pytest.mark.parametrize("reads", READS)
    def test_reorders_by_hash(self, experts, reads):
        model = InPlace(1)
        experts = [file_of(model, seed, rank=1 + seed) for seed in range(3)]
        gates = made(model, experts, reads)
        x, text = inputs(model)
        with torch.no_grad():
            with attach(model, Mixture(tuple(experts), gates.of(experts, "SDXL"))):
                expected = call(model, x, text)
            for order in ([2, 0, 1], [1, 0, 2]):
                turned = [experts[i] for i in order]
                with attach(model, Mixture(tuple(turned), gates.of(turned))):
                    assert close(call(model, x, text), expected)

    def test_of_fewer_loras_is_a_mask(self, model, experts):
        gates, (x, text) = made(model, experts), inputs(model)
        left = [experts[2], experts[0]]
        with torch.no_grad():
            with attach(model, Mixture(tuple(experts), gates.gates).without(1)):
                expected = model(x, text)
            with attach(model, Mixture(tuple(left), gates.of(left))):
                assert close(model(x, text), expected)

    def test_unknown_loras(self, model, experts):
        foreign = lora(model, 5, source=Source("loras/other.safetensors", "f" * 64))
        with pytest.raises(
            MergeError, match=r"other LoRAs[\s\S]*loras/other[\s\S]*a \(0{12}\), b \(1{12}\)[\s\S]*\(f{12}\)"
        ):
            made(model, experts).of([experts[0], foreign])
        with pytest.raises(MergeError, match="other LoRAs"):
            made(model, experts).of([experts[0], experts[0]])

    def test_the_same_lora_twice(self, model, experts):
        twice = [experts[0], experts[0]]
        assert made(model, twice).of(twice).experts == 2

    def test_another_base(self, model, experts):
        gates = made(model, experts)
        with pytest.raises(MergeError, match=r"another kind of model[\s\S]*SDXL[\s\S]*Flux"):
            gates.of(experts, "Flux")
        assert gates.of(experts, "").experts == 3
        assert replace(gates, base="").of(experts, "Flux").experts == 3


def first_kind(trained_gates: TrainedGates, path: Path) -> Path:
    """Write a file as the first version did: gates that read ``text`` read its mean, and there is no detector."""
    tensors, header = trained_gates.to_tensors()
    settings = json.loads(header["settings"])
    settings["reads"] = settings["reads"].removesuffix("-mean")
    del header["words"]
    write_tensors(path, tensors, {**header, "kind": "legomole.gates.1", "settings": json.dumps(settings)})
    return path


class TestFirstKind:
    def test_gates_that_read_text_act_as_before(self, model, experts, tmp_path):
        before = made(model, experts, "text-mean", activation="sigmoid")
        after = TrainedGates.load(first_kind(before, tmp_path / "g.safetensors"))
        assert after.gates.settings.reads == "text-mean"
        assert after.gates.detector is None
        x, text = inputs(model)
        observed = Values()
        with torch.no_grad(), attach(model, Mixture(tuple(experts), after.of(experts))) as at, at.watch(observed):
            model(x, text)
        for scope, value in observed.values.items():
            assert torch.allclose(value, before.gates[scope](text.mean(1)), atol=1e-6)

    def test_gates_that_read_text_have_a_note(self, model, experts, tmp_path):
        after = TrainedGates.load(first_kind(made(model, experts, "text-mean"), tmp_path / "g"))
        (note,) = after.notes
        assert "read the mean of the text over all tokens and close when a prompt gets longer" in note
        assert "trained again" in note
        after.save(tmp_path / "again")  # as the present kind, with the same note
        again = TrainedGates.load(tmp_path / "again")
        assert again.gates.settings == after.gates.settings
        assert again.notes == after.notes

    @pytest.mark.parametrize("reads", ["hidden", "experts", "flat"])
    def test_other_gates_are_the_same(self, model, experts, reads, tmp_path):
        before = made(model, experts, reads)
        after = TrainedGates.load(first_kind(before, tmp_path / "g"))
        assert after.gates.settings == before.gates.settings
        assert after.notes == before.notes == ()
        for name in before.gates.names:
            one, other = before.gates[name].state_dict(), after.gates[name].state_dict()
            assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())

    def test_gates_that_read_token_by_token_have_no_note(self, model, experts):
        assert made(model, experts, "text").notes == ()


class TestHashes:
    def test_of_a_file(self, experts):
        assert Expert.of(experts[1]) == Expert(label="b", sha256="1" * 64)

    def test_without_a_file_the_factors_are_hashed(self, model):
        plain = lora(model, 0)
        sha = Expert.of(plain).sha256
        assert Expert.of(lora(model, 0)).sha256 == sha
        reordered = Adapter(dict(reversed(plain.modules.items())))
        assert Expert.of(reordered).sha256 == sha
        name, part = next(iter(plain.modules.items()))
        for changed in (
            Adapter({**plain.modules, name: replace(part, A=part.A * 1.001)}),
            Adapter({**plain.modules, name: replace(part, alpha=3.0)}),
            Adapter({**{n: p for n, p in plain.modules.items() if n != name}, name + "x": part}),
        ):
            assert Expert.of(changed).sha256 != sha

    def test_must_be_hexadecimal(self):
        with pytest.raises(ValueError, match="sha256"):
            Expert(label="a", sha256="none")


def damage(path: Path, tensors=None, drop=(), **header: str) -> Path:
    found, metadata = read_tensors(path)
    found = {k: v.clone() for k, v in found.items() if not k.endswith(tuple(drop) or ("\0",))} | (tensors or {})
    write_tensors(path, found, metadata | header)
    return path


class TestBadFiles:
    @pytest.fixture
    def path(self, model, experts, tmp_path) -> Path:
        made(model, experts).save(tmp_path / "g.safetensors")
        return tmp_path / "g.safetensors"

    def test_no_file(self, tmp_path):
        with pytest.raises(FormatError, match="no such file"):
            TrainedGates.load(tmp_path / "none.safetensors")

    def test_a_pickle_is_not_opened(self, tmp_path):
        for name, content in (("a.pt", pickle.dumps({}, 2)), ("b.safetensors", b"PK\x03\x04" + bytes(60))):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(FormatError, match="pickle"):
                TrainedGates.load(tmp_path / name)

    def test_cut_off(self, path):
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(FormatError, match="cut off"):
            TrainedGates.load(path)

    def test_a_lora(self, path):
        write_tensors(path, {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, {"ss_network_dim": "2"})
        with pytest.raises(FormatError, match=r"holds no gates[\s\S]*legomole\.gates\.2[\s\S]*none[\s\S]*Save Gates"):
            TrainedGates.load(path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["blocks.0.ff/weight", "blocks.0.ff/mean", "blocks.0.ff/log_temperature"])
    def test_values_that_are_not_finite(self, path, name, value):
        shape = read_tensors(path)[0][name].shape
        damage(path, {name: torch.full(shape, value)})
        with pytest.raises(FormatError, match=rf"NaN or infinite[\s\S]*g\.safetensors[\s\S]*{name}"):
            TrainedGates.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: damage(p, drop=["blocks.0.ff/weight"]),
            lambda p: damage(p, drop=["blocks.0.ff/bias"]),
            lambda p: damage(p, drop=["blocks.0.ff/owner"], tensors={"blocks.0.ff/other": torch.zeros(1)}),
            lambda p: damage(p, {"blocks.0.ff/weight": torch.zeros(3)}),
            lambda p: damage(p, {"blocks.0.ff/bias": torch.zeros(5)}),
            lambda p: damage(p, settings="{}]"),
            lambda p: damage(p, settings='{"reads": "noise"}'),
            lambda p: damage(p, experts="[]"),
            lambda p: damage(p, experts='[{"label": "a"}]'),
            lambda p: damage(p, scopes="7"),
            lambda p: damage(p, scopes='{"nowhere": ""}'),
            lambda p: damage(p, training="[1]"),
        ],
    )
    def test_damaged(self, path, change: Callable[[Path], Path]):
        with pytest.raises(FormatError, match=r"could not be read[\s\S]*g\.safetensors[\s\S]*train and save"):
            TrainedGates.load(change(path))

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: damage(p, drop=["(detector)/weight"]),
            lambda p: damage(p, {"(detector)/bias": torch.zeros(2)}),
            lambda p: damage(p, {"(detector)/weight": torch.zeros(3)}),
            lambda p: damage(p, words="null"),
            lambda p: damage(p, words='[["a"], ["b"]]'),
            lambda p: damage(p, words='{"a": 1}'),
            lambda p: damage(p, words="[1, 2, 3]"),
            lambda p: damage(p, words="[["),
        ],
    )
    def test_a_damaged_detector(self, model, experts, path, change: Callable[[Path], Path]):
        made(model, experts, "text").save(path)
        with pytest.raises(FormatError, match=r"could not be read[\s\S]*g\.safetensors[\s\S]*train and save"):
            TrainedGates.load(change(path))

    @pytest.mark.parametrize("name", ["(detector)/weight", "(detector)/bias"])
    def test_a_detector_that_is_not_finite(self, model, experts, path, name):
        made(model, experts, "text").save(path)
        damage(path, {name: torch.full(read_tensors(path)[0][name].shape, float("nan"))})
        with pytest.raises(FormatError, match=r"NaN or infinite[\s\S]*detector"):
            TrainedGates.load(path)

    def test_a_later_kind(self, path):
        damage(path, kind="legomole.gates.3")
        with pytest.raises(FormatError, match=r"holds no gates[\s\S]*gates\.2[\s\S]*gates\.3"):
            TrainedGates.load(path)

    def test_a_failed_save_leaves_the_old_file(self, path, model, experts, monkeypatch):
        before = path.read_bytes()

        def full(_: int) -> None:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SaveError, match="No space left"):
            made(model, experts, activation="sigmoid").save(path)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_the_header_is_plain_json(self, path, model, experts):
        made(model, experts, "hidden").save(path)
        _, header = read_tensors(path)
        layers = {"": "inp", "blocks.0.attn": "blocks.0.attn.to_q", "blocks.0.ff": "blocks.0.ff.0"}
        assert json.loads(header["scopes"]) == layers
        assert json.loads(header["settings"])["reads"] == "hidden"
