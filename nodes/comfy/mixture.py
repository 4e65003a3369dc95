"""Mixtures on a ComfyUI model: built from LoRAs, injected while the model is loaded, recorded while it samples."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from torch import Tensor

from ...core.adapter import Adapter, is_text_encoder
from ...core.errors import MergeError, name_some
from ...core.layers.keymap import ParameterSlice
from ...core.merge.engine import merge
from ...core.merge.methods import METHODS, MergeMethod
from ...core.mole.attach import Attachment
from ...core.mole.bank import Bank
from ...core.mole.gates import READS_TEXT, GateSet, GateSettings
from ...core.mole.guidance import PromptGateSharing, PromptPassRequired
from ...core.mole.mixture import MixMode, Mixture
from ...core.mole.record import Record
from ...core.mole.trained import TrainedGates
from ..graph_lora import ALL_STEPS, GraphLora, steps_in_words
from ..loaded_loras import LoadedLoras
from . import guiders, lora_loader
from .display import dropped_section, with_dropped_first
from .live_gates import gate_sender
from .merge_guard import guard
from .sampling_reader import ComfySamplingReader

_MODEL_PREFIX = "diffusion_model."
_ATTACHMENT_KEY = "legomole_mixes"  # under which a model patcher holds its mixtures


@dataclass(frozen=True, eq=False)
class ComfyMixture:
    """A mixture for a ComfyUI model. All clones of the model share it.

    Args:
        mixture: The experts that are switched on, with their gates.
        bank: The factors and gates that run.
        record: The gate values of the last sampling run.
        prompt_gates: Lets the samples of other prompts use the gates of the positive prompt.
        text_encoder_weights: Strengths of the experts in the text encoders.
        loaded: The LoRAs of the mixture.
        base: The kind of model, e.g. ``Flux``.
        reader: Reads areas of conditioning and the sampling step, for experts with regions or steps.
        routed: Whether the gates open for words, without training.
    """

    mixture: Mixture
    bank: Bank
    record: Record
    prompt_gates: PromptGateSharing
    text_encoder_weights: tuple[float, ...]
    loaded: LoadedLoras
    base: str
    reader: ComfySamplingReader
    routed: bool = False

    def report(self) -> str:
        """Describe the mixture to the user."""
        m, gates = self.mixture, self.mixture.gates
        s = gates.settings
        kind = f"{len(gates.names)} trained gates ({s.activation}, read {s.reads})" if gates.trained else "even gates"
        kind = "gates that follow the prompt's words" if self.routed else kind
        words = [()] * len(m.experts) if gates.detector is None else gates.detector.words
        count = f"{len(m.experts)} LoRA{'s' * (len(m.experts) != 1)}"
        lines = [f"mix of {count} in {len(self.bank.stacks)} layers, {kind} per {s.granularity}"]
        for i, (label, strength) in enumerate(zip(m.labels, m.strengths, strict=True)):
            called = f", for {' or '.join(words[i])}" if words[i] else ", always on" if self.routed else ""
            where = part_in_words(self.maps[i], m.steps[i])
            remark = ": adds nothing" if strength * m.scale == 0 else called + where
            lines.append(f"  [{i + 1}] {label}: strength {strength * m.scale:g}{remark}")
        if m.regions == "automatic":
            lines.append(
                "  regions: automatic, from the attention to each LoRA's words in the first quarter of the steps"
            )
        if len(m.experts) == 1 and s.activation == "softmax":
            lines.append("  note: a softmax over one LoRA is always 1")
        lines += dropped_section(self.loaded.dropped)
        text = "\n".join([*lines, *(f"  note: {note}" for note in (*self._notes(), *self.loaded.notes))])
        return with_dropped_first(text, self.loaded.dropped)

    @property
    def maps(self) -> tuple[Tensor | None, ...]:
        """The map of each expert's region, where it has one before sampling."""
        return _maps(self.mixture)

    def _notes(self) -> Iterator[str]:
        """What of LoRAs with regions or steps acts everywhere and in all steps."""
        m = self.mixture
        for expert, map_, steps, weight in zip(m.experts, self.maps, m.steps, self.text_encoder_weights, strict=True):
            if map_ is None and steps == ALL_STEPS:
                continue
            if _has_ungated(_select(expert, lambda name: not is_text_encoder(name), modules=False)):
                yield f"{expert.label}: its biases, norms or replaced values have no gate: they act everywhere, always"
            if weight and any(map(is_text_encoder, (*expert.modules, *expert.diffs))):
                yield f"{expert.label}: its text encoder layers change every prompt that is encoded with this CLIP"


def part_in_words(map_: Tensor | None, steps: tuple[float, float]) -> str:
    """Where and when a LoRA acts, as the end of a sentence: ``, in 50% of the picture, in steps 0 to 40%``."""
    where = "" if map_ is None else f", in {100 * float(map_.mean()):.2g}% of the picture"
    return where + ("" if steps == ALL_STEPS else f", in {steps_in_words(steps)}")


