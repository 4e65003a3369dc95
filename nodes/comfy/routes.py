"""What the page requests from the server: the names of LoRA files, and descriptions of one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from aiohttp import web
from server import PromptServer

from ...core.errors import LegoMoleError
from ...core.formats.file_info import frequent_tags, read_file_info, trainer
from ...core.formats.files import read_header
from ...core.formats.sidecar import preview_image, read_sidecar
from ..file_hashes import sha256_of
from . import folders

_MAX_TAGS = 30

_Version = tuple[int, int]  # time and size of a file: part of a cache's key


async def _list_loras(request: web.Request) -> web.Response:
    return web.json_response(await asyncio.to_thread(folders.file_names, folders.LORAS))


async def _answer(describe: Callable[[Path, _Version], dict[str, Any]], request: web.Request) -> web.Response:
    """Answer ``?name=..`` with a description as JSON, or with ``{"error": ..}``, which the page shows instead."""
    try:
        path = folders.lora_path(request.query.get("name", ""))
        status = await asyncio.to_thread(path.stat)
        description = await asyncio.to_thread(describe, path, (status.st_mtime_ns, status.st_size))
    except (LegoMoleError, OSError) as error:
        return web.json_response({"error": str(error)})
    return web.json_response(description)


def _summary(path: Path, version: _Version) -> dict[str, Any]:
    """What a row of LoRA List shows: an `FileInfo`, completed by the files beside it."""
    header, sidecar = _header(path, version), read_sidecar(path)
    return {**header, "base": header["base"] or sidecar.base, "words": sidecar.words or header["words"]}


def _details(path: Path, version: _Version) -> dict[str, Any]:
    """What the information dialog shows."""
    metadata, sidecar = read_header(path).metadata, read_sidecar(path)
    return {
        **_summary(path, version),
        "title": sidecar.title or _header(path, version)["title"],
        "trainer": trainer(metadata),
        "tags": sidecar.tags or frequent_tags(metadata, _MAX_TAGS),
        "notes": sidecar.notes,
        "sha256": sidecar.sha256,
        "preview": preview_image(path) is not None,
        "bytes": version[1],
    }


@lru_cache(maxsize=128)
def _header(path: Path, version: _Version) -> dict[str, Any]:
    return asdict(read_file_info(path))


def _hash(path: Path, _: _Version) -> dict[str, Any]:
    return {"sha256": sha256_of(path)}


async def _preview(request: web.Request) -> web.StreamResponse:
    """Answer ``?name=..`` with the image beside a file."""
    try:
        image = preview_image(folders.lora_path(request.query.get("name", "")))
    except LegoMoleError:
        image = None
    return web.HTTPNotFound() if image is None else web.FileResponse(image)


def add() -> None:
    """Let the server answer the requests of web/lora_list.js and web/lora_info.js."""
    routes = PromptServer.instance.routes
    routes.get("/legomole/loras")(_list_loras)
    routes.get("/legomole/lora")(partial(_answer, _summary))
    routes.get("/legomole/lora/details")(partial(_answer, _details))
    routes.get("/legomole/lora/hash")(partial(_answer, _hash))
    routes.get("/legomole/lora/preview")(_preview)
