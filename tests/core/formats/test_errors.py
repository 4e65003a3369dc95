"""Bad input and bad output: each case has its own error, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import FormatError, SaveError
from legomole.core.formats import files as package_files
from legomole.core.formats import load, save, summarise
from legomole.core.lowrank import LowRank
from torch import Tensor

from ... import lora_files as files

LAYER = {"lora_unet_x": (4, 3)}


def header(text: str | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + body


def entry(start: int, stop: int, dtype: str = "F32", shape: str = "[1]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{stop}]}}'


BYTES = {
    "empty": (b"", "is empty"),
    "one byte": (b"\x80", "pickle"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
    "long header": (header("{}", length=1 << 40), "cut off"),
    "huge header": (header(b"{" + b" " * 10, length=10 + (1 << 60)), "cut off"),
    "not json": (header("{not json}"), "not a valid"),
    "body missing": (header(f'{{"a":{entry(0, 4)}}}'), "cut off"),
    "offsets lie": (header(f'{{"a":{entry(0, 400)}}}', b"1234"), "not a valid"),
    "shape lies": (header(f'{{"a":{entry(0, 4, shape="[99999999999]")}}}', b"1234"), "not a valid"),
    "zip": (b"PK\x03\x04" + b"\0" * 40, "pickle"),
    "pickle": (pickle.dumps({"a": 1}), "pickle"),
}


@pytest.mark.parametrize("case", BYTES)
@pytest.mark.parametrize("read", [load, summarise])
def test_hostile_bytes(case: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    content, match = BYTES[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=match) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_header_too_large_to_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_files, "_MAX_HEADER", 50)
    path = files.write(tmp_path / "x.safetensors", files.state_dict(LAYER))
    with pytest.raises(FormatError, match="too large"):
        load(path)


def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    # 640 = 0x280: the file starts with the bytes 80 02, like a pickle of protocol 2
    state = files.state_dict(LAYER)
    blank = files.write(tmp_path / "blank.safetensors", state, {"pad": ""}).read_bytes()
    length = int.from_bytes(blank[:8], "little")
    path = files.write(tmp_path / "x.safetensors", state, {"pad": " " * (640 - length)})
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert load(path).modules


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
def test_pickles_are_not_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    torch.save(files.state_dict(LAYER), path)
    with pytest.raises(FormatError, match="can run any program"):
        load(path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = files.write(tmp_path / "x.safetensors", files.state_dict(LAYER)).read_bytes()
    for size in range(0, len(whole), 7):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            load(path)


def test_names_too_long_for_the_file_system(tmp_path: Path) -> None:
    for read in (load, summarise):
        with pytest.raises(FormatError, match="path cannot be used"):
            read(tmp_path / ("x" * 400))
    with pytest.raises(SaveError, match="could not be written"):
        save(lora(), tmp_path / ("x" * 400), format="comfy")
    assert save(lora(), tmp_path / ("x" * 240), format="comfy").is_file()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("value", "match"), [(torch.full((3, 5), float("nan")), "NaN or infinite"), (torch.ones(0, 5), "do not fit")]
)
def test_full_deltas_that_cannot_be_decomposed(value: Tensor, match: str, tmp_path: Path) -> None:
    path = files.write(tmp_path / "x.safetensors", {**files.state_dict(LAYER), "lora_unet_y.diff": value})
    with pytest.raises(FormatError, match=rf"{match}[\s\S]*lora_unet_y"):
        load(path, convert_rank=2)


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="holds no PEFT adapter"):
        load(tmp_path)


def nan(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[key].view(-1)[0] = float("nan")

    return change


def drop(*keys: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for key in keys:
            del state[key]

    return change


def put(**tensors: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update(
        {f"lora_unet_x.{key.replace('__', '.')}": value for key, value in tensors.items()}
    )


DOWN, UP, ALPHA = (f"lora_unet_x.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))
CONTENT = {
    "nan in down": (nan(DOWN), "NaN or infinite"),
    "nan in up": (nan(UP), "NaN or infinite"),
    "nan alpha": (nan(ALPHA), "alpha is not a finite number"),
    "two spellings": (put(lora_A__weight=torch.ones(4, 3)), "one tensor twice"),
    "down alone": (drop(UP), "no partner"),
    "up alone": (drop(DOWN), "no partner"),
    "alpha alone": (drop(DOWN, UP), "alpha has no factors"),
    "ranks differ": (put(lora_up__weight=torch.ones(4, 3)), "do not fit together"),
    "one-dimensional": (put(lora_up__weight=torch.ones(4)), "shape of a LoRA"),
    "up is a convolution": (put(lora_up__weight=torch.ones(4, 4, 3, 3)), "shape of a LoRA"),
    "integers": (put(lora_up__weight=torch.ones(4, 4, dtype=torch.int8)), "not a 2-D floating"),
    "alpha is a vector": (put(alpha=torch.ones(3)), "alpha is not one number"),
    "bad tucker": (put(lora_mid__weight=torch.ones(3, 3, 3, 3)), "Tucker"),
    "dora": (put(dora_scale=torch.ones(4, 1)), "DoRA"),
    "peft dora": (put(lora_magnitude_vector=torch.ones(4)), "DoRA"),
    "oft": (put(oft_blocks=torch.ones(2, 2, 2)), "OFT/BOFT"),
    "glora": (put(a1__weight=torch.ones(2, 2)), "GLoRA"),
    "t-lora": (put(lambda_layer=torch.ones(1, 4)), "T-LoRA: its rank depends on the timestep"),
    "ia3": (put(on_input=torch.ones(1)), "IA3"),
    "loha": (put(hada_w1_a=torch.ones(2, 2)), "LoHa or LoKr"),
}


@pytest.mark.parametrize("case", CONTENT)
def test_bad_content(case: str, tmp_path: Path) -> None:
    change, match = CONTENT[case]
    state = files.state_dict(LAYER)
    change(state)
    path = files.write(tmp_path / "x.safetensors", state)
    with pytest.raises(FormatError, match=match) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "lora_unet_x" in str(error.value)
    assert summarise(path).modules == 1  # a file that cannot be merged can still be inspected


def test_a_checkpoint_is_not_a_lora(tmp_path: Path) -> None:
    path = files.write(tmp_path / "x.safetensors", {"model.diffusion_model.out.weight": torch.ones(2, 2)})
    with pytest.raises(FormatError, match=r"holds no LoRA[\s\S]*model.diffusion_model.out.weight"):
        load(path)


def lora(value: float = 1.0) -> Adapter:
    return Adapter({"model.x": LowRank(torch.full((2, 3), value), torch.full((4, 2), value))})


@pytest.mark.parametrize("format", ["comfy", "peft"])
def test_missing_folder(format: str, tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="folder does not exist"):
        save(lora(), tmp_path / "none" / "x", format=format)


@pytest.mark.parametrize("format", ["comfy", "peft"])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_full_disk(format: str, exists: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors" if format == "comfy" else tmp_path / "x"
    if exists:
        save(lora(1.0), path, format=format)

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(SaveError, match=os.strerror(code)):
            save(lora(2.0), path, format=format)
    assert sorted(tmp_path.rglob("*")) == before
    if exists:
        assert load(path).modules["model.x"].A[0, 0] == 1.0


@pytest.mark.parametrize("format", ["comfy", "peft"])
def test_read_only_disk(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change fails there, removing files included."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for change in ("open", "mkdir", "unlink"):
        monkeypatch.setattr(Path, change, fail)
    with pytest.raises(SaveError, match="Read-only file system"):
        save(lora(), tmp_path / "x", format=format)


@pytest.mark.parametrize("format", ["comfy", "peft"])
def test_overwriting(format: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors" if format == "comfy" else tmp_path / "x"
    for value in (1.0, 2.0):
        save(lora(value), path, format=format)
        assert load(path).modules["model.x"].A[0, 0] == value
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_a_folder_keeps_its_other_files(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "README.md").write_text("mine")
    save(lora(), tmp_path / "x", format="peft")
    assert (tmp_path / "x" / "README.md").read_text() == "mine"


def test_an_input_may_be_overwritten_by_its_result(tmp_path: Path) -> None:
    path = save(lora(3.0), tmp_path / "x", format="comfy")
    read = load(path)
    save(read, path)
    assert load(path).modules["model.x"].A[0, 0] == 3.0
    assert read.modules["model.x"].A[0, 0] == 3.0


def test_wrong_kind_of_path(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for name, format, match in (
        ("x.pt", "comfy", "safetensors only"),
        ("folder", "comfy", "is a folder"),
        ("x.safetensors", "peft", "is a folder, not a file"),
    ):
        with pytest.raises(SaveError, match=match):
            save(lora(), tmp_path / name, format=format)


def test_unstorable_dtype(tmp_path: Path) -> None:
    odd = Adapter(lora().modules, extras={"odd": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(SaveError, match=r"dtype cannot be stored[\s\S]*odd"):
        save(odd, tmp_path / "x", format="comfy")
    assert not list(tmp_path.iterdir())


def peft_folder(path: Path, **config: object) -> Path:
    path.mkdir()
    shapes = {"model.x": (4, 3)}
    files.write(
        path / "adapter_model.safetensors", files.state_dict(shapes, files.PEFT, alpha=None, prefix="base_model.model.")
    )
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    return path


CONFIGS = {
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "not a LoRA"),
    "no type": ({"peft_type": None}, "not a LoRA"),
    "dora": ({"use_dora": True}, "DoRA"),
    "changed base": ({"init_lora_weights": "pissa_niter_4"}, "changed base model"),
    "other rank": ({"r": 16}, "rank in the configuration"),
    "nonsense": ({"lora_alpha": "much"}, "not valid"),
    "bad pattern": ({"rank_pattern": {"(": 4}}, "not a regular expression"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configuration(case: str, tmp_path: Path) -> None:
    config, match = CONFIGS[case]
    with pytest.raises(FormatError, match=match):
        load(peft_folder(tmp_path / "x", **config))


def test_an_incomplete_folder(tmp_path: Path) -> None:
    path = peft_folder(tmp_path / "x")
    (path / "adapter_config.json").rename(path / "config")
    with pytest.raises(FormatError, match="the scale is unknown"):
        load(path)
    (path / "config").rename(path / "adapter_config.json")
    (path / "adapter_config.json").write_text("[]")
    with pytest.raises(FormatError, match="not a JSON object"):
        load(path)
    (path / "adapter_config.json").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="cannot be read"):
        load(path)
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match="is not JSON"):
        load(path)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match="interrupted"):
        load(path)
    (path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"adapter_model\.bin, a pickle"):
        load(path)