def mixtures_of(model: Any) -> tuple[ComfyMixture, ...]:
    """Return the mixtures on a MODEL, in the order in which they were applied; none after `pass_through`.

    Raises:
        MergeError: The MODEL comes from no MoLE Mix.
    """
    mixtures: tuple[ComfyMixture, ...] | None = model.get_attachment(_ATTACHMENT_KEY)
    if mixtures is None:
        raise MergeError(
            "There is no mix on this model.",
            expected="the MODEL output of MoLE Mix",
            remedy="connect it, directly or through other nodes that pass the model on",
        )
    return mixtures


def build_mixture(
    loras: Sequence[GraphLora],
    model: Any,
    clip: Any,
    *,
    loaded: LoadedLoras | None = None,
    gates: TrainedGates | None = None,
    settings: GateSettings | None = None,
    scale: float = 1.0,
    mixing: MixMode = "delta",
    switched_off: Sequence[int] = (),
    regions: Sequence[Any] | Literal["automatic"] = (),
    steps: Sequence[tuple[float, float]] = (),
) -> ComfyMixture:
    """Build a mixture of LoRAs for a model.

    Args:
        loras: The experts, in the order of the sockets, with their strengths.
        model: A MODEL.
        clip: A CLIP or ``None``.
        loaded: The same LoRAs, loaded for the model; default they are loaded now.
        gates: Trained gates of these experts, in any order.
        settings: Settings of untrained gates, used without `gates`.
        scale: Factor on all strengths.
        mixing: See `Mixture`.
        switched_off: Positions of experts that are switched off.
        regions, steps: Where in the picture, and in which part of the sampling steps, each LoRA acts, see `Mixture`.

    Raises:
        MergeError: LoRAs or gates of another model, or all LoRAs are switched off.
        FormatError: A file that cannot be read, or that holds NaN or infinity.
    """
    loaded = (loaded or lora_loader.read(loras, model, clip)).hashed()
    layers = {
        name: ParameterSlice(rows.key.removeprefix(_MODEL_PREFIX).removesuffix(".weight"), rows.start, rows.stop)
        for name, rows in loaded.slices.items()
        if rows.key.startswith(_MODEL_PREFIX)
    }
    base = lora_loader.base_of(model)
    gate_set = GateSet(len(loras), settings) if gates is None else gates.of(loaded.adapters, base)
    for adapter in loaded.adapters:
        adapter.check_finite()
        if not any(name in layers for name in adapter.modules):
            raise MergeError(
                "This LoRA changes no layer of the diffusion model that can be mixed.",
                file=adapter.source.path or adapter.label,
                found=name_some(adapter.layers, 3) if adapter.layers else "only replaced values",
                remedy="apply it with a stock loader instead",
            )
    strengths = tuple(lora.strength_model for lora in loras)
    with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode allow no gradients
        all_experts = Mixture(tuple(loaded.adapters), gate_set, strengths, scale, mixing, layers, regions, steps)
        mixture = all_experts.without(*switched_off)
        bank = Bank(model.model.diffusion_model, mixture, dtype=model.model.get_dtype_inference())
    return ComfyMixture(
        mixture,
        bank,
        _PromptRecord(guiders.prompt_rows),
        PromptGateSharing(guiders.prompt_rows, separate_passes=True, texts=guiders.prompt_texts),
        tuple(lora.strength_clip for i, lora in enumerate(loras) if i not in switched_off),
        loaded,
        base,
        ComfySamplingReader(_maps(mixture), mixture.labels),
    )


def apply_to_model(mix: ComfyMixture, model: Any) -> Any:
    """Return a clone of the MODEL with the mixture on it. Biases and norms have no gate: they are patched in."""
    patched = model.clone()
    for adapter, strength in zip(mix.mixture.experts, mix.mixture.strengths, strict=True):
        ungated = _select(adapter, lambda name: not is_text_encoder(name), modules=False)
        if _has_ungated(ungated) and strength:
            lora = GraphLora(ungated, adapter.label)
            patched, _ = lora_loader.apply(lora, patched, None, strength * mix.mixture.scale, 0.0)
    key = f"{_ATTACHMENT_KEY}_{uuid.uuid4().hex}"
    bank = ModelPatcher(mix.bank, load_device=model.load_device, offload_device=model.offload_device)
    patched.set_additional_models(key, [bank])
    patched.set_injections(key, [_injection(mix)])
    patched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, key, lambda _: _begin_run(mix))
    send_gates = gate_sender(mix.record, tuple(mix.mixture.labels))
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, partial(guiders.predict_noise, mix.prompt_gates))
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, key, partial(_calculate, mix, send_gates))
    patched.set_attachments(_ATTACHMENT_KEY, (*(model.get_attachment(_ATTACHMENT_KEY) or ()), mix))
    guard(patched)
    return patched


