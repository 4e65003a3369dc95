"""Hashes of many merges and gated pictures, to show that a code change does not change any result.

``python -m benchmarks.reliability hashes --write before.json``, then, after the change, ``--check before.json``. The
hashes are valid for one machine and one set of package versions.

Everything runs through the command line, because its names change less often than those of modules.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_BLOCK = "transformer_blocks_0"
_KOHYA: Mapping[str, tuple[int, ...]] = {
    f"lora_unet_down_blocks_0_attentions_0_{_BLOCK}_attn1_to_q": (96, 96),
    f"lora_unet_down_blocks_0_attentions_0_{_BLOCK}_attn1_to_k": (96, 96),
    f"lora_unet_down_blocks_0_attentions_0_{_BLOCK}_attn2_to_k": (96, 128),
    f"lora_unet_down_blocks_0_attentions_0_{_BLOCK}_ff_net_0_proj": (384, 96),
    "lora_unet_down_blocks_0_resnets_0_conv1": (48, 48, 3, 3),
    "lora_unet_mid_block_attentions_0_proj_in": (64, 64, 1, 1),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (128, 96),
}
_FUSED: Mapping[str, tuple[int, ...]] = {
    "lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072),
    "lora_unet_single_blocks_3_linear1": (21504, 3072),
}
_SPLIT: Mapping[str, tuple[int, ...]] = {
    **{f"transformer.transformer_blocks.0.attn.to_{x}": (3072, 3072) for x in "qkv"},
    **{f"transformer.single_transformer_blocks.3.attn.to_{x}": (3072, 3072) for x in "qkv"},
    "transformer.single_transformer_blocks.3.proj_mlp": (12288, 3072),
}
_LANGUAGE: Mapping[str, tuple[int, ...]] = {
    "base_model.model.model.layers.0.self_attn.q_proj": (64, 64),
    "base_model.model.model.layers.1.mlp.gate_proj": (96, 64),
}
_KOHYA_SUFFIXES, _PEFT_SUFFIXES = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
_METHODS: Mapping[str, Sequence[str]] = {
    "lego": (),
    "lego-2x": ("--rank", "2x"),
    "lego-95%": ("--rank", "95%"),
    "lego-starts": ("--set", "starts=3", "--seed", "1"),
    "lego-mean": ("--set", "centroid=mean"),
    "lego-reweighted": ("--parameter-reweight", "--output-reweight", "--norm", "l2"),
    "paper": ("--geometry", "paper"),
    "paper-l2": ("--geometry", "paper", "--norm", "l2"),
    "paper-plain": ("--geometry", "paper", "--no-parameter-reweight", "--no-output-reweight"),
    **{name: ("--method", name) for name in ("concat", "linear", "svd", "ties", "dare", "knots")},
    "svd-95%": ("--method", "svd", "--rank", "95%"),
    "ties-frequency": ("--method", "ties", "--set", "sign_election=frequency", "--density", "0.3"),
}


def hashes(folder: Path | None = None) -> dict[str, str]:
    """Return case name -> sha256 of the resulting tensors or picture.

    Args:
        folder: Folder for inputs and outputs; default a temporary one.
    """
    if folder is None:
        with TemporaryDirectory() as temporary:
            return hashes(Path(temporary))
    digests: dict[str, str] = {}
    for name, arguments in _cases(folder):
        target = folder / "out" / name.replace("/", "_")
        target.parent.mkdir(exist_ok=True)
        _command(*arguments, "-o", str(target))
        folder_of_peft = target / "adapter_model.safetensors"
        digests[name] = tensors_hash(
            folder_of_peft if target.is_dir() else target.with_name(f"{target.name}.safetensors")
        )
    demo = folder / "demo"
    _command("demo", str(demo))
    digests["demo/pictures"] = pixels_hash(demo / "demo.png")
    digests["demo/lego"] = tensors_hash(demo / "lego.safetensors")
    return digests


def tensors_hash(path: Path) -> str:
    """Return sha256 over name, dtype, shape and bytes of all tensors of a safetensors file, without its metadata."""
    digest = hashlib.sha256()
    with safe_open(str(path), framework="pt") as file:
        for key in sorted(file.keys()):
            tensor = file.get_tensor(key)
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pixels_hash(path: Path) -> str:
    """Return sha256 over the pixels of a picture."""
    from PIL import Image

    with Image.open(path) as picture:
        return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return a line per case that is new, missing or changed."""
    lines = [f"{name}: only before" for name in before if name not in after]
    lines += [f"{name}: only now" for name in after if name not in before]
    return lines + [f"{name}: changed" for name in before if name in after and before[name] != after[name]]


