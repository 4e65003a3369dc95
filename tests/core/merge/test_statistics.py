"""Statistics: checks, files, and whose numbers they are."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.errors import FormatError, MergeError, SaveError
from legomole.core.merge.statistics import ModuleStatistics, Statistics, orthonormal


def eye(value: float, d: int = 3) -> torch.Tensor:
    return value * torch.eye(d)


def adapter(sha256: str) -> Adapter:
    return Adapter({}, source=Source(path=f"{sha256}.safetensors", sha256=sha256))


def example() -> Statistics:
    shared = eye(9.0)  # q and k see the same input
    return Statistics(
        {
            "blocks.0.q": ModuleStatistics({0: shared, 1: eye(2.0)}, {(0, 1): eye(3.0), (0, 1, 2): eye(4.0)}, eye(5.0)),
            "blocks.0.k": ModuleStatistics({0: shared}),
            "blocks/with/slashes": ModuleStatistics(base=eye(6.0, 2)),
            "light/weight": ModuleStatistics({0: eye(7.0)}, {}, eye(8.0), torch.eye(2, 5, dtype=torch.float16)),
        },
        ("aa", "bb", "cc"),
        (0.5, 1.0, 2.0),
        {"model": "tiny", "prompts": "a cat\na dog"},
    )


def test_a_file_keeps_everything(tmp_path):
    path = tmp_path / "statistics.safetensors"
    example().save(path)
    loaded = Statistics.load(path)
    assert (loaded.adapters, loaded.strengths) == (("aa", "bb", "cc"), (0.5, 1.0, 2.0))
    assert dict(loaded.metadata) == {"model": "tiny", "prompts": "a cat\na dog"}
    assert set(loaded.modules) == set(example().modules)
    for name, moments in example().modules.items():
        other = loaded.modules[name]
        assert (set(other.own), set(other.joint)) == (set(moments.own), set(moments.joint))
        assert all(torch.equal(other.own[i], moments.own[i]) for i in moments.own)
        assert all(torch.equal(other.joint[group], moments.joint[group]) for group in moments.joint)
        assert (other.base is None) == (moments.base is None)
        assert (other.light, other.d_in) == (moments.light, moments.d_in)
        if moments.basis is not None:
            assert other.basis.dtype == torch.float16
            assert torch.equal(other.basis, moments.basis)
        if moments.base is not None:
            assert torch.equal(other.base, moments.base)
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.safetensors"]


def test_positions_follow_the_adapters():
    found = example().of([adapter("cc"), adapter("aa"), adapter("bb")])
    assert (found.adapters, found.strengths) == (("cc", "aa", "bb"), (2.0, 0.5, 1.0))
    turned = found.modules["blocks.0.q"]
    assert {i: float(C[0, 0]) for i, C in turned.own.items()} == {1: 9.0, 2: 2.0}
    assert {group: float(C[0, 0]) for group, C in turned.joint.items()} == {(1, 2): 3.0, (0, 1, 2): 4.0}


def test_a_part_of_the_adapters_keeps_what_was_measured_without_the_others():
    part = Statistics({"m": example().modules["blocks.0.q"]}, ("aa", "bb", "cc")).of([adapter("bb"), adapter("aa")])
    assert part.adapters == ("bb", "aa")
    assert {i: float(C[0, 0]) for i, C in part.modules["m"].own.items()} == {1: 9.0, 0: 2.0}
    assert list(part.modules["m"].joint) == [(0, 1)]


def test_the_basis_belongs_to_all_positions():
    part = Statistics({"m": example().modules["light/weight"]}, ("aa", "bb")).of([adapter("bb"), adapter("aa")])
    moments = part.modules["m"]
    assert list(moments.own) == [1]
    assert moments.light
    assert moments.d_in == 5


def test_rows_that_were_rounded_are_made_orthonormal():
    rows = torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()).Q.mT
    rounded = rows.half().double()
    Q = orthonormal(rounded)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(4).double())
    torch.testing.assert_close(Q, rows, atol=2e-3, rtol=0)
    torch.testing.assert_close(Q.mT @ (Q @ rounded.mT), rounded.mT)  # the same span


def test_one_file_given_twice_keeps_both_positions():
    twice = Statistics({"m": ModuleStatistics({0: eye(1.0), 1: eye(2.0)})}, ("aa", "aa")).of(
        [adapter("aa"), adapter("aa")]
    )
    assert {i: float(C[0, 0]) for i, C in twice.modules["m"].own.items()} == {0: 1.0, 1: 2.0}


@pytest.mark.parametrize("sha256", ["dd", ""])
def test_an_adapter_that_was_not_measured_is_refused(sha256):
    with pytest.raises(MergeError, match="not measured with this LoRA"):
        example().of([adapter("aa"), adapter(sha256)])


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"own": {0: torch.zeros(3, 4)}},
        {"own": {0: eye(1.0), 1: eye(1.0, 2)}},
        {"own": {0: torch.zeros(3)}},
        {"base": torch.zeros(2, 2, 2)},
        {"basis": torch.eye(2, 5)},
        {"base": eye(1.0), "basis": torch.eye(3, 5)},
        {"base": eye(1.0), "basis": torch.zeros(2)},
    ],
)
def test_shapes_are_checked(parts):
    with pytest.raises(MergeError, match="not second moments"):
        ModuleStatistics(**parts)


@pytest.mark.parametrize("group", [(0,), (1, 0), (0, 0), ()])
def test_joint_positions_are_checked(group):
    with pytest.raises(MergeError, match="Joint statistics"):
        ModuleStatistics(joint={group: eye(1.0)})


def test_moments_that_modules_share_are_written_once(tmp_path):
    shared, C = ModuleStatistics({0: eye(1.0)}, {(0, 1): eye(2.0)}, eye(3.0)), eye(4.0)
    # the same matrix in other roles is not the same moments
    statistics = Statistics({"a": shared, "b": shared, "c": ModuleStatistics({0: C}), "d": ModuleStatistics(base=C)})
    assert statistics.size == sum(t.numel() * 4 for t in (*shared.tensors(), C))
    path = tmp_path / "shared.safetensors"
    statistics.save(path)
    assert not any(key.startswith("b/") for key in safetensors.torch.load_file(path))
    read = Statistics.load(path)
    assert set(read.modules) == {"a", "b", "c", "d"}
    for name, moments in statistics.modules.items():
        assert list(read.modules[name].own) == list(moments.own)
        assert list(read.modules[name].joint) == list(moments.joint)
        for ours, theirs in zip(moments.tensors(), read.modules[name].tensors(), strict=True):
            assert torch.equal(ours, theirs)
    read.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("same", ['{"b": "missing"}', "[]", "[1]", "no json"])
def test_a_file_that_says_nonsense_about_what_is_shared_is_refused(tmp_path, same):
    path = tmp_path / "strange.safetensors"
    header = {"kind": "legomole.statistics.1", "adapters": "[]", "measured": "{}", "same": same}
    safetensors.torch.save_file({"m/own/0": eye(1.0)}, path, header)
    with pytest.raises(FormatError, match="could not be read"):
        Statistics.load(path)


def test_other_files_are_refused(tmp_path):
    lora = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, lora)
    with pytest.raises(FormatError, match="holds no statistics"):
        Statistics.load(lora)
    broken = tmp_path / "broken.safetensors"
    example().save(broken)
    broken.write_bytes(broken.read_bytes()[:-20])
    for path in (broken, tmp_path / "missing.safetensors"):
        with pytest.raises(FormatError):
            Statistics.load(path)


@pytest.mark.parametrize("key", ["m/own/x", "m/other/0", "nonsense"])
def test_a_file_with_strange_keys_is_refused(tmp_path, key):
    path = tmp_path / "strange.safetensors"
    header = {"kind": "legomole.statistics.1", "adapters": "[]", "measured": "{}"}
    safetensors.torch.save_file({key: eye(1.0)}, path, header)
    with pytest.raises(FormatError, match="could not be read"):
        Statistics.load(path)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(SaveError, match="folder does not exist"):
        example().save(tmp_path / "no such folder" / "x.safetensors")
