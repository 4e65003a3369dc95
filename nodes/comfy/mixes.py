"""Mixtures in a ComfyUI model: built from its LoRAs, injected while it is loaded, recorded while it samples."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP

from ...core.adapter import Adapter, is_text_encoder
from ...core.errors import MergeError, name_some
from ...core.layers.keymap import ParameterSlice
from ...core.merge.engine import merge
from ...core.merge.methods import MergeMethod
from ...core.mole.attach import Attachment
from ...core.mole.bank import Bank
from ...core.mole.gates import GateSet, GateSettings
from ...core.mole.guidance import PromptGateSharing, PromptPassRequired
from ...core.mole.mixture import MixMode, Mixture
from ...core.mole.record import Record
from ...core.mole.trained import TrainedGates
from ..loaded_loras import LoadedLoras
from ..lora import Lora
from . import lora_loader
from .live import telling

_MODEL = "diffusion_model."
_KEY = "legomole_mixes"  # attachment of a model patcher: the mixes on it, in order


@dataclass(frozen=True, eq=False)
class Mix:
    """A mixture on a ComfyUI model. Shared by all clones of the model it was made for.

    Args:
        mixture: The experts that are switched on, with their gates.
        bank: What runs. record: Of the last sampling run.
        prompt_gates: Gives negative prompts the gates of the prompt.
        text_encoder_weights: Strengths of the experts in the text encoders.
        reading: How the LoRAs were read; knows how to name a merged one.
        base: The kind of model.
    """

    mixture: Mixture
    bank: Bank
    record: Record
    prompt_gates: PromptGateSharing
    text_encoder_weights: tuple[float, ...]
    reading: LoadedLoras
    base: str

    def text(self) -> str:
        """What was mixed, for people."""
        m, gates = self.mixture, self.mixture.gates
        s = gates.settings
        kind = f"{len(gates.names)} trained gates ({s.activation}, read {s.reads})" if gates.trained else "even gates"
        count = f"{len(m.experts)} LoRA{'s' * (len(m.experts) != 1)}"
        lines = [f"mix of {count} in {len(self.bank.stacks)} layers, {kind} per {s.granularity}"]
        for i, (label, strength) in enumerate(zip(m.labels, m.strengths, strict=True)):
            silent = ": adds nothing" if strength * m.scale == 0 else ""
            lines.append(f"  [{i + 1}] {label}: strength {strength * m.scale:g}{silent}")
        if len(m.experts) == 1 and s.activation == "softmax":
            lines.append("  note: a softmax over one LoRA is always 1")
        if self.reading.dropped:
            lines.append(f"  DROPPED ({len(self.reading.dropped)}):")
            lines += [f"    {line}" for line in self.reading.dropped[:10]]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.reading.notes)])


def base_of(model: Any) -> str:
    """The kind of a MODEL in ComfyUI's words, e.g. ``Flux``."""
    return type(model.model).__name__


def mixes_of(model: Any) -> tuple[Mix, ...]:
    """The mixes on a MODEL.

    Raises:
        MergeError: There are none.
    """
    found: tuple[Mix, ...] = model.get_attachment(_KEY) or ()
    if not found:
        raise MergeError(
            "There is no mix on this model.",
            expected="the MODEL output of MoLE Mix",
            remedy="connect it, directly or through other nodes that pass the model on",
        )
    return found


def build(
    loras: Sequence[Lora],
    model: Any,
    clip: Any,
    *,
    reading: LoadedLoras | None = None,
    gates: TrainedGates | None = None,
    settings: GateSettings | None = None,
    scale: float = 1.0,
    mixing: MixMode = "delta",
    off: Sequence[int] = (),
) -> Mix:
    """Read LoRAs as experts for a model.

    Args:
        loras: In the order of the sockets; their strengths are the experts'.
        model: A MODEL. clip: A CLIP or ``None``.
        reading: What was read of the LoRAs for them; default: they are read now.
        gates: Trained ones, in any order. settings: Of untrained gates, where there are none.
        scale: On all strengths. mixing: See `Mixture`.
        off: Positions of experts that are switched off.

    Raises:
        MergeError: LoRAs or gates for another model, or all LoRAs switched off.
        FormatError: A file that cannot be read, or that holds NaN or infinity.
    """
    reading = reading or lora_loader.read(loras, model, clip)
    places = {
        name: ParameterSlice(place.key.removeprefix(_MODEL).removesuffix(".weight"), place.start, place.stop)
        for name, place in reading.places.items()
        if place.key.startswith(_MODEL)
    }
    base = base_of(model)
    chosen = GateSet(len(loras), settings) if gates is None else gates.of(reading.adapters, base)
    for adapter in reading.adapters:
        adapter.check_finite()
        if not any(name in places for name in adapter.modules):
            raise MergeError(
                "This LoRA changes no layer of the diffusion model that can be mixed.",
                file=adapter.source.path or adapter.label,
                found=name_some(adapter.layers, 3) if adapter.layers else "only replaced values",
                remedy="apply it with a stock loader instead",
            )
    with torch.inference_mode(False), torch.no_grad():  # or no gradient could pass through the factors
        whole = Mixture(tuple(reading.adapters), chosen, tuple(x.strength_model for x in loras), scale, mixing, places)
        mixture = whole.without(*off)
        bank = Bank(model.model.diffusion_model, mixture, dtype=model.model.get_dtype_inference())
    kept = [i for i in range(len(loras)) if i not in off]
    weights = tuple(loras[i].strength_clip for i in kept)
    prompt_gates = PromptGateSharing(_prompt_rows, separate_passes=True)
    return Mix(mixture, bank, _Record(_prompt_rows), prompt_gates, weights, reading, base)


