"""Findings in names and metadata: speed-up LoRAs, sliders, halves of Wan 2.2, different base models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ...adapter import Adapter, base_model
from ...errors import MergeError
from .finding import Finding

# Files that are named by their folder.
_UNNAMED = re.compile(r"(pytorch_lora_weights|adapter_model|model|lora)(\.safetensors)?", re.IGNORECASE)
_TITLES = ("modelspec.title", "ss_output_name")
# Base models whose name contains the name of a speed-up.
_FAST_BASES = re.compile(r"z[-_. ]?image[-_. ]?turbo|krea[-_. ]?2[-_. ]?turbo|sd[-_. ]?3[-_.]?5[-_. ]large[-_. ]?turbo")
_SPEED_UPS = re.compile(
    r"(?<![a-z])(lcm|dmd2?|lightx2v|hyper[-_. ]?(?:sd|flux|sdxl)[a-z0-9]*|lightning|hyper|turbo)(?![a-z])"
)
_AMBIGUOUS = ("lightning", "hyper", "turbo")
# What names of speed-up LoRAs hold besides. A word such as "lightning" alone may be a subject.
_CONTEXT = re.compile(
    r"\d[-_. ]?steps?|distill|(?<![a-z])(sd|sdxl|xl|wan)(?![a-z])|(?<![a-z])sd[-_.]?\d|wan\d|qwen|flux"
)
_FILLERS = re.compile(r"(?<![a-z])(lora|alpha|v?\d[\d.]*|fp16|bf16|rank\d*)(?![a-z])|[-_. \d]+")
_SLIDER = re.compile(r"(?<![a-z])sliders?(?![a-z])")
_HIGH = re.compile(r"high[-_. ]?noise|(?<![a-z])hn(?![a-z])")
_LOW = re.compile(r"low[-_. ]?noise|(?<![a-z])ln(?![a-z])")
_HIGH_WORD, _LOW_WORD = (re.compile(rf"(?<![a-z]){word}(?![a-z])") for word in ("high", "low"))

# Spellings of base models in metadata -> a name that tells whether LoRAs fit together.
_FAMILIES = {
    "SDXL": r"sdxl|sd[-_]xl|stable-diffusion-xl",
    "SD 3.5": r"stable-diffusion-3\.5|sd3\.5",
    "SD 3": r"stable-diffusion-3|sd3",
    "SD 2": r"sd_v2|stable-diffusion-(v|v-)?2|sd2",
    "SD 1": r"sd_v1|stable-diffusion-v-?1|sd1",
    "FLUX.2": r"flux\.?-?2",
    "FLUX.1": r"flux",
    "Qwen-Image": r"qwen[-_]?image",
    "Z-Image": r"z[-_]?image",
    "Wan 2.2": r"wan[-_]?2[._]?2",
    "Wan 2.1": r"wan[-_]?2[._]?1",
    "HunyuanVideo": r"hunyuan[-_]?video",
    "Lumina 2": r"lumina[-_]?(image[-_]?)?2",
    "Chroma": r"chroma",
    "LTX-Video": r"ltx",
}


def names_of(adapter: Adapter) -> list[str]:
    """The names a LoRA goes by, in lower case: of its file, or of the folder of an unnamed one, and its titles."""
    *folders, _ = ["", *adapter.source.path.replace("\\", "/").rstrip("/").split("/")]
    name = folders[-1] if _UNNAMED.fullmatch(adapter.label) else adapter.label
    return [name.lower() for name in (name, *(adapter.metadata.get(key, "") for key in _TITLES)) if name]


def speed_up_word(adapter: Adapter) -> str:
    """The word by which a LoRA's names or metadata call it a speed-up, such as ``lcm``; ``""`` if none does."""
    for name in names_of(adapter):
        name = _FAST_BASES.sub("", name)
        match = _SPEED_UPS.search(name)
        if match is None:
            continue
        rest = name.replace(match[0], "", 1)
        if match[0] not in _AMBIGUOUS or _CONTEXT.search(rest) or not _FILLERS.sub("", rest):
            return match[0]
    return ""


