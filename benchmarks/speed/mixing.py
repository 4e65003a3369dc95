"""Cost of mixing LoRAs at run time, per step: `python benchmarks/speed/mixing.py`.

Times one forward pass of a model with random weights, relative to the same model with the LoRAs merged into its weights
("merged"), on the same input in the same process:

- legomole: untrained gates ("even"), and trained ones that read the text, the hidden states or the experts;
- PEFT: every adapter active, unmerged; it has no gates;
- X-LoRA, PEFT's own gates, language models only: it runs the model without LoRAs first to compute the gates, then with
  them, with separate gates for every token.

All gates are one, so that all models must give the merged model's output, which is checked before anything is timed.
Models take turns, in another order each round, and ratios are taken within a round, so that other load on the machine
affects all models alike. Legomole's and PEFT's models share one copy of the base weights.

`--profile` prints the operations of a step with the most expensive gates and of the merged model; on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import re
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import save
from legomole.core.lowrank import LowRank
from legomole.core.mole.attach import Attachment, attach
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train.features import standardise_features
from torch import Tensor, nn

Step = Callable[[], Tensor]
MERGED = "merged"


@dataclass(frozen=True)
class Case:
    """A model with its input.

    Args:
        model: Model with random weights.
        layers: Pattern for the names of the layers that the LoRAs change.
        inputs: Keyword arguments of the model.
        gates: Name of a row -> settings of its gates.
        xlora: Whether X-LoRA supports the model.
    """

    model: nn.Module
    layers: str
    inputs: Mapping[str, Tensor]
    gates: Mapping[str, GateSettings]
    xlora: bool = False


def _gates(*reads: str) -> dict[str, GateSettings]:
    kinds = [(kind, part) for kind in reads for part in ("layer", "block")]
    return {f"{kind} gates, per {part}": GateSettings(reads=kind, granularity=part) for kind, part in kinds}


def dit(width: int, tokens: int) -> Case:
    """Build a Flux with double and single blocks; input: `tokens` image tokens and a quarter as many of text."""
    from diffusers import FluxTransformer2DModel

    head = min(128, width // 2)
    model = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=width,
        pooled_projection_dim=64,
        axes_dims_rope=(head // 8, head * 7 // 16, head * 7 // 16),
    )
    position = torch.arange(tokens)
    inputs = {
        "hidden_states": torch.randn(1, tokens, 64),
        "encoder_hidden_states": torch.randn(1, tokens // 4, width),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([0 * position, position // 32, position % 32], 1).float(),
        "txt_ids": torch.zeros(tokens // 4, 3),
    }
    layers = r".*transformer_blocks\.\d+\.(attn\.\w+(\.0)?|ff\w*\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    return Case(model, layers, inputs, _gates("text", "hidden", "experts"))


def unet(width: int, tokens: int) -> Case:
    """Build Stable Diffusion 1's U-Net with a layer per level; LoRAs on convolutions too; input: two prompts."""
    from diffusers import UNet2DConditionModel

    widths = (width // 4, width // 2, width)
    model = UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    side = 2 * round(tokens**0.5 / 2)
    inputs = {
        "sample": torch.randn(2, 4, side, side),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 77, 64),
    }
    layers = r".*(attn\d\.to_\w+(\.0)?|ff\.net\.(0\.proj|2)|proj_in|proj_out|conv\d|conv_shortcut)"
    return Case(model, layers, inputs, _gates("text", "hidden", "experts"))


def llm(width: int, tokens: int) -> Case:
    """Build a Llama with eight layers; the input is one text. It has no text conditioning for gates to read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        use_cache=False,
    )
    inputs = {"input_ids": torch.randint(1024, (1, tokens))}
    gates = _gates("hidden", "experts")
    return Case(LlamaForCausalLM(config), r"model\.layers\..*_proj", inputs, gates, xlora=True)


CASES = {"dit": dit, "unet": unet, "llm": llm}


def loras(case: Case, n: int, rank: int) -> list[Adapter]:
    """Return `n` LoRAs on the case's layers, whose sum has about half the norm of the weights."""
    adapters: list[Adapter] = []
    for _ in range(n):
        modules: dict[str, LowRank] = {}
        for name, layer in case.model.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and re.fullmatch(case.layers, name):
                W = layer.weight.flatten(1)  # (d_out, d_in)
                A, B = torch.randn(rank, W.shape[1]) / W.shape[1] ** 0.5, torch.randn(W.shape[0], rank)
                B *= 0.5 * W.float().norm().cpu() / (n * rank * W.shape[0]) ** 0.5
                modules[name] = LowRank(A, B, kernel=tuple(layer.weight.shape[2:]))
        adapters.append(Adapter(modules))
    return adapters


