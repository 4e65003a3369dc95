"""Builds prompts in ComfyUI's API format, node by node."""

from __future__ import annotations

from typing import Any

from .server import Prompt

Link = list[Any]  # [node id, output number]


class Graph:
    """A prompt under construction. Node ids are class names with a number.

    Args:
        base: The tiny model: ``flux``, or ``sd15``.
    """

    def __init__(self, base: str = "flux") -> None:
        self.nodes: Prompt = {}
        checkpoint, _ = self.add("CheckpointLoaderSimple", ckpt_name="sd15_nano.safetensors")
        self.model, self.clip, self._vae = [checkpoint, 0], [checkpoint, 1], [checkpoint, 2]
        self._latent, self._cfg = "EmptyLatentImage", 4.0
        if base == "flux":  # with the CLIP-L of SD1.5, because Flux's own text encoders are large
            self.model = self.add("UNETLoader", unet_name="flux_nano.safetensors", weight_dtype="default")
            self._vae = self.add("VAELoader", vae_name="taef1")
            self._latent, self._cfg = "EmptySD3LatentImage", 1.0

    def add(self, kind: str, **inputs: Any) -> Link:
        """Add a node and return a link to its first output. ``loras__lora0`` stands for ``loras.lora0``."""
        name = f"{kind}{sum(node['class_type'] == kind for node in self.nodes.values())}"
        self.nodes[name] = {
            "class_type": kind,
            "inputs": {key.replace("__", "."): value for key, value in inputs.items() if value is not None},
        }
        return [name, 0]

    def load(self, name: str, model: float = 1.0, clip: float = 1.0, convert_rank: int = 0) -> Link:
        return self.add(
            "LegoMoLE_LoadLoRA", lora_name=name, strength_model=model, strength_clip=clip, convert_rank=convert_rank
        )

    def lego(self, *loras: Link, with_model: bool = True, **settings: Any) -> Link:
        defaults = {
            "rank": "1x",
            "geometry": "rank-one",
            "centroid": "auto",
            "parameter_reweight": "auto",
            "output_reweight": "auto",
            "norm": "inf",
            "starts": 0,
            "seed": 0,
        }
        host = {"model": self.model, "clip": self.clip} if with_model else {}
        return self.add("LegoMoLE_LegoMerge", **_row(loras), **host, **{**defaults, **settings})

    def merge(self, method: str, *loras: Link, with_model: bool = True, **settings: Any) -> Link:
        host = {"model": self.model, "clip": self.clip} if with_model else {}
        settings = {f"method__{name}": value for name, value in settings.items()}
        return self.add("LegoMoLE_MergeLoRAs", **_row(loras), **host, method=method, **settings)

    def apply(self, lora: Link, model: float = 1.0, clip: float = 1.0) -> tuple[Link, Link]:
        node, _ = self.add(
            "LegoMoLE_ApplyLoRA",
            model=self.model,
            clip=self.clip,
            lora=lora,
            strength_model=model,
            strength_clip=clip,
        )
        return [node, 0], [node, 1]

    def stock(self, *names: str, strengths: list[float] | None = None) -> tuple[Link, Link]:
        """Add a chain of stock loaders; returns MODEL and CLIP."""
        model, clip = self.model, self.clip
        for name, strength in zip(names, strengths or [1.0] * len(names), strict=True):
            node, _ = self.add(
                "LoraLoader",
                model=model,
                clip=clip,
                lora_name=name,
                strength_model=strength,
                strength_clip=strength,
            )
            model, clip = [node, 0], [node, 1]
        return model, clip

    def mix(self, *loras: Link, gates: Link | None = None, clip: Link | None = None, **settings: Any) -> Link:
        """Add MoLE Mix; returns its MODEL (outputs 1 and 2 are CLIP and the report)."""
        defaults = {"scale": 1.0, "mixing": "delta", "granularity": "block", "clip_method": "concat"}
        model = settings.pop("model", self.model)
        return self.add(
            "LegoMoLE_MoLEMix", model=model, clip=clip, gates=gates, **_row(loras), **{**defaults, **settings}
        )

    def train(self, *loras: Link, **settings: Any) -> Link:
        """Add Train Gates with a short training; returns its gates (outputs 1 and 2 are the chart and the report)."""
        defaults = {
            "words": "ember style\nheart",
            "prompts": "ember style\nheart\nheart in ember style\na dog",
            "objective": "distil",
            "granularity": "block",
            "activation": "sigmoid",
            "reads": "text",
            "steps": 12,
            "batch_size": 8,
            "learning_rate": 0.05,
            "balance": 0.0,
            "pictures": 8,
            "examples": 32,
            "sampling_steps": 2,
            "cfg": 1.0,
            "compose": 1.2,
            "save_memory": True,
            "seed": 0,
            "latent_image": self.empty(),
        }
        return self.add(
            "LegoMoLE_TrainGates", model=self.model, clip=self.clip, **_row(loras), **{**defaults, **settings}
        )

    def calibrate(self, *loras: Link, **settings: Any) -> Link:
        """Add Calibrate with few images; returns its statistics (output 1 is the report)."""
        defaults = {
            "words": "ember style\nheart",
            "prompts": "ember style\nheart\nheart in ember style\na dog",
            "pictures": 4,
            "sampling_steps": 1,
            "cfg": 1.0,
            "batch_size": 4,
            "seed": 0,
            "latent_image": self.empty(),
        }
        return self.add(
            "LegoMoLE_Calibrate", model=self.model, clip=self.clip, **_row(loras), **{**defaults, **settings}
        )

    def compare(self, *loras: Link, **settings: Any) -> Link:
        """Add XY Compare with the settings of `picture`; returns its grid (outputs 1 and 2: images and report)."""
        defaults = {
            "prompt": "a house of bricks",
            "negative": "",
            "x_axis": "method",
            "x_values": "none, concat, svd, lego, mole",
            "y_axis": "nothing",
            "y_values": "",
            "method": "lego",
            "rank": "1x",
            "seed": 7,
            "steps": 2,
            "cfg": self._cfg,
            "sampler_name": "euler",
            "scheduler": "simple",
            "latent_scale": 1.0,
            "latent_image": self.empty(),
        }
        return self.add(
            "LegoMoLE_XYCompare",
            model=self.model,
            clip=self.clip,
            vae=self._vae,
            **_row(loras),
            **{**defaults, **settings},
        )

    def empty(self, size: int = 64) -> Link:
        return self.add(self._latent, width=size, height=size, batch_size=1)

    def save(self, lora: Link, prefix: str, format: str = "auto", dtype: str = "as is") -> Link:
        return self.add("LegoMoLE_SaveLoRA", lora=lora, filename_prefix=prefix, format=format, dtype=dtype)

    def picture(self, model: Link | None = None, clip: Link | None = None, prompt: str = "a house of bricks") -> str:
        """Add nodes that sample an image and save it and its latent; returns the id of the SaveImage node."""
        text = [self.add("CLIPTextEncode", text=text, clip=clip or self.clip) for text in (prompt, "")]
        latent = self.empty()
        sampled = self.add(
            "KSampler",
            model=model or self.model,
            positive=text[0],
            negative=text[1],
            latent_image=latent,
            seed=7,
            steps=2,
            cfg=self._cfg,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )
        self.add("SaveLatent", samples=sampled, filename_prefix="test/latent")
        pixels = self.add("VAEDecode", samples=sampled, vae=self._vae)
        return self.add("SaveImage", images=pixels, filename_prefix="test/picture")[0]


def _row(loras: tuple[Link, ...]) -> dict[str, Link]:
    return {f"loras__lora{i}": lora for i, lora in enumerate(loras)}
