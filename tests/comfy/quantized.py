"""Run by ComfyUI's own Python: mixes, merges, statistics and training on quantised and offloaded models.

Usage: quantized.py <ComfyUI> <base directory> <case> .. Prints one JSON object: case -> measurements. A quantised model
is compared with the same weights after dequantisation, an offloaded one with the loaded one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

COMFY, BASE = (Path(argument) for argument in sys.argv[1:3])
NAMES = sys.argv[3:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[0:0] = [str(COMFY), str(BASE / "custom_nodes")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor  # noqa: E402
from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: E402
from legomole.core.adapter import Adapter  # noqa: E402
from legomole.core.errors import LegoMoleError  # noqa: E402
from legomole.core.mole.gates import GateSettings  # noqa: E402
from legomole.core.train import TrainSettings, prompts_for  # noqa: E402
from legomole.core.train.measure import CalibrationSettings  # noqa: E402
from legomole.nodes.comfy import lora_loader, mixture, training  # noqa: E402
from legomole.nodes.graph_lora import GraphLora  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

LORAS = BASE / "models" / "loras"
# Format -> further entries of the layer's configuration in the file.
FORMATS: dict[str, dict[str, Any]] = {
    "float8_e4m3fn": {},
    "int8_tensorwise": {},
    "mxfp8": {},
    "nvfp4": {},
    "convrot_w4a4": {"convrot_groupsize": 64},
    "asym_w4a8_int8": {"group_size": 16, "convrot_groupsize": 64},
}
WEIGHTS = load_file(BASE / "models/diffusion_models/flux_nano.safetensors")
CONTEXT, CHANNELS = 768, 16


def quantised(name: str) -> tuple[Any, Any]:
    """Return the tiny Flux with the layers of its blocks in a format, and the same model dequantised."""
    state, dequantised = dict(WEIGHTS), dict(WEIGHTS)
    layout = QUANT_ALGOS[name]["comfy_tensor_layout"]
    for key, weight in WEIGHTS.items():
        if "blocks." in key and weight.ndim == 2:
            stored = QuantizedTensor.from_float(weight, layout, **FORMATS[name])
            dequantised[key] = stored.dequantize().float()
            state.update(stored.state_dict(key))
            config = json.dumps({"format": name, **FORMATS[name]}).encode()
            state[key.replace(".weight", ".comfy_quant")] = torch.tensor(list(config), dtype=torch.uint8)
    return load(state), load(dequantised)


def load(state: dict[str, Tensor]) -> Any:
    """Load a model from a file, so that it can be copied for training."""
    path = BASE / f"quantised_{len(list(BASE.glob('quantised_*')))}.safetensors"
    comfy.utils.save_torch_file({key: tensor.contiguous() for key, tensor in state.items()}, str(path))
    return comfy.sd.load_diffusion_model(str(path))


def lora(name: str, strength: float = 1.0, convert_rank: int = 0) -> GraphLora:
    return GraphLora(LORAS / f"{name}.safetensors", name, strength, strength, convert_rank)


PAIR = (lora("flux_kohya", 0.7), lora("flux_split", -1.3))


class Clip:
    """Text encoders whose output is random but the same for the same prompt."""

    def encode_from_tokens_scheduled(self, tokens: str) -> Any:
        generator = torch.Generator().manual_seed(len(tokens) + 7 * sum(tokens.encode()))
        states = torch.randn(1, 8, CONTEXT, generator=generator)
        return [[states, {"pooled_output": torch.randn(1, CONTEXT, generator=generator)}]]

    def tokenize(self, text: str) -> str:
        return text


def sample(model: Any) -> Tensor:
    start = torch.randn(1, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(7))
    positive, negative = (Clip().encode_from_tokens_scheduled(text) for text in ("a", "b"))
    latent = torch.zeros_like(start)
    return comfy.sample.sample(
        model, start, 2, 2.0, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=7
    ).float()


def stock(model: Any) -> Any:
    for value in PAIR:
        model, _ = comfy.sd.load_lora_for_models(model, None, load_file(value.content), value.strength_model, 0.0)
    return model


def mixed(model: Any) -> Any:
    return mixture.apply_to_model(mixture.build_mixture(PAIR, model, None), model)


def distance(a: Tensor, b: Tensor, plain: Tensor) -> float:
    """Return the largest difference, relative to the largest change the LoRAs make."""
    return float((a - b).abs().max() / (b - plain).abs().max())


def setup(model: Any, reads: str) -> training.SamplingSetup:
    mix = mixture.build_mixture(PAIR, model, None, settings=GateSettings(granularity="block", reads=reads))
    concepts = [["ember"], ["heart"]]
    prompts = prompts_for(concepts, ["ember", "heart", "heart in ember", "dog"])
    return training.SamplingSetup(mix, model, Clip(), Clip(), torch.zeros(1, CHANNELS, 8, 8), prompts, concepts, 1.0, 1)


def statistics(model: Any) -> dict[str, Tensor]:
    measured = training.calibrate(
        setup(model, "hidden"), CalibrationSettings(mode="thorough", samples=2, batch=2), lambda *_: None
    )
    return {name: torch.cat([m.flatten() for m in _tensors(module)]) for name, module in measured.modules.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.float()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for field in value.__dataclass_fields__:
            yield from _tensors(getattr(value, field))


def trained(model: Any) -> tuple[list[float], dict[str, Tensor]]:
    result, _ = training.train_gates(
        setup(model, "hidden"),
        TrainSettings(steps=4, samples=4, examples=8, batch=4),
        checkpointing=True,
        images={},
        captions={},
        folder=BASE / "unfinished",
        progress=lambda *_: None,
        keep=lambda _: None,
    )
    gates = result.gates.gates
    return list(result.fit.losses), {name: gates[name].weight.detach() for name in gates.names}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {name: part.delta().float() for name, part in adapter.modules.items()}


def on_quantised(name: str) -> Callable[[], Any]:
    def case() -> Any:
        model, reference = quantised(name)
        plain, expected = sample(reference), sample(stock(reference))
        measured: dict[str, Any] = {
            "quantised layers": sum(isinstance(p, QuantizedTensor) for p in model.model.parameters()),
            "base": distance(sample(model), plain, expected),
            "mix": distance(sample(mixed(model)), expected, plain),
            "stock": distance(sample(stock(model)), expected, plain),
        }
        applied = model
        for value in PAIR:
            applied, _ = lora_loader.apply(value, applied, None, 1.0, 0.0)
        measured["apply"] = float((sample(applied) - sample(stock(model))).abs().max())
        for kind in ("flux_kohya", "dora"):
            ours, theirs = (lora_loader.read([lora(kind, 1.0, 128)], m, None).adapters[0] for m in (model, reference))
            measured[f"read {kind}"] = furthest(deltas(ours), deltas(theirs))
        measured["statistics"] = furthest(statistics(model), statistics(reference))
        (losses, gates), (expected_losses, expected_gates) = trained(model), trained(reference)
        measured["losses"] = max(abs(a / b - 1) for a, b in zip(losses, expected_losses, strict=True))
        measured["gates"] = furthest(gates, expected_gates)
        measured["base after"] = distance(sample(model), plain, expected)
        return measured

    return case


@contextmanager
def offloading(loaded_bytes: int) -> Iterator[None]:
    """Load models as on a GPU with little memory: what does not fit stays where it is and is cast when it is used."""
    load_all = comfy.model_management.LoadedModel.model_load

    def load_part(self: Any, lowvram_model_memory: int = 0, force_patch_weights: bool = False) -> Any:
        return load_all(self, loaded_bytes, force_patch_weights)

    def unload() -> None:
        with torch.inference_mode(False):
            comfy.model_management.unload_all_models()

    unload()
    with patch.object(comfy.model_management.LoadedModel, "model_load", load_part):
        yield
    unload()


def offloaded() -> Any:
    """Also after a stock loader, whose patches are then applied while the layer runs."""
    model = load(WEIGHTS)
    other = load_file(LORAS / "flux_kohya_2.safetensors")
    with_loader, _ = comfy.sd.load_lora_for_models(model, None, other, 0.5, 0.0)
    plain, mix, mix_and_loader = sample(model), sample(mixed(model)), sample(mixed(with_loader))
    expected = statistics(model)
    with offloading(200_000):
        mix_offloaded = sample(mixed(model))
        layers = [*model.model.diffusion_model.modules()]
        return {
            "offloaded layers": sum(hasattr(layer, "prev_comfy_cast_weights") for layer in layers),
            "mix": distance(mix_offloaded, mix, plain),
            "mix after a loader": distance(sample(mixed(with_loader)), mix_and_loader, plain),
            "statistics": furthest(statistics(model), expected),
            "base": float((sample(model) - plain).abs().max()),
        }


def in_fp8() -> Any:
    """Weights cast to float8 by the stock loader, as with weight_dtype fp8_e4m3fn."""
    path = str(BASE / "models/diffusion_models/flux_nano.safetensors")
    model = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float8_e4m3fn})
    rounded = {key: weight.to(torch.float8_e4m3fn).float() for key, weight in WEIGHTS.items()}
    reference = load(rounded)
    plain, expected = sample(reference), sample(stock(reference))
    return {
        "mix": distance(sample(mixed(model)), expected, plain),
        "statistics": furthest(statistics(model), statistics(reference)),
        "loss": abs(trained(model)[0][-1] / trained(reference)[0][-1] - 1),
    }


def compiled() -> Any:
    """ComfyUI's own kernels for packed int4 cannot be compiled."""
    measured: dict[str, float] = {}
    for name in ("float8_e4m3fn", "int8_tensorwise", "nvfp4"):
        model, _ = quantised(name)
        plain, mix = sample(model), sample(mixed(model))
        later = mixed(model)
        set_torch_compile_wrapper(later, backend="eager")
        measured[name] = distance(sample(later), mix, plain)
    return measured