def models(case: Case, adapters: Sequence[Adapter], folder: Path, compiled: bool = False) -> dict[str, Step]:
    """Return a step function for the merged model and for every other model that supports the case.

    `compiled` models go through `torch.compile`; X-LoRA, which runs the model twice, is left out.
    """
    mixed = {"even, untrained": _ours(case, adapters, None)}
    mixed |= {name: _ours(case, adapters, settings) for name, settings in case.gates.items()}
    paths = [save(adapter, folder / str(i), format="peft") for i, adapter in enumerate(adapters)]
    variants = {MERGED: _merged(case.model, adapters), **mixed, "PEFT, unmerged": _peft(_sharing(case.model), paths)}
    if case.xlora and not compiled:
        variants["PEFT X-LoRA"] = _xlora(_sharing(case.model), paths)
    return {
        name: _step(torch.compile(model) if compiled else model, case.inputs)  # type: ignore[arg-type]
        for name, model in variants.items()
    }


def _step(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Step:
    return lambda: model(**inputs, return_dict=False)[0]


def _sharing(model: nn.Module) -> Any:
    """Copy a model without its weights, which both share."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _merged(model: nn.Module, adapters: Sequence[Adapter]) -> nn.Module:
    model = copy.deepcopy(model)
    for name in adapters[0].modules:
        W: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        delta = sum(adapter.modules[name].delta() for adapter in adapters)
        W.copy_(W.float() + delta.to(W.device).view(W.shape))  # type: ignore[union-attr]
    return model


def _ours(case: Case, adapters: Sequence[Adapter], settings: GateSettings | None) -> nn.Module:
    model = _sharing(case.model)
    gates = untrained_gates(case, len(adapters), settings)
    attachment: Attachment = attach(model, Mixture(tuple(adapters), gates))
    if settings is not None:
        # sets the size of the gates, which stay at one
        standardise_features(attachment, _step(model, case.inputs))  # type: ignore[arg-type]
    return model


def untrained_gates(case: Case, n: int, settings: GateSettings | None) -> GateSet:
    """Return gates of `n` LoRAs, with a random concept detector if they read the text."""
    detector = None
    if settings is not None and settings.reads == "text":
        text = case.inputs["encoder_hidden_states"]
        detector = ConceptDetector(torch.randn(n, text.shape[-1]), torch.zeros(n), [()] * n).to(text.device)
    return GateSet(n, settings, detector=detector)


def _peft(model: nn.Module, paths: Sequence[Path]) -> nn.Module:
    from peft import PeftModel

    peft = PeftModel.from_pretrained(model, paths[0].as_posix(), "0", autocast_adapter_dtype=False)
    for i, path in enumerate(paths[1:], 1):
        peft.load_adapter(path.as_posix(), str(i), autocast_adapter_dtype=False)
    peft.base_model.set_adapter([str(i) for i in range(len(paths))])
    return peft.eval()


def _xlora(model: Any, paths: Sequence[Path]) -> nn.Module:
    """Return X-LoRA with equal weights, scaled by the number of adapters, so that each adapter has weight one."""
    from peft import XLoraConfig, get_peft_model

    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        adapters={str(i): path.as_posix() for i, path in enumerate(paths)},
        global_scaling_weight=len(paths),
    )
    peft: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in peft.base_model.internal_xlora_classifier.parameters():
        parameter.zero_()
    return peft.eval()


def check(steps: Mapping[str, Step], base: Tensor, dtype: torch.dtype) -> None:
    """Raise unless every model gives the same output as the merged one.

    The difference is relative to the change made by the LoRAs, of which a missing LoRA would be ``n ** -0.5``. In half
    precision, rounding of the merged weights is a few percent of it.
    """
    merged = steps[MERGED]().float()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for name, step in steps.items():
        error = float((step().float() - merged).norm() / (merged - base.float()).norm())
        if not error < tolerance:
            raise SystemExit(f"{name} differs from the merged model by {error:.2g} of the change made by the LoRAs")


def measure(steps: Mapping[str, Step], rounds: int, wait: Callable[[], None]) -> dict[str, list[float]]:
    """Return seconds per step for each model and round; `wait` blocks until the device has finished."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in random.Random(i).sample(list(steps), len(steps)):
            wait()
            start = time.perf_counter()
            steps[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: Mapping[str, Sequence[float]]) -> Iterator[dict[str, Any]]:
    """Yield, per model, the median of its seconds, and median and quartiles of their ratio to the merged model's."""
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[MERGED], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        yield {"model": name, "seconds": statistics.median(values), "ratio": middle, "low": low, "high": high}


def profile(step: Step, rounds: int = 10) -> Counter[str]:
    """Return milliseconds per step by operation, without nested operations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            step()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent[event.key.removeprefix("aten::")] += event.self_cpu_time_total / 1000 / rounds
    return spent


def show_profile(steps: Mapping[str, Step], mixed: str, lines: int = 10) -> None:
    """Print the operations that differ most between a mixed step and the merged one."""
    ours, merged = profile(steps[mixed]), profile(steps[MERGED])
    print(f"{'ms per step':32}{MERGED:>10}{'mixed':>10}   ({mixed})")
    for name in sorted(ours.keys() | merged.keys(), key=lambda name: -abs(ours[name] - merged[name]))[:lines]:
        print(f"  {name:30}{merged[name]:10.2f}{ours[name]:10.2f}")
    print(f"  {'all':30}{merged.total():10.2f}{ours.total():10.2f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--experts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512, help="positions in a sequence or an image")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="compile all models with torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", action="store_true", help="print the operations of a step, on a CPU")
    options = parser.parse_args(arguments)
    if options.profile and options.device != "cpu":
        parser.error("--profile works on a CPU only")
    dtype = getattr(torch, options.dtype)
    warnings.filterwarnings(
        "ignore", category=RuntimeWarning, module="peft"
    )  # about proj_out, which also ends another layer's name
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cuda = options.device == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"cpu, {options.threads} threads"
    where += ", compiled" if options.compile else ""
    print(f"{where}, {options.dtype}, width {options.width}, {options.tokens} tokens, rank {options.rank}")
    print(f"{'':6}{'experts':>8}  {'model':26}{'s/step':>8}{'ratio':>8}   quartiles of {options.rounds} rounds")
    rows: list[dict[str, Any]] = []
    for name, n in itertools.product(options.cases, options.experts):
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            case = CASES[name](options.width, options.tokens)
            nn.Module.to(case.model, options.device, dtype).eval()  # avoids a warning of diffusers
            inputs = {key: x.to(options.device) for key, x in case.inputs.items()}
            inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
            case = replace(case, inputs=inputs)
            steps = models(case, loras(case, n, options.rank), Path(folder), options.compile)
            check(steps, _step(case.model, inputs)(), dtype)  # also warms up
            seconds = measure(steps, options.rounds, torch.cuda.synchronize if cuda else lambda: None)
            summaries = list(summary(seconds))
            if options.profile:
                mixed = max((row for row in summaries if "gates" in row["model"]), key=lambda row: row["ratio"])
                show_profile(steps, mixed["model"])
        for row in summaries:
            rows.append({"case": name, "experts": n, **row})
            text = "{case:6}{experts:8}  {model:26}{seconds:8.3f}{ratio:8.2f}   {low:.2f} .. {high:.2f}"
            print(text.format(**rows[-1]), flush=True)
    if options.json:
        header = {"device": where, "torch": torch.__version__}
        header |= {name: getattr(options, name) for name in ("dtype", "width", "tokens", "rank", "rounds")}
        options.json.write_text(json.dumps({**header, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
