"""What a layer sees, by its path and its model: positions of the picture, of the text, or of both in one sequence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

# Keys and values of cross attention: a picture's positions read them.
_CROSS = re.compile(
    r"(^|\.)(attn2|cross_attn|cross_attention|crossattn)\."
    r"(to_k|to_v|k|v|k_proj|v_proj|kv|kv_linear|kv_proj|to_kv|linear_k|linear_v)$"
)
# A prompt's own layers, for text or for image prompts.
_TEXT = re.compile(
    r"(^|[._])(txt|text|cap|caption|context|encoder_hid|byt5|token_refiner|llm|siglip|clip|vision)"
    r"(_|\.|$)|(^|\.)(add_[qkv]_proj|to_add_out|ff_context|norm1_context|norm_added|k_img|v_img|img_emb|y_embedder"
    r"|image_embedder|llm_adapter|t_embedder_text)(\.|$)"
    r"|(^|\.)(cond_seq_linear|double_layers\.\d+\.(attn\.w1[qkvo]|mlpC|modC))(\.|$)"  # AuraFlow
)

Sees = Literal["picture", "text", "cross"]


@dataclass(frozen=True)
class SequenceLayout:
    """Where the picture's tokens are in a model's sequences.

    Args:
        joint: Pattern of the paths of layers whose sequence holds text and picture; ``""``: only the attention joins
            them, in the same order.
        order: ``text first``: text, picture, references. ``picture first``: picture, then the rest. ``picture last``:
            the picture ends the sequence.
        padded_to: The picture is padded to a multiple of this number of tokens.
        registers: Number of tokens before the text that are neither text nor picture.
        frames_first: Whether a video's latent is ``(B, F, C, H, W)`` in diffusers.
        without_padding: Whether each sample's text has no padding tokens in joint sequences.
    """

    joint: str = ""
    order: Literal["text first", "picture first", "picture last"] = "picture first"
    padded_to: int = 1
    registers: int = 0
    frames_first: bool = False
    without_padding: bool = False

    def is_joint(self, path: str) -> bool:
        return bool(self.joint) and re.match(self.joint, path) is not None

    def padded(self, picture: int) -> int:
        """Number of tokens of a picture of this many, with its padding."""
        return -(-picture // self.padded_to) * self.padded_to

    def starts(self, picture: int, count: int, texts: Sequence[int] | None) -> list[int]:
        """Where the picture's tokens begin in joint sequences: one number for all samples, or one per sample.

        Args:
            picture: Number of the picture's tokens. count: Length of the sequence.
            texts: Length of each sample's text, if there is one.

        Returns:
            Empty if the picture does not fit in.
        """
        if self.order == "picture first":
            starts = [0]
        elif self.order == "picture last":  # text and picture are padded alike, or neither is
            length = texts[0] if texts else 0
            starts = [length if count == length + picture else count - self.padded(picture)]
        else:  # without a text the picture is alone
            starts = [0] if count == picture else list(texts or ())
        return starts if starts and min(starts) >= 0 and max(starts) + picture <= count else []

    def text_start(self, picture: int) -> int:
        """Where the text's tokens begin in joint sequences."""
        return self.padded(picture) if self.order == "picture first" else self.registers


_AURA_FLOW = SequenceLayout(r"single_(transformer_block|layer)s\.", "picture last", registers=8)
_FLUX = SequenceLayout(r"single_(transformer_)?blocks\.", "text first")
# By the names of classes: those of diffusers, and those of the models' own code, which ComfyUI follows.
_LAYOUTS: Mapping[str, SequenceLayout] = {
    "Flux": _FLUX,
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX,
    "AuraFlowTransformer2DModel": _AURA_FLOW,
    "MMDiT": _AURA_FLOW,  # ComfyUI's
    "OpenAISignatureMMDITWrapper": SequenceLayout(order="picture last"),  # SD3, whose base class is an MMDiT too
    "Chroma": _FLUX,
    "ChromaTransformer2DModel": _FLUX,
    "HunyuanVideo": SequenceLayout(r"single_blocks\.", "picture last"),
    "HunyuanVideoTransformer3DModel": SequenceLayout(r"single_transformer_blocks\.", "picture first"),
    "CogVideoXTransformer3DModel": SequenceLayout(
        r"(transformer_blocks\.\d+\.(attn1|ff)|blocks\.\d+\.(q|k|v|attn_out|ff_proj|ff_out))(\.|$)",
        "text first",
        frames_first=True,
    ),
    "OmniGen2Transformer2DModel": SequenceLayout(r"layers\.", "picture last"),
    "QwenImageTransformer2DModel": SequenceLayout(order="text first"),
    "SD3Transformer2DModel": SequenceLayout(),
    "NextDiT": SequenceLayout(r"layers\.", "picture last", padded_to=32),
    "Lumina2Transformer2DModel": SequenceLayout(r"layers\.", "text first", without_padding=True),
    "ZImageTransformer2DModel": SequenceLayout(r"layers\.", "picture first", padded_to=32),
}
# Their second attention is one of the picture with itself.
_SECOND_ATTENTION_OF_PICTURE = ("SD3Transformer2DModel", "OpenAISignatureMMDITWrapper", "MMDiT")


def layout_of(model: nn.Module) -> SequenceLayout | None:
    """The known layout of a model's sequences; ``None``: all sequences are of the picture alone or of text alone."""
    for kind in type(model).__mro__:
        if kind.__name__ in _LAYOUTS:
            return _LAYOUTS[kind.__name__]
    return None


def sees(architecture: str, path: str) -> Sees:
    """Whether a layer sees the picture (also together with text), a text, or as cross attention's key or value a text.

    A vector of the whole picture (of the time step, of a pooled text) counts as picture.

    Args:
        architecture: Name of the model's class. path: Path of the layer.
    """
    if _CROSS.search(path) and architecture not in _SECOND_ATTENTION_OF_PICTURE:
        return "cross"
    return "text" if _TEXT.search(path) else "picture"


def cross_attention_of(path: str) -> str:
    """Path of the attention module around a layer that `sees` as ``cross``."""
    return path.rpartition(".")[0]