def speed_ups(adapters: Sequence[Adapter]) -> Iterator[Finding]:
    """LoRAs that make sampling faster: they act on every direction alike and are of no use in parts."""
    for adapter in adapters:
        word = speed_up_word(adapter)
        if word:
            yield Finding(
                "speed_up", (adapter.label,), (), 1.0, 1.0,
                f"{adapter.label} is a speed-up LoRA by its name ({word}): it must be added whole, and clustering "
                "replaces its units",
                "merge with the method concat, or merge the others and load this one beside the result",
            )  # fmt: skip


def sliders(adapters: Sequence[Adapter]) -> Iterator[Finding]:
    """LoRAs whose strength is a control, in both directions."""
    for adapter in adapters:
        if any(_SLIDER.search(name) for name in names_of(adapter)):
            yield Finding(
                "slider", (adapter.label,), (), 1.0, 1.0,
                f"{adapter.label} is a slider by its name: a merge fixes its position",
                "merge it at the strength you want, or load it beside the result",
            )  # fmt: skip


def wan_noise_halves(adapters: Sequence[Adapter]) -> Iterator[Finding]:
    """LoRAs of both halves of Wan 2.2, which are two models."""
    halves: dict[str, list[str]] = {"high": [], "low": []}
    for adapter in adapters:
        half = _noise_half(adapter)
        if half:
            halves[half].append(adapter.label)
    if halves["high"] and halves["low"]:
        high, low = (halves[half] for half in ("high", "low"))
        yield Finding(
            "wan_noise_halves", (*high, *low), (), float(min(len(high), len(low))), 1.0,
            f"{', '.join(high)} and {', '.join(low)} are named as for the high and the low noise half of Wan 2.2, "
            "which are two models",
            "merge the LoRAs of each half by themselves; rename a file if its name is wrong",
        )  # fmt: skip


def refuse_noise_halves(adapters: Sequence[Adapter]) -> None:
    """Raise MergeError if LoRAs for both halves of Wan 2.2 are to be merged."""
    for finding in wan_noise_halves(adapters):
        raise MergeError(
            "LoRAs for the high and the low noise half of Wan 2.2 cannot be merged into one.",
            expected="LoRAs for one half",
            found=", ".join(finding.loras),
            remedy=finding.remedy,
        )


def different_bases(adapters: Sequence[Adapter]) -> Iterator[Finding]:
    """The metadata names base models of different families, or different base models of unknown families."""
    families = {adapter.label: family for adapter in adapters if (family := _family(adapter))}
    known = {label: name for label, (name, is_known) in families.items() if is_known}
    unknown = {label: name for label, (name, is_known) in families.items() if not is_known}
    for named in (known, unknown):
        distinct = list(dict.fromkeys(named.values()))
        if len(distinct) > 1:
            pairs = ", ".join(f"{label} for {name}" for label, name in named.items())
            yield Finding(
                "base_models", tuple(named), (), float(len(distinct)), 2.0,
                f"the LoRAs were trained on {len(distinct)} different base models: {pairs}",
                "merge only LoRAs of one base model",
            )  # fmt: skip


def _noise_half(adapter: Adapter) -> str:
    for name in names_of(adapter):
        high, low = bool(_HIGH.search(name)), bool(_LOW.search(name))
        if "wan" in name:
            high, low = high or bool(_HIGH_WORD.search(name)), low or bool(_LOW_WORD.search(name))
        if high != low:
            return "high" if high else "low"
    return ""


def _family(adapter: Adapter) -> tuple[str, bool] | None:
    """Family of the base model that the metadata names, and whether it is a known one."""
    name = (base_model(adapter.metadata) or "").lower().removesuffix("/lora").replace("\\", "/").rstrip("/")
    for family, pattern in _FAMILIES.items():
        if re.search(pattern, name):
            return family, True
    name = name.rsplit("/", 1)[-1]
    return (name, False) if name else None
