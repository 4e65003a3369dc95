"""Sends the values of the gates, and the maps of regions, to the page while the sampler runs."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from ...core.mole.record import Record
from ...core.mole.regions.maps import resized
from ...core.pictures.regions import scaled_size

EVENT = "legomole.gates"  # web/gate_map.js listens to it
_INTERVAL = 0.15  # seconds between two messages
_LONGEST = 32  # positions of a sent map


def gate_sender(record: Record, labels: tuple[str, ...]) -> Callable[[Tensor], None]:
    """Return a function to call with the latent after every forward pass: it sends the gates and maps of that pass.

    It sends them some times a second. The message names the node that is running, so that the page knows whose gates
    these are, and the one that samples, so that the page lays the maps on its preview.

    Args:
        record: The record of the mix.
        labels: Labels of its experts.
    """
    context = get_executing_context()
    last_sent = 0.0

    def send(latent: Tensor) -> None:
        nonlocal last_sent
        if context is None or time.monotonic() - last_sent < _INTERVAL:
            return
        server = PromptServer.instance
        if server.client_id is None:
            return
        scopes, gates = record.latest()
        if not scopes:  # a compiled model records nothing
            return
        last_sent = time.monotonic()
        sampler = get_executing_context()
        message = {
            "node": context.node_id,
            "sampler": None if sampler is None else sampler.node_id,
            "pass": len(record.passes),
            "labels": labels,
            "scopes": scopes,
            "gates": gates.tolist(),
            "regions": shown_regions(record.maps, (latent.shape[-2], latent.shape[-1])),
        }
        server.send_sync(EVENT, message, server.client_id)

    return send


def shown_regions(maps: Sequence[Tensor | None], size: tuple[int, int]) -> dict[str, Any] | None:
    """Maps of the first picture or frame, as the page gets them; ``None`` if no expert has one.

    Args:
        maps: Per expert, see `Record.maps`.
        size: Height and width of the latent, which have the picture's aspect.

    Returns:
        ``height`` and ``width`` of the sent maps; ``maps``: per expert its values from 0 to 255 row by row, a byte
        each, as base64, or ``None``.
    """
    if all(map_ is None for map_ in maps):
        return None
    height, width = scaled_size(size, _LONGEST)

    def encoded(map_: Tensor) -> str:
        values = resized(map_[None, :1], (1, height, width)).mul(255).round().to(torch.uint8)
        return base64.b64encode(values.numpy().tobytes()).decode()

    shown = [None if map_ is None else encoded(map_) for map_ in maps]
    return {"height": height, "width": width, "maps": shown}
