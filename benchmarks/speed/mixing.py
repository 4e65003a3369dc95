"""What mixing LoRAs at run time costs a step: `python benchmarks/speed/mixing.py`.

Times one pass of a model with random weights, over the same model with the LoRAs merged into its weights ("merged"), on
the same input in the same process:

- legomole: untrained gates ("even"), and trained ones that read the text, the hidden states or the experts;
- PEFT: every adapter active, unmerged; it has no gates;
- X-LoRA, PEFT's own gates: language models only. It runs the model without LoRAs first, to decide, then with them, and
  gates every token apart.

All gates stand at one, so all of them must give the merged model's output; they are compared before anything is timed.
Models take turns, each round in another order, and a ratio is taken within a round: what else the machine does meets
all of them alike. Ours and the peers share one copy of the base weights.

`--profile` shows what a step with the gates that cost most is made of, beside the merged model's; on a CPU.
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
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train.features import standardise_features
from torch import Tensor, nn

Step = Callable[[], Tensor]
MERGED = "merged"


@dataclass(frozen=True)
class Case:
    """A model and what it is run on.

    Args:
        model: With random weights. layers: Which of its layers the LoRAs change, a pattern for their names.
        inputs: Keyword arguments of the model.
        gates: Name of a row -> gates to try. xlora: Whether X-LoRA can run it.
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
    """Flux: double and single blocks, one sample, `tokens` of the picture and a quarter as many of the text."""
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
    place = torch.arange(tokens)
    inputs = {
        "hidden_states": torch.randn(1, tokens, 64),
        "encoder_hidden_states": torch.randn(1, tokens // 4, width),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([0 * place, place // 32, place % 32], 1).float(),
        "txt_ids": torch.zeros(tokens // 4, 3),
    }
    layers = r".*transformer_blocks\.\d+\.(attn\.\w+(\.0)?|ff\w*\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    return Case(model, layers, inputs, _gates("text", "hidden", "experts"))


def unet(width: int, tokens: int) -> Case:
    """Stable Diffusion 1's U-Net with one layer a level, LoRAs on its convolutions too; prompt and negative prompt."""
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
    """Llama, eight layers, one text. Its gates cannot read a text conditioning: it has none."""
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
    """`n` LoRAs on the case's layers, together about half as large as the weights they change."""
    found: list[Adapter] = []
    for _ in range(n):
        modules: dict[str, LowRank] = {}
        for name, layer in case.model.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and re.fullmatch(case.layers, name):
                W = layer.weight.flatten(1)  # (d_out, d_in)
                A, B = torch.randn(rank, W.shape[1]) / W.shape[1] ** 0.5, torch.randn(W.shape[0], rank)
                B *= 0.5 * W.float().norm().cpu() / (n * rank * W.shape[0]) ** 0.5
                modules[name] = LowRank(A, B, kernel=tuple(layer.weight.shape[2:]))
        found.append(Adapter(modules))
    return found


def models(case: Case, adapters: Sequence[Adapter], folder: Path) -> dict[str, Step]:
    """The merged model first, then all others that can do the case."""
    steps = {MERGED: _step(_merged(case.model, adapters), case.inputs)}
    steps["even, untrained"] = _ours(case, adapters, None)
    steps |= {name: _ours(case, adapters, settings) for name, settings in case.gates.items()}
    paths = [save(adapter, folder / str(i), format="peft") for i, adapter in enumerate(adapters)]
    steps["PEFT, unmerged"] = _step(_peft(_sharing(case.model), paths), case.inputs)
    if case.xlora:
        steps["PEFT X-LoRA"] = _step(_xlora(_sharing(case.model), paths), case.inputs)
    return steps


def _step(model: nn.Module, inputs: Mapping[str, Tensor]) -> Step:
    return lambda: model(**inputs, return_dict=False)[0]


def _sharing(model: nn.Module) -> Any:
    """A copy of a model with the very same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _merged(model: nn.Module, adapters: Sequence[Adapter]) -> nn.Module:
    model = copy.deepcopy(model)
    for name in adapters[0].modules:
        W: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        delta = sum(adapter.modules[name].delta() for adapter in adapters)
        W.copy_(W.float() + delta.to(W.device).view(W.shape))  # type: ignore[union-attr]
    return model


def _ours(case: Case, adapters: Sequence[Adapter], settings: GateSettings | None) -> Step:
    model = _sharing(case.model)
    step = _step(model, case.inputs)
    attachment: Attachment = attach(model, Mixture(tuple(adapters), GateSet(len(adapters), settings)))
    if settings is not None:
        standardise_features(attachment, step)  # type: ignore[arg-type] # gates of the right size, all still at one
    return step


def _peft(model: nn.Module, paths: Sequence[Path]) -> nn.Module:
    from peft import PeftModel

    made = PeftModel.from_pretrained(model, paths[0].as_posix(), "0", autocast_adapter_dtype=False)
    for i, path in enumerate(paths[1:], 1):
        made.load_adapter(path.as_posix(), str(i), autocast_adapter_dtype=False)
    made.base_model.set_adapter([str(i) for i in range(len(paths))])
    return made.eval()


def _xlora(model: Any, paths: Sequence[Path]) -> nn.Module:
    """X-LoRA with equal shares, times their number: every adapter at one."""
    from peft import XLoraConfig, get_peft_model

    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        adapters={str(i): path.as_posix() for i, path in enumerate(paths)},
        global_scaling_weight=len(paths),
    )
    made: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in made.base_model.internal_xlora_classifier.parameters():
        parameter.zero_()
    return made.eval()


def check(steps: Mapping[str, Step], base: Tensor, dtype: torch.dtype) -> None:
    """Raise unless every model gives what the merged one gives.

    The difference is relative to what the LoRAs change; one of `n` left out is ``n ** -0.5`` of that. In half precision
    merging rounds the weights, and that is a few percent.
    """
    merged = steps[MERGED]().float()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for name, step in steps.items():
        error = float((step().float() - merged).norm() / (merged - base.float()).norm())
        if not error < tolerance:
            raise SystemExit(f"{name} does not give what the merged model gives: {error:.2g} of what the LoRAs change")


def measure(steps: Mapping[str, Step], rounds: int, wait: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of a step, for each model and round. `wait` returns when the device has done its work."""
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
    """Per model, the median of its seconds, and median and quartiles of their ratio to the merged model's."""
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[MERGED], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        yield {"model": name, "seconds": statistics.median(values), "ratio": middle, "low": low, "high": high}


def profile(step: Step, rounds: int = 10) -> Counter[str]:
    """Milliseconds of a step by operation, those that an operation calls not included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(rounds):
            step()
    spent: Counter[str] = Counter()
    for event in found.key_averages():
        spent[event.key.removeprefix("aten::")] += event.self_cpu_time_total / 1000 / rounds
    return spent


def show_profile(steps: Mapping[str, Step], mixed: str, lines: int = 10) -> None:
    """Print the operations on which a mixed step and the merged one differ most."""
    ours, merged = profile(steps[mixed]), profile(steps[MERGED])
    print(f"{'ms a step':32}{MERGED:>10}{'mixed':>10}   ({mixed})")
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
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", action="store_true", help="what a step is made of, on a CPU")
    options = parser.parse_args(arguments)
    if options.profile and options.device != "cpu":
        parser.error("--profile tells the time of a CPU only")
    dtype = getattr(torch, options.dtype)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="peft")  # proj_out also ends another layer's name
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # X-LoRA's
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cuda = options.device == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"cpu, {options.threads} threads"
    print(f"{where}, {options.dtype}, width {options.width}, {options.tokens} tokens, rank {options.rank}")
    print(f"{'':6}{'experts':>8}  {'model':26}{'s/step':>8}{'ratio':>8}   quartiles of {options.rounds} rounds")
    rows: list[dict[str, Any]] = []
    for name, n in itertools.product(options.cases, options.experts):
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            case = CASES[name](options.width, options.tokens)
            nn.Module.to(case.model, options.device, dtype).eval()  # past diffusers' warning of it
            inputs = {key: x.to(options.device) for key, x in case.inputs.items()}
            inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
            case = replace(case, inputs=inputs)
            steps = models(case, loras(case, n, options.rank), Path(folder))
            check(steps, _step(case.model, inputs)(), dtype)  # warms up, too
            seconds = measure(steps, options.rounds, torch.cuda.synchronize if cuda else lambda: None)
            found = list(summary(seconds))
            if options.profile:
                mixed = max((row for row in found if "gates" in row["model"]), key=lambda row: row["ratio"])
                show_profile(steps, mixed["model"])
        for row in found:
            rows.append({"case": name, "experts": n, **row})
            text = "{case:6}{experts:8}  {model:26}{seconds:8.3f}{ratio:8.2f}   {low:.2f} .. {high:.2f}"
            print(text.format(**rows[-1]), flush=True)
    if options.json:
        about = {"device": where, "torch": torch.__version__}
        about |= {name: getattr(options, name) for name in ("dtype", "width", "tokens", "rank", "rounds")}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
