"""Run by ComfyUI's own Python: what its loader adds to each weight of a model, for many files.

``comfy_reader.py COMFYUI JOBS``: JOBS is a JSON file with ``models`` (name -> class, config, shapes of weights by key)
and ``files`` (pairs of path and model). Writes ``<path>.read`` beside each file, with the change of every weight, and
``<path>.lost``, the keys that were not loaded, as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main(comfy_folder: str, jobs_file: str) -> None:
    jobs = json.loads(Path(jobs_file).read_text())
    sys.path.insert(0, comfy_folder)
    sys.argv = ["reader", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base
    import torch
    from safetensors.torch import load_file, save_file

    def key_map(model: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        base = getattr(comfy.model_base, model["cls"])
        weights = {key: torch.zeros(shape) for key, shape in model["weights"].items()}
        clip = {key: torch.zeros(shape) for key, shape in model["clip"].items()}

        class Model(base):  # the key map of a model needs no more of it
            def __init__(self) -> None:
                torch.nn.Module.__init__(self)
                object.__setattr__(self, "model_config", SimpleNamespace(unet_config=model["config"]))

            def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
                return weights

        known = comfy.lora.model_lora_keys_unet(Model(), {})
        if clip:
            known = comfy.lora.model_lora_keys_clip(SimpleNamespace(state_dict=lambda: clip), known)
        return known, {**weights, **clip}

    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logging.getLogger().addHandler(Handler())
    maps = {name: key_map(model) for name, model in jobs["models"].items()}
    for path, name in jobs["files"]:
        known, weights = maps[name]
        lines.clear()
        changed: dict[str, Any] = {}
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(path)), known)
        for key, patch in patches.items():
            target, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
            if target not in weights:
                lines.append(f"lora key not loaded: {target}")
                continue
            weight = changed.get(target, weights[target].clone())
            changed[target] = comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, function)], weight, target)
        save_file({key: tensor.float().contiguous().clone() for key, tensor in changed.items()}, f"{path}.read")
        lost = [line for line in lines if "not loaded" in line or "ERROR" in line or "MISMATCH" in line]
        Path(f"{path}.lost").write_text(json.dumps(lost))
    print(json.dumps({"keys": {name: sorted(known) for name, (known, _) in maps.items()}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
