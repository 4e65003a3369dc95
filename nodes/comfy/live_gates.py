"""Sends the values of the gates to the page while the sampler runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...core.mole.record import Record

EVENT = "legomole.gates"  # web/gate_map.js listens to it
_INTERVAL = 0.15  # seconds between two messages


def gate_sender(record: Record, labels: tuple[str, ...]) -> Callable[[], None]:
    """Return a function to call after every forward pass: it sends the gates of that pass, some times a second.

    The message names the node that is running, so that the page knows whose gates these are.

    Args:
        record: The record of the mix.
        labels: Labels of its experts.
    """
    context = get_executing_context()
    last_sent = 0.0

    def send() -> None:
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
        message = {"node": context.node_id, "pass": len(record.passes), "labels": labels, "scopes": scopes}
        server.send_sync(EVENT, {**message, "gates": gates.tolist()}, server.client_id)

    return send