def on_model(mix: Mix, model: Any) -> Any:
    """A clone of the MODEL with the mix on it. What no gate can rule (biases, norms) is patched in as by a loader."""
    patched = model.clone()
    for adapter, strength in zip(mix.mixture.experts, mix.mixture.strengths, strict=True):
        rest = _part(adapter, lambda name: not is_text_encoder(name), modules=False)
        if (rest.diffs or rest.extras) and strength:
            patched, _ = lora_loader.apply(Lora(rest, adapter.label), patched, None, strength * mix.mixture.scale, 0.0)
    key = f"{_KEY}_{uuid.uuid4().hex}"
    bank = ModelPatcher(mix.bank, load_device=model.load_device, offload_device=model.offload_device)
    patched.set_additional_models(key, [bank])
    patched.set_injections(key, [_injection(mix)])
    patched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, key, lambda _: mix.record.passes.clear())
    tell = telling(mix.record, tuple(mix.mixture.labels))
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, key, partial(_guided, mix.prompt_gates, tell))
    patched.set_attachments(_KEY, (*(model.get_attachment(_KEY) or ()), mix))
    return patched


def _guided(
    prompt_gates: PromptGateSharing,
    tell: Callable[[], None],
    calculate: Any,
    model: Any,
    conds: Sequence[Any],
    *rest: Any,
) -> Any:
    predictions = _with_prompt_gates(prompt_gates, calculate, model, conds, *rest)
    tell()
    return predictions


def _with_prompt_gates(
    prompt_gates: PromptGateSharing, calculate: Any, model: Any, conds: Sequence[Any], *rest: Any
) -> Any:
    """ComfyUI's own guidance asks for two predictions, the prompt's first; other guidance goes by its own words."""
    prompt_gates.enabled = len(conds) == 2
    if not prompt_gates.enabled:
        return calculate(model, conds, *rest)
    if conds[0] is not None:
        prompt_gates.begin_step()
    prompt_gates.require_prompt_first = None not in conds
    try:
        return calculate(model, conds, *rest)
    except PromptPassRequired:  # ComfyUI's order where memory is too short for both at once
        prompt_gates.require_prompt_first = False
        prompt = calculate(model, [conds[0], None], *rest)
        negative = calculate(model, [None, conds[1]], *rest)
        return [prompt[0], negative[1]]


def _injection(mix: Mix) -> PatcherInjection:
    """Puts the mixture on whatever network the patcher holds at the time, and takes off only what it put there."""
    at_work: weakref.WeakKeyDictionary[Any, ExitStack] = weakref.WeakKeyDictionary()

    def inject(patcher: Any) -> None:
        if patcher in at_work:
            return
        stack = ExitStack()
        network = patcher.model.diffusion_model
        attachment = stack.enter_context(Attachment(network, mix.bank, prompt_gates=mix.prompt_gates))
        stack.enter_context(attachment.watch(mix.record))
        at_work[patcher] = stack

    def eject(patcher: Any) -> None:
        stack = at_work.pop(patcher, None)
        if stack is not None:
            stack.close()

    return PatcherInjection(inject=inject, eject=eject)


def on_clip(mix: Mix, model: Any, clip: Any, method: MergeMethod) -> Any:
    """The CLIP with the experts' text encoder parts merged into it; the same CLIP where they have none."""
    parts = [_part(adapter, is_text_encoder) for adapter in mix.mixture.experts]
    used = [i for i, part in enumerate(parts) if (part.modules or part.diffs) and mix.text_encoder_weights[i]]
    if clip is None or not used:
        return clip
    merged = merge([parts[i] for i in used], method, [mix.text_encoder_weights[i] for i in used]).adapter
    _, patched = lora_loader.apply(Lora(mix.reading.finish(merged), "text encoders"), model, clip, 0.0, 1.0)
    return patched


def _part(adapter: Adapter, wanted: Callable[[str], bool], *, modules: bool = True) -> Adapter:
    """What an adapter says of some layers."""
    return replace(
        adapter,
        modules={name: part for name, part in adapter.modules.items() if modules and wanted(name)},
        diffs={name: tensor for name, tensor in adapter.diffs.items() if wanted(name)},
        extras={name: tensor for name, tensor in adapter.extras.items() if wanted(name)},
    )


class _Record(Record):
    """Keeps only what tells samples apart: the other arguments lead back to the model, and would keep it alive."""

    def begin_pass(self, arguments: Mapping[str, Any]) -> None:
        super().begin_pass({"transformer_options": {"cond_or_uncond": _parts(arguments)}})


def _parts(arguments: Mapping[str, Any]) -> list[int]:
    """Of a batch: 0 for the prompt, 1 for the negative one."""
    return list((arguments.get("transformer_options") or {}).get("cond_or_uncond") or [0])


def _prompt_rows(arguments: Mapping[str, Any], batch: int) -> Sequence[int]:
    """The samples of the positive prompt: ComfyUI puts it and the negative one into one batch, in this order."""
    parts = _parts(arguments)
    size = batch // len(parts) or 1
    return [row for i, part in enumerate(parts) if part == 0 for row in range(i * size, min((i + 1) * size, batch))]
