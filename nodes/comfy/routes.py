"""What the page requests from the server: the names of LoRA files, and the description of one."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from aiohttp import web
from server import PromptServer

from ...core.errors import LegoMoleError
from ...core.formats.file_info import FileInfo, read_file_info
from . import folders


async def _list_loras(request: web.Request) -> web.Response:
    return web.json_response(await asyncio.to_thread(folders.file_names, folders.LORAS))


async def _describe_lora(request: web.Request) -> web.Response:
    """Answer ``?name=..`` with an `FileInfo` as JSON, or with ``{"error": ..}``, which the page shows instead."""
    try:
        path = folders.lora_path(request.query.get("name", ""))
        status = await asyncio.to_thread(path.stat)
        about = await asyncio.to_thread(_read, path, (status.st_mtime_ns, status.st_size))
    except (LegoMoleError, OSError) as error:
        return web.json_response({"error": str(error)})
    return web.json_response(asdict(about))


@lru_cache(maxsize=128)
def _read(path: Path, version: tuple[int, int]) -> FileInfo:
    """Describe a file; `version` is part of the cache's key only."""
    return read_file_info(path)


def add() -> None:
    """Let the server answer ``/legomole/loras`` and ``/legomole/lora``."""
    routes = PromptServer.instance.routes
    routes.get("/legomole/loras")(_list_loras)
    routes.get("/legomole/lora")(_describe_lora)
