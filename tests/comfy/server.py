"""A real ComfyUI, started for the tests. Prompts are sent over HTTP, messages received over the websocket."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Prompt = dict[str, dict[str, Any]]


def find() -> tuple[Path, Path] | str:
    """Return ComfyUI's folder and its Python, or the reason why there is none."""
    folder = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
    python = Path(os.environ.get("COMFYUI_PYTHON", folder / ".venv/bin/python")).expanduser()
    if not (folder / "main.py").exists():
        return f"no ComfyUI in {folder} (set COMFYUI_PATH)"
    if not python.exists():
        return f"no Python for ComfyUI at {python} (set COMFYUI_PYTHON)"
    return folder, python


def lay_out(base: Path, pack: Path | None) -> None:
    """Create the folders of a server's base directory, optionally with a checkout of this pack as a custom node."""
    (base / "custom_nodes").mkdir()
    if pack is not None:
        (base / "custom_nodes" / "legomole").symlink_to(pack, target_is_directory=True)
    for name in ("loras", "checkpoints", "vae"):
        (base / "models" / name).mkdir(parents=True)


@dataclass
class Run:
    """Result of a prompt.

    Args:
        prompt_id: Id of the prompt.
        outputs: Node id -> what the node shows (``images``, ``text`` ..).
        messages: Websocket messages of this prompt, in order.
    """

    prompt_id: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.messages if name == kind]

    @property
    def error(self) -> str | None:
        """The error message of the node that failed, ``None`` if none did."""
        errors = self.of("execution_error")
        return errors[0]["exception_message"] if errors else None

    @property
    def executed(self) -> set[str]:
        """Ids of the nodes that ran, without cached ones."""
        return {data["node"] for data in self.of("executing") if data["node"] is not None}


class Refused(Exception):
    """The server did not accept a prompt; the argument is its answer."""


class Server:
    """ComfyUI on a free port. `base` is the directory of its models, outputs and custom nodes."""

    def __init__(self, folder: Path, python: Path, base: Path, *, threads: int = 1) -> None:
        self.base = base
        self.folder, self.python = folder, python
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = base / "server.log"
        self._out = self.log.open("wb")
        environment = {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "", "XDG_CACHE_HOME": str(base / "cache")}
        self.process = subprocess.Popen(
            [
                *(python, "main.py", "--cpu", "--port", str(self.port), "--base-directory", base),
                *("--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"),
            ],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=self._out,
            stderr=subprocess.STDOUT,
        )
        self.client = uuid.uuid4().hex
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self._new_message = threading.Condition()
        self._wait_until_ready()
        self._socket = self._connect()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.join(10)  # the server's end closes the stream
        self._stream.close()
        self._socket.close()
        self._out.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def loras(self) -> Path:
        return self.base / "models" / "loras"

    def get(self, path: str) -> Any:
        return json.loads(self._request(path))

    def text(self, path: str) -> str:
        return self._request(path).decode()

    def post(self, path: str, data: Any) -> Any:
        answer = self._request(path, json.dumps(data).encode())
        return json.loads(answer) if answer else None

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 600
        while True:
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}") from None
                time.sleep(0.2)

    # ---- prompts

    def queue(self, prompt: Prompt) -> str:
        """Queue a prompt and return its id.

        Raises:
            Refused: The prompt fails the server's validation.
        """
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"]
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(json.loads(error.read())) from None

    def wait(self, prompt_id: str, timeout: float = 240) -> Run:
        """Wait until a prompt has succeeded, failed or been interrupted."""
        final_kinds = {"execution_success", "execution_error", "execution_interrupted"}

        def has_finished() -> bool:
            return any(kind in final_kinds and data.get("prompt_id") == prompt_id for kind, data in self.messages)

        with self._new_message:
            if not self._new_message.wait_for(has_finished, timeout):
                raise TimeoutError(f"prompt {prompt_id}:\n{self.log.read_text()[-4000:]}")
            run = Run(prompt_id, messages=[m for m in self.messages if m[1].get("prompt_id") == prompt_id])
        run.outputs = self.history(prompt_id)["outputs"]
        return run

    def history(self, prompt_id: str, timeout: float = 240) -> dict[str, Any]:
        """Return the history of a finished prompt. It appears a moment after the message that it has finished."""
        deadline = time.monotonic() + timeout
        while prompt_id not in (history := self.get(f"/history/{prompt_id}")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"prompt {prompt_id}")
            time.sleep(0.02)
        return history[prompt_id]

    def wait_for(self, kind: str, fits: Callable[[dict[str, Any]], bool], timeout: float = 60) -> None:
        """Wait for a websocket message of a kind whose data fits."""
        with self._new_message:
            received = lambda: any(name == kind and fits(data) for name, data in self.messages)  # noqa: E731
            if not self._new_message.wait_for(received, timeout):
                raise TimeoutError(f"no such {kind} message")

    def run(self, prompt: Prompt) -> Run:
        """Run a prompt that must succeed."""
        run = self.wait(self.queue(prompt))
        assert run.error is None, run.error
        return run

    def fail(self, prompt: Prompt) -> str:
        """Run a prompt that must fail, and return the error message."""
        error = self.wait(self.queue(prompt)).error
        assert error is not None, "it did not fail"
        return error

    # ---- websocket: the part of RFC 6455 that is needed to listen

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        key = base64.b64encode(os.urandom(16)).decode()
        connection.sendall(
            f"GET /ws?clientId={self.client} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = connection.makefile("rb")
        while self._stream.readline() not in (b"\r\n", b""):
            pass
        return connection

    def _listen(self) -> None:
        try:
            while True:
                opcode, size = self._stream.read(2)
                size &= 127
                if size > 125:
                    size = struct.unpack(">H" if size == 126 else ">Q", self._stream.read(2 if size == 126 else 8))[0]
                payload = self._stream.read(size)
                message = self._parsed(opcode & 15, payload)
                if message is not None:
                    with self._new_message:
                        self.messages.append(message)
                        self._new_message.notify_all()
        except (ValueError, OSError):  # closed
            return

    def _parsed(self, opcode: int, payload: bytes) -> tuple[str, dict[str, Any]] | None:
        """Kind and data of a message. A text on a node (``progress_text``) counts to the prompt that runs."""
        if opcode == 1:
            message = json.loads(payload)
            return message["type"], message["data"]
        if opcode != 2 or payload[:4] != struct.pack(">I", 3):  # 3: ComfyUI's BinaryEventTypes.TEXT
            return None
        end = 8 + struct.unpack(">I", payload[4:8])[0]
        running = [data["prompt_id"] for _, data in self.messages if data.get("prompt_id")] or [""]
        text = {"node": payload[8:end].decode(), "text": payload[end:].decode(), "prompt_id": running[-1]}
        return "progress_text", text