class PackedWeight(Tensor):
    """A stand-in for the weights of ComfyUI-GGUF: packed bytes, with the shape of the weight."""

    @staticmethod
    def __new__(cls, packed: Tensor, shape: torch.Size) -> PackedWeight:
        return packed.as_subclass(cls)

    def __init__(self, packed: Tensor, shape: torch.Size) -> None:
        self.unpacked_shape = shape

    @property
    def shape(self) -> torch.Size:
        return getattr(self, "unpacked_shape", None) or self.size()


class PackedLinear(torch.nn.Linear):
    """A stand-in for the layers of ComfyUI-GGUF: the weight is unpacked in each forward pass, and in no state dict."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.scale = float(layer.weight.abs().max()) / 127
        packed = (layer.weight.float() / self.scale).round().to(torch.int8).view(torch.int16)  # half as many columns
        self.weight = torch.nn.Parameter(PackedWeight(packed, layer.weight.shape), requires_grad=False)

    def unpacked(self) -> Tensor:
        return self.weight.as_subclass(Tensor).view(torch.int8).float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.unpacked().to(x), self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not None:
                destination[prefix + name] = torch.zeros_like(parameter, device="meta")


def packed() -> Any:
    """A model whose layers another pack has replaced, as ComfyUI-GGUF does."""
    model, reference = load(WEIGHTS), dict(WEIGHTS)
    network = model.model.diffusion_model
    for name, layer in [*network.named_modules()]:
        if "blocks." in name and isinstance(layer, torch.nn.Linear):
            replacement = PackedLinear(layer)
            network.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], replacement)
            reference[f"{name}.weight"] = replacement.unpacked()
    model.cached_patcher_init = None  # this loader gives ComfyUI no way to load the file again
    expected_model = load(reference)
    plain, expected = sample(expected_model), sample(stock(expected_model))
    ours, theirs = (lora_loader.read(PAIR, m, None).adapters[0] for m in (model, expected_model))
    return {
        "mix": distance(sample(mixed(model)), expected, plain),
        "read": furthest(deltas(ours), deltas(theirs)),
        "statistics": furthest(statistics(model), statistics(expected_model)),
        "dora": refusal(lambda: lora_loader.read([lora("dora", 1.0, 16)], model, None)),
        "training": refusal(lambda: trained(model)),
    }


class SvdLinear(torch.nn.Module):
    """A stand-in for the layers of Nunchaku: no parameter named weight."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.qweight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


def without_weights() -> Any:
    """A model whose layers have no weights, as Nunchaku's: every node says what to do."""
    model = load(WEIGHTS)
    network = model.model.diffusion_model
    for name, layer in [*network.named_modules()]:
        if isinstance(layer, torch.nn.Linear):
            network.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], SvdLinear(layer))
    return {
        "mix": refusal(lambda: mixed(model)),
        "apply": refusal(lambda: lora_loader.apply(PAIR[0], model, None, 1, 0)),
    }


def refusal(run: Callable[[], Any]) -> str:
    try:
        run()
    except LegoMoleError as error:
        return str(error)
    return ""


CASES: dict[str, Callable[[], Any]] = {
    **{name: on_quantised(name) for name in FORMATS},
    "offloaded": offloaded,
    "weight_dtype fp8": in_fp8,
    "packed": packed,
    "without weights": without_weights,
    "compiled": compiled,
}
with torch.inference_mode():
    print(json.dumps({name: CASES[name]() for name in NAMES}))
