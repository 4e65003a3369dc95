"""Put the small model where a ComfyUI looks for models, so that the shipped workflows run as they are."""

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
# SD3's numbers between the latents a ComfyUI graph carries and those its model reads
SCALE, SHIFT = 1.5305, 0.0609


def place(comfyui: Path, store: Store | None = None, say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Write what ComfyUI's own loaders read: files ``legomole_nano*.safetensors``, 261 MB in all.

    | in ``models/`` | node | bytes |
    |---|---|---|
    | ``diffusion_models/legomole_nano`` | Load Diffusion Model | 8,178,728 |
    | ``text_encoders/legomole_nano_clip`` | Load CLIP, type ``stable_diffusion`` | 247,323,888 |
    | ``vae/legomole_nano_vae`` | Load VAE | 4,930,798 |
    | ``loras/legomole_nano_<concept>``, six of them | Load LoRA | 123,896 each |

    A graph with them paints as `sampling.sample` does: *EmptySD3LatentImage* of 128 x 128, 12 steps, cfg 3, ``euler``,
    ``simple``, then *Upscale Latent By* 0.5 with ``area``, see `folded`, and *VAE Decode* gives pictures of 64 x 64.
    Files that are there already and alike are left as they are.

    Args:
        comfyui: The folder with ComfyUI's ``models``. store: The weights; default the shipped ones.
        say: Told of each file.

    Returns:
        The files written.

    Raises:
        SaveError: Not a ComfyUI folder, or it cannot be written to.
    """
    models = comfyui / "models"
    if not models.is_dir():
        raise SaveError(
            "This is not ComfyUI's folder.",
            file=comfyui,
            expected="a folder with models in it",
            remedy="name the folder that ComfyUI's main.py is in, or its --base-directory",
        )
    written: list[Path] = []
    for name, tensors in _parts(store or Store()):
        path = models / f"{name}.safetensors"
        if path.exists() and _alike(_read(path), tensors):
            say(f"{path} is there")
            continue
        say(f"writing {path}")
        path.parent.mkdir(exist_ok=True)
        write_tensors(path, tensors, {})
        written.append(path)
    return written


def folded(latents: Tensor) -> Tensor:
    """What the model reads of the latents inside a ComfyUI sampler: ``(n, 16, 2 h, 2 w)`` -> ``(n, 16, h, w)``.

    ComfyUI's SD3 cannot cut patches of one pixel. So there each pixel is a patch of 2 x 2 that the model sums up and
    moves as one. Halved, the sum of four independent unit normal numbers is one. How the four differ is noise that
    nobody reads; averaging takes it out, and leaves half the sum.
    """
    return 2 * torch.nn.functional.avg_pool2d(latents, 2)


def _parts(store: Store) -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield "diffusion_models/legomole_nano", _in_patches(_read(store.folder / "base.safetensors"))
    yield "text_encoders/legomole_nano_clip", _clip()
    yield "vae/legomole_nano_vae", _taesd(_read(store.folder / "vae.safetensors"))
    for concept in CONCEPTS:
        yield f"loras/legomole_nano_{concept}", _read(store.lora(concept))


def _in_patches(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer with patches of 2 x 2 that works on `folded` latents."""
    found, half = dict(state), 0.5
    found["pos_embed.proj.weight"] = (half * state["pos_embed.proj.weight"]).expand(-1, -1, 2, 2).contiguous()
    for part in ("weight", "bias"):  # rows: four pixels of 16 channels
        found[f"proj_out.{part}"] = torch.cat([half * state[f"proj_out.{part}"]] * 4)
    return found


def _clip() -> dict[str, Tensor]:
    """With the projection of the pooled states that ComfyUI asks for and does not need."""
    return text.weights() | {"text_projection.weight": torch.eye(text.WIDTH, dtype=torch.float16)}


def _taesd(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """TAESD's names in one file: its decoder counts the clamp at its start as a layer."""
    found = {"vae_scale": torch.tensor(2 * SCALE), "vae_shift": torch.tensor(SHIFT)}  # 2: of `folded`
    for name, tensor in vae.whole(state).items():
        part, _, position, rest = name.split(".", 3)
        found[f"taesd_{part}.{int(position) + (part == 'decoder')}.{rest}"] = tensor
    return found


def _read(path: Path) -> dict[str, Tensor]:
    return read_tensors(path)[0]


def _alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
