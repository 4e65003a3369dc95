"""Tools that run as a whole: they read the LoRAs of a case, merge them, and write the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from legomole.core.formats import save
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.run import run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .cases import Case

Tool = Callable[[Case, Sequence[Path], Path], None]


def weights_of(path: Path) -> Path:
    return path / "adapter_model.safetensors" if path.is_dir() else path


def floor(case: Case, paths: Sequence[Path], out: Path) -> None:
    """Read the inputs once and write a file of the output's size, without any other work."""
    files = [load_file(weights_of(path)) for path in paths]
    for file in files:
        for tensor in file.values():
            tensor.clone()  # the file is mapped, so that only this reads it
    save_file(files[0], out)


def ours(method: str, **settings: Any) -> Tool:
    """Return a tool that runs `legomole merge` without the start of the command line."""

    def merge(case: Case, paths: Sequence[Path], out: Path) -> None:
        rank = {} if method == "concat" else {"rank": case.rank}
        inputs = [Input(path=str(path)) for path in paths]
        result = run(Recipe(method=method, inputs=inputs, settings={**rank, **settings}))
        save(result.adapter, out.with_suffix("") if case.format == "peft" else out)

    return merge


def peft(kind: str, **settings: Any) -> Tool:
    """Return a tool that calls PEFT's `add_weighted_adapter` on a model whose base weights take no memory."""

    def merge(case: Case, paths: Sequence[Path], out: Path) -> None:
        model = peft_model(case, paths)
        names = [str(i) for i in range(len(paths))]
        model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=kind, **settings)
        write_peft(model, case, out)

    return merge


def peft_model(case: Case, paths: Sequence[Path]) -> Any:
    """Return a PEFT model with the LoRAs of some files, restricted to the layers of the case."""
    from peft import LoraConfig, PeftModel
    from peft.utils import set_peft_model_state_dict

    names = {name: f"layer_{i}" for i, (name, _, _) in enumerate(case.layers)}
    base: Any = nn.Module()
    for name, d_out, d_in in case.layers:
        layer = nn.Linear(d_in, d_out, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.zeros(()).expand(d_out, d_in), requires_grad=False)
        base.add_module(names[name], layer)
    config = LoraConfig(r=case.rank, lora_alpha=case.rank // 2, target_modules=r"layer_\d+")
    model: Any = None
    for i, path in enumerate(paths):
        if model is None:
            model = PeftModel(base, config, str(i), low_cpu_mem_usage=True)
        else:
            model.add_adapter(str(i), config, low_cpu_mem_usage=True)
        state: dict[str, Tensor] = {}
        for key, tensor in load_file(weights_of(path)).items():
            module, _, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            if module in names and kind != "alpha":
                factor = {"lora_down": "lora_A", "lora_up": "lora_B"}.get(kind, kind)
                state[f"base_model.model.{names[module]}.{factor}.weight"] = tensor
        set_peft_model_state_dict(model, state, str(i), low_cpu_mem_usage=True)
    return model


def write_peft(model: Any, case: Case, out: Path) -> None:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name="merged")
    save_file({key: tensor.detach().to(case.dtype).contiguous() for key, tensor in state.items()}, out)


WHOLE: dict[str, Tool] = {
    "floor": floor,
    "legomole-lego": ours("lego"),
    "legomole-paper": ours("lego", geometry="paper"),
    "legomole-svd": ours("svd"),
    "legomole-concat": ours("concat"),
    "peft-linear": peft("linear"),
    "peft-cat": peft("cat"),
    "peft-ties": peft("ties", density=0.5),
}
