"""Families of models: the canonical names of their layers, and the names that each program gives to them.

To add a family, write its canonical layers (the names of ComfyUI's weights) and its namings as a `Family` in one of the
modules here, add it to `FAMILIES`, and its sizes to ``tests/core/layers/families/models.py``: the tests then compare
the tables with ComfyUI and diffusers, and merge and convert between all its dialects.
"""

from __future__ import annotations

from .flux import CHROMA, FLUX, FLUX2, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from .image import HIDREAM, KREA2, LUMINA2, PIXART, QWEN_IMAGE, SD3, Z_IMAGE
from .table import Family
from .unet import SD1, SD2, SDXL
from .video import ANIMA, COSMOS, LTX2, LTX_VIDEO, WAN

FAMILIES: tuple[Family, ...] = (
    SD1, SD2, SDXL, SD3, FLUX, CHROMA, FLUX2, Z_IMAGE, LUMINA2, QWEN_IMAGE, KREA2, HIDREAM, PIXART, WAN, LTX_VIDEO,
    LTX2, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, COSMOS, ANIMA,
)  # fmt: skip
"""Where the names of a LoRA fit several families equally well, the first one counts."""
