"""Files for ComfyUI. tests/comfy/test_nano.py reads them with ComfyUI's own loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from legomole.core.errors import SaveError
from legomole.nano import comfyui, text

NAMES = {
    "diffusion_models/legomole_nano", "text_encoders/legomole_nano_clip", "vae/legomole_nano_vae",
    *(f"loras/legomole_nano_{concept}" for concept in comfyui.CONCEPTS),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base directory as ComfyUI leaves it on its first start, without models; the text encoder is one embedding."""
    weights = text.weights(layers=0, tokens=[320])
    monkeypatch.setattr(text, "weights", lambda: weights)
    for name in ("custom_nodes", "input", "temp", "user"):
        (tmp_path / name).mkdir()
    return tmp_path


def path(folder: Path, name: str) -> Path:
    return folder / "models" / f"{name}.safetensors"


def test_files_are_written_once_and_again_if_they_differ(folder, store):
    messages: list[str] = []
    written = comfyui.place(folder, store, messages.append)
    assert {p.relative_to(folder / "models").with_suffix("").as_posix() for p in written} == NAMES
    assert messages == [f"writing {p}" for p in written]

    lora, base = path(folder, "loras/legomole_nano_fish"), path(folder, "diffusion_models/legomole_nano")
    original, stamp = lora.read_bytes(), base.stat().st_mtime_ns
    save_file({name: w + 1 for name, w in load_file(lora).items()}, lora)
    assert comfyui.place(folder, store) == [lora]
    assert lora.read_bytes() == original
    assert base.stat().st_mtime_ns == stamp
    assert len(list((folder / "models").rglob("*"))) == len(NAMES) + 4  # 4: the folders


def test_another_folder_is_refused(tmp_path, store):
    with pytest.raises(SaveError, match=r"main\.py"):
        comfyui.place(tmp_path, store)
    assert list(tmp_path.iterdir()) == []


def test_the_patched_transformer_predicts_the_same(folder, store):
    comfyui.place(folder, store)
    config = {**store.transformer.config, "patch_size": 2, "sample_size": 16}
    patched = SD3Transformer2DModel.from_config(config).eval().requires_grad_(False)
    patched.load_state_dict(
        {n: w.float() for n, w in load_file(path(folder, "diffusion_models/legomole_nano")).items()}
    )

    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 16, 16, 16, generator=rng)
    read = comfyui.folded(wide)
    assert float(read.std()) == pytest.approx(1, abs=0.05)  # unit normal noise stays unit normal
    torch.testing.assert_close(read[0, 3, 5, 6], wide[0, 3, 10:12, 12:14].sum() / 2)
    inputs = {
        "timestep": torch.tensor([700.0, 200.0]), "encoder_hidden_states": torch.randn(2, 77, 768, generator=rng),
        "pooled_projections": torch.randn(2, 768, generator=rng),
    }  # fmt: skip
    expected = store.transformer(hidden_states=read, **inputs).sample
    found = patched(hidden_states=wide, **inputs).sample
    torch.testing.assert_close(comfyui.folded(found), expected, rtol=1e-4, atol=1e-4)
    assert float((found[..., 0::2] - found[..., 1::2]).abs().max()) == 0  # the pixels of a patch are updated as one


def test_the_vae_has_every_layer_of_taesd(folder, store):
    comfyui.place(folder, store)
    found = load_file(path(folder, "vae/legomole_nano_vae"))
    assert float(found["vae_scale"]) == pytest.approx(2 * 1.5305)
    assert float(found["vae_shift"]) == pytest.approx(0.0609)
    assert found["taesd_encoder.14.weight"].shape == (16, 64, 3, 3)
    assert found["taesd_decoder.1.weight"].shape == (64, 16, 3, 3)
    assert torch.equal(found["taesd_decoder.19.weight"], store.vae.decoder.layers[18].weight.half())
    assert {name.split(".")[1] for name in found if name.startswith("taesd_decoder")} == {
        str(i) for i in (1, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18, 19)
    }  # fmt: skip
