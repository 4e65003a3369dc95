"""Findings about how much the LoRAs change: loudness of LoRAs and of their text encoder layers."""

from __future__ import annotations

from collections.abc import Iterator

from ...adapter import is_text_encoder
from .examined import Examined, root_mean_square
from .finding import Finding

LOUDNESS = 4.0
"""Ratio of two LoRAs' norms: from here on the quieter one has less than 6 % of the sum's energy. Ranks from 4 to 32
alone make a ratio of 2.8."""
TEXT_ENCODER = 3.0
"""Ratio of the mean norms of text encoder layers and other layers; trainers give text encoders a lower learning rate,
so that a mean norm above that of the other layers is unusual."""


def loudness(examined: Examined) -> Iterator[Finding]:
    """The loudest and the quietest LoRA are far apart, at the user's weights."""
    sizes = {i: float(examined.inner[i, i].clamp_min(0).sqrt()) for i in examined.used}
    sizes = {i: size for i, size in sizes.items() if size > 0}
    if len(sizes) < 2:
        return
    loud, quiet = max(sizes, key=lambda i: sizes[i]), min(sizes, key=lambda i: sizes[i])
    ratio = sizes[loud] / sizes[quiet]
    if ratio >= LOUDNESS:
        louder, quieter = examined.labels[loud], examined.labels[quiet]
        yield Finding(
            "loudness", (louder, quieter), (), ratio, LOUDNESS,
            f"{louder} is {ratio:.3g} times as loud as {quieter} at these weights ({LOUDNESS:g} or more is far apart)",
            "merge with equalize 0.5 to 1, or with the suggested strengths",
        )  # fmt: skip


def loud_text_encoders(examined: Examined) -> Iterator[Finding]:
    """A LoRA changes the text encoder much more than the rest of the model."""
    for i in examined.used:
        norms = examined.norms[i]
        text = [norm for name, norm in norms.items() if is_text_encoder(name) and norm > 0]
        rest = [norm for name, norm in norms.items() if not is_text_encoder(name) and norm > 0]
        if not text or not rest:
            continue
        ratio, label = root_mean_square(text) / root_mean_square(rest), examined.labels[i]
        if ratio >= TEXT_ENCODER:
            yield Finding(
                "text_encoder_loud", (label,), tuple(filter(is_text_encoder, norms)), ratio, TEXT_ENCODER,
                f"{label} changes a text encoder layer {ratio:.3g} times as much as another layer, at these weights "
                f"({TEXT_ENCODER:g} or more is much)",
                f"give its text encoder a lower weight, such as {1 / ratio:.2g} of the other one",
            )  # fmt: skip