def _cases(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Write the inputs into `folder`; yield name and command line, without the output, of every case."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        loras = [
            _lora(folder / f"{word}-{seed}.safetensors", _KOHYA, _KOHYA_SUFFIXES, rank, dtype, seed, alpha=4.0)
            for seed, rank in enumerate((8, 8, 4))
        ]
        for name, options in _METHODS.items():
            yield f"{word}/{name}", ["merge", f"{loras[0]}:0.8", f"{loras[1]}:1.2", f"{loras[2]}:-0.5:0.3", *options]
    a, b = folder / "float32-0.safetensors", folder / "float32-1.safetensors"
    yield "weights", ["merge", f"{a}", f"{b}", "--module-weight", "1:*attn2*=0.5", "--normalize", "--dtype", "float16"]
    yield "compress", ["compress", f"{a}", "--rank", "50%"]
    yield "convert", ["convert", f"{a}", "--dtype", "bfloat16"]
    yield "convert/diffusers", ["convert", f"{a}", "--to", "diffusers"]

    tucker = _tucker(folder / "tucker.safetensors")
    yield "tucker", ["merge", f"{tucker}", f"{a}", "--method", "svd"]
    yield "tucker/lego", ["merge", f"{tucker}", f"{a}"]
    lokr = _lokr(folder / "lokr.safetensors")
    yield "lokr", ["convert", f"{lokr}", "--convert-rank", "6"]

    fused = _lora(folder / "fused.safetensors", _FUSED, _KOHYA_SUFFIXES, 4, torch.bfloat16, 1, alpha=2.0)
    split = _lora(folder / "split.safetensors", _SPLIT, _PEFT_SUFFIXES, 4, torch.bfloat16, 2)
    for method in ("lego", "svd", "concat"):
        yield f"qkv/{method}", ["merge", f"{fused}", f"{split}", "--method", method]

    peft = [_peft_folder(folder / f"peft-{seed}", seed, rank) for seed, rank in ((1, 8), (2, 4))]
    for method in ("lego", "svd", "ties", "concat"):
        yield f"peft/{method}", ["merge", f"{peft[0]}", f"{peft[1]}:0.5", "--method", method]

    yield from _gated(folder)


def _gated(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield gate training and calibrated merges on a tiny random pipeline."""
    from legomole.core.formats import save

    from tests.hosts.diffusers import tiny_pipelines as tiny

    pipe = tiny.build("SD 1.5")
    pipe.save_pretrained(folder / "pipe")
    style, heart = (str(save(tiny.lora(pipe, seed), folder / f"lora-{seed}", format="diffusers")) for seed in (1, 2))
    loras = [f"{style}:0.8", heart]
    words = ["--words", "ember style, burning", "--words", "heart", "--size", "16"]
    training = ["--paint-steps", "1", "--batch", "8", "--steps", "6", "--set", "examples=16", "--set", "samples=12"]
    for reads in ("text", "hidden", "experts"):
        for granularity in ("network", "block", "layer"):
            kind = ["--reads", reads, "--granularity", granularity]
            yield (
                f"gates/{reads}/{granularity}",
                ["train-gates", str(folder / "pipe"), *loras, *words, *training, *kind],
            )
    softmax = ["--reads", "experts", "--activation", "softmax", "--balance", "0.5"]
    yield "gates/softmax", ["train-gates", str(folder / "pipe"), *loras, *words, *training, *softmax]
    yield (
        "gates/router",
        ["train-gates", str(folder / "pipe"), *loras, *words, "--paint-steps", "1", "--objective", "router"],
    )
    prompts = folder / "prompts.txt"
    prompts.write_text("heart\nembers burning\nheart in ember style\nheart burning\na dog\na cat\n")
    for method in ("lego", "calibrated"):
        measured = ["--base", str(folder / "pipe"), "--prompts", str(prompts), "--method", method]
        yield f"calibrated/{method}", ["merge", *loras, *measured, *words]


def _command(*arguments: str) -> None:
    """Run ``legomole`` in this process.

    Raises:
        RuntimeError: If it fails.
    """
    from legomole.cli import app
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, list(arguments))
    if result.exit_code:
        raise RuntimeError(f"legomole {' '.join(arguments)}\n{result.output}") from result.exception


def _lora(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    suffixes: tuple[str, str],
    rank: int,
    dtype: torch.dtype,
    seed: int,
    *,
    alpha: float | None = None,
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(99)  # common units, so that clusters contain units of several LoRAs
    state: dict[str, Tensor] = {}
    for name, (d_out, *d_in) in shapes.items():
        ones = [1] * (len(d_in) - 1)
        common = min(2, rank)
        down, up = (
            torch.randn(rank, math.prod(d_in), generator=generator),
            torch.randn(d_out, rank, generator=generator),
        )
        down[:common] = torch.randn(common, math.prod(d_in), generator=shared) + 0.2 * down[:common]
        up[:, :common] = torch.randn(d_out, common, generator=shared) + 0.2 * up[:, :common]
        state[f"{name}.{suffixes[0]}"] = (0.1 * down).reshape(rank, *d_in).to(dtype)
        state[f"{name}.{suffixes[1]}"] = (0.1 * up).reshape(d_out, rank, *ones).to(dtype)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(state, path, {"ss_base_model_version": "sd_1.5"})
    return path


def _tucker(path: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    shapes = {"lora_down": (4, 48, 1, 1), "lora_mid": (4, 4, 3, 3), "lora_up": (48, 4, 1, 1)}
    state = {f"{name}.{role}.weight": torch.randn(shape, generator=generator) for role, shape in shapes.items()}
    save_file({**state, f"{name}.alpha": torch.tensor(4.0), f"{name}.diff_b": torch.ones(48)}, path)
    return path


def _lokr(path: Path) -> Path:
    generator = torch.Generator().manual_seed(6)
    name = "lora_unet_mid_block_attentions_0_proj_in"
    state = {f"{name}.lokr_w1": (8, 8), f"{name}.lokr_w2_a": (8, 2), f"{name}.lokr_w2_b": (2, 8)}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in state.items()}
    save_file({**tensors, f"{name}.alpha": torch.tensor(2.0)}, path)
    return path


def _peft_folder(path: Path, seed: int, rank: int) -> Path:
    path.mkdir()
    _lora(path / "adapter_model.safetensors", _LANGUAGE, _PEFT_SUFFIXES, rank, torch.float16, seed)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "base_model_name_or_path": "x", "target_modules": []}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
