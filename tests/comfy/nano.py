"""Graphs of stock nodes for the demo model."""

from __future__ import annotations

from legomole.nano import sampling

from .graph import Graph, Link

TEXT, SEED, COUNT = "a simple heart with an ember look", 11, 4
HEART, EMBER = "legomole_nano_heart.safetensors", "legomole_nano_ember.safetensors"


class NanoGraph(Graph):
    """A graph with the files that `legomole.nano.comfyui.place` installs."""

    def __init__(self) -> None:
        self.nodes = {}
        self.model = self.add("UNETLoader", unet_name="legomole_nano.safetensors", weight_dtype="default")
        self.clip = self.add("CLIPLoader", clip_name="legomole_nano_clip.safetensors", type="stable_diffusion")
        self._vae = self.add("VAELoader", vae_name="legomole_nano_vae.safetensors")
        self._latent, self._cfg = "EmptySD3LatentImage", sampling.GUIDANCE

    def sampled(self, text: str = TEXT, model: Link | None = None, empty: Link | None = None) -> str:
        """Add nodes that sample images and save them; returns the id of the SaveImage node."""
        samples = self.add(
            "KSampler",
            model=model or self.model,
            positive=self.add("CLIPTextEncode", clip=self.clip, text=text),
            negative=self.add("CLIPTextEncode", clip=self.clip, text=""),
            latent_image=empty or self.add(self._latent, width=128, height=128, batch_size=COUNT),
            seed=SEED,
            steps=sampling.STEPS,
            cfg=self._cfg,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )
        half = self.add("LatentUpscaleBy", samples=samples, upscale_method="area", scale_by=0.5)
        self.add("SaveLatent", samples=half, filename_prefix="nano")
        pixels = self.add("VAEDecode", samples=half, vae=self._vae)
        return self.add("SaveImage", images=pixels, filename_prefix="nano")[0]
