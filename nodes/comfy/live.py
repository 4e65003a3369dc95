"""What the gates do, told to the page while the sampler runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...core.mole.record import Record

EVENT = "legomole.gates"  # web/gate_map.js listens
_EVERY = 0.15  # seconds


def telling(record: Record, labels: tuple[str, ...]) -> Callable[[], None]:
    """A function to call after every pass of the model: it sends that pass's gates, now and then.

    The message names the node that runs now, so that the page knows whose gates these are.

    Args:
        record: Of the mix. labels: Of its experts.
    """
    running = get_executing_context()
    told = 0.0

    def tell() -> None:
        nonlocal told
        if running is None or time.monotonic() - told < _EVERY:
            return
        server = PromptServer.instance
        if server.client_id is None:
            return
        scopes, gates = record.latest()
        if not scopes:  # a compiled model records nothing
            return
        told = time.monotonic()
        message = {"node": running.node_id, "pass": len(record.passes), "labels": labels, "scopes": scopes}
        server.send_sync(EVENT, {**message, "gates": gates.tolist()}, server.client_id)

    return tell