def pass_through(model: Any) -> Any:
    """Return a clone of a MODEL that gets no mixture, because no LoRA is left; Gate Map says so."""
    patched = model.clone()
    patched.set_attachments(_ATTACHMENT_KEY, model.get_attachment(_ATTACHMENT_KEY) or ())
    return patched


def _begin_run(mix: ComfyMixture) -> None:
    mix.record.passes.clear()
    mix.record.maps = ()
    mix.reader.begin_run()
    mix.prompt_gates.forget()


def _calculate(
    mix: ComfyMixture,
    send_gates: Callable[[Tensor], None],
    calculate: Any,
    model: Any,
    conds: Sequence[Any],
    *rest: Any,
) -> Any:
    mix.reader.begin_step(model, conds, rest[0])
    predictions = _predict_prompt_first(mix, calculate, model, conds, *rest)
    send_gates(rest[0])
    return predictions


def _predict_prompt_first(mix: ComfyMixture, calculate: Any, model: Any, conds: Sequence[Any], *rest: Any) -> Any:
    """Predict for all conds so that the others can use the gates of the positive prompt.

    Gates that read text get the positive prompt from the guider; others must see a pass of it first.
    """
    positive = [i for i, cond in enumerate(conds) if guiders.is_positive(cond)]
    if not positive and len(conds) > 1 and guiders.is_positive(conds[0]) is None:
        positive = [0] if conds[0] is not None else []
        mix.prompt_gates.begin_step()
    others = [i for i, cond in enumerate(conds) if cond is not None and i not in positive]
    first = bool(positive and others) and mix.bank.gates.settings.reads not in READS_TEXT
    mix.prompt_gates.require_prompt_first = first
    try:
        return calculate(model, conds, *rest)
    except PromptPassRequired:  # with too little memory for one batch ComfyUI runs the last cond first
        mix.prompt_gates.require_prompt_first = False
        of_prompt = calculate(model, [cond if i in positive else None for i, cond in enumerate(conds)], *rest)
        of_others = calculate(model, [None if i in positive else cond for i, cond in enumerate(conds)], *rest)
        return [(of_prompt if i in positive else of_others)[i] for i in range(len(conds))]


def _injection(mix: ComfyMixture) -> PatcherInjection:
    """Attach the mixture to the network a patcher holds when it is injected, and detach it from that one only."""
    attached: weakref.WeakKeyDictionary[Any, ExitStack] = weakref.WeakKeyDictionary()

    def inject(patcher: Any) -> None:
        if patcher in attached:
            return
        stack = ExitStack()
        network = patcher.model.diffusion_model
        attachment = stack.enter_context(
            Attachment(network, mix.bank, prompt_gates=mix.prompt_gates, sampling=mix.reader)
        )
        stack.enter_context(attachment.watch(mix.record))
        attached[patcher] = stack

    def eject(patcher: Any) -> None:
        stack = attached.pop(patcher, None)
        if stack is not None:
            stack.close()

    return PatcherInjection(inject=inject, eject=eject)


def apply_to_clip(mix: ComfyMixture, model: Any, clip: Any, method: MergeMethod | None = None) -> Any:
    """Return the CLIP with the experts' text encoder modules merged into it; the same CLIP if they have none.

    Args:
        mix: The mixture.
        model: The MODEL it was built for.
        clip: The CLIP or ``None``.
        method: The merge method; default the exact sum.
    """
    parts = [_select(adapter, is_text_encoder) for adapter in mix.mixture.experts]
    used = [i for i, part in enumerate(parts) if (part.modules or part.diffs) and mix.text_encoder_weights[i]]
    if clip is None or not used:
        return clip
    weights = [mix.text_encoder_weights[i] for i in used]
    merged = merge([parts[i] for i in used], method or METHODS["concat"](), weights).adapter
    _, patched = lora_loader.apply(GraphLora(mix.loaded.finish(merged), "text encoders"), model, clip, 0.0, 1.0)
    return patched


def _maps(mixture: Mixture) -> tuple[Tensor | None, ...]:
    return (None,) * len(mixture.experts) if mixture.regions == "automatic" else mixture.regions


def _has_ungated(part: Adapter) -> bool:
    return bool(part.diffs or part.extras)


def _select(adapter: Adapter, wanted: Callable[[str], bool], *, modules: bool = True) -> Adapter:
    """Return the part of an adapter whose names are wanted, optionally without its low-rank modules."""
    return replace(
        adapter,
        modules={name: part for name, part in adapter.modules.items() if modules and wanted(name)},
        diffs={name: tensor for name, tensor in adapter.diffs.items() if wanted(name)},
        extras={name: tensor for name, tensor in adapter.extras.items() if wanted(name)},
    )


class _PromptRecord(Record):
    """A record that keeps of a pass's arguments only which samples are the prompt's: others would keep the model."""

    def begin_pass(self, arguments: Mapping[str, Any]) -> None:
        super().begin_pass({"transformer_options": {"cond_or_uncond": guiders.prompt_numbers(arguments)}})
