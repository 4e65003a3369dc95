"""What the page asks the server for: names of LoRA files, and what each says about itself."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from aiohttp import web
from server import PromptServer

from ...core.errors import LegoMoleError
from ...core.file_info import FileInfo, read_file_info
from . import program


async def _names(request: web.Request) -> web.Response:
    return web.json_response(await asyncio.to_thread(program.names, program.LORAS))


async def _about(request: web.Request) -> web.Response:
    """``?name=..``: a `FileInfo` as JSON, or ``{"error": ..}``, which is an answer, too: the page shows it."""
    try:
        path = program.lora_path(request.query.get("name", ""))
        status = await asyncio.to_thread(path.stat)
        found = await asyncio.to_thread(_read, path, (status.st_mtime_ns, status.st_size))
    except (LegoMoleError, OSError) as error:
        return web.json_response({"error": str(error)})
    return web.json_response(asdict(found))


@lru_cache(maxsize=128)
def _read(path: Path, state: tuple[int, int]) -> FileInfo:
    """Once for every state of a file, which `state` tells."""
    return read_file_info(path)


def add() -> None:
    """Let the server answer ``/legomole/loras`` and ``/legomole/lora``."""
    routes = PromptServer.instance.routes
    routes.get("/legomole/loras")(_names)
    routes.get("/legomole/lora")(_about)
