"""Install the small model into a ComfyUI folder, so that the shipped workflows run unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import SaveError
from ..core.formats.files import read_tensors, write_tensors
from . import text, vae
from .store import Store

CONCEPTS = ("heart", "fish", "house", "ember", "shadow", "wood")
# SD3's constants: the model reads (latent - SHIFT) * SCALE of the latents in a ComfyUI graph
SCALE, SHIFT = 1.5305, 0.0609


def place(comfyui: Path, store: Store | None = None, say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Write files for ComfyUI's own loaders, ``legomole_nano*.safetensors``, 261 MB in all.

    | in ``models/`` | node | bytes |
    |---|---|---|
    | ``diffusion_models/legomole_nano`` | Load Diffusion Model | 8,178,728 |
    | ``text_encoders/legomole_nano_clip`` | Load CLIP, type ``stable_diffusion`` | 247,323,888 |
    | ``vae/legomole_nano_vae`` | Load VAE | 4,930,798 |
    | ``loras/legomole_nano_<concept>``, six of them | Load LoRA | 123,896 each |

    To sample as `sampling.sample` does, a graph uses *EmptySD3LatentImage* of 128 x 128, 12 steps, cfg 3, ``euler``,
    ``simple``, then *Upscale Latent By* 0.5 with ``area``, see `folded`; *VAE Decode* gives images of 64 x 64.
    Existing files with the same tensors are not written again.

    Args:
        comfyui: ComfyUI's folder, or a base directory that it has been started with.
        store: Model weights; default the shipped ones.
        say: Called with a message for each file.

    Returns:
        Paths of the files written.

    Raises:
        SaveError: If this is not a ComfyUI folder, or it is not writable.
    """
    models = comfyui / "models"
    if not models.is_dir() and not (comfyui / "custom_nodes").is_dir():  # a base directory may have no models yet
        raise SaveError(
            "This is not ComfyUI's folder.",
            file=comfyui,
            expected="a folder that contains a folder named models or custom_nodes",
            remedy="give the folder of ComfyUI's main.py, or its --base-directory",
        )
    written: list[Path] = []
    for name, tensors in _parts(store or Store()):
        path = models / f"{name}.safetensors"
        if path.exists() and _alike(_read(path), tensors):
            say(f"{path} exists")
            continue
        say(f"writing {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {})
        written.append(path)
    return written


def folded(latents: Tensor) -> Tensor:
    """Convert latents of a ComfyUI sampler to those of the model: ``(n, 16, 2 h, 2 w)`` -> ``(n, 16, h, w)``.

    ComfyUI's SD3 does not support a patch size of 1. There each of the model's pixels becomes a patch of 2 x 2, which
    the model sums and updates as one. Half the sum of four independent unit normal variables is unit normal as well.
    The differences within a patch are unused noise; averaging removes them, and twice the mean is half the sum.
    """
    return 2 * torch.nn.functional.avg_pool2d(latents, 2)


def _parts(store: Store) -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield "diffusion_models/legomole_nano", _in_patches(_read(store.folder / "base.safetensors"))
    yield "text_encoders/legomole_nano_clip", _clip()
    yield "vae/legomole_nano_vae", _taesd(_read(store.folder / "vae.safetensors"))
    for concept in CONCEPTS:
        yield f"loras/legomole_nano_{concept}", _read(store.lora(concept))


def _in_patches(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the transformer's weights for patches of 2 x 2, equivalent on `folded` latents."""
    result, half = dict(state), 0.5
    result["pos_embed.proj.weight"] = (half * state["pos_embed.proj.weight"]).expand(-1, -1, 2, 2).contiguous()
    for part in ("weight", "bias"):  # rows: four pixels of 16 channels
        result[f"proj_out.{part}"] = torch.cat([half * state[f"proj_out.{part}"]] * 4)
    return result


def _clip() -> dict[str, Tensor]:
    """Return the text encoder's weights, with the text projection that ComfyUI's loader expects but does not use."""
    return text.weights() | {"text_projection.weight": torch.eye(text.WIDTH, dtype=torch.float16)}


def _taesd(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the autoencoder's weights under TAESD's names; its decoder counts the clamp at its start as a layer."""
    result = {"vae_scale": torch.tensor(2 * SCALE), "vae_shift": torch.tensor(SHIFT)}  # 2: the factor in `folded`
    for name, tensor in vae.whole(state).items():
        part, _, position, rest = name.split(".", 3)
        result[f"taesd_{part}.{int(position) + (part == 'decoder')}.{rest}"] = tensor
    return result


def _read(path: Path) -> dict[str, Tensor]:
    return read_tensors(path)[0]


def _alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
