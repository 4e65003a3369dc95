"""ComfyUI's page in a headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ..comfy.server import Server


@contextmanager
def opened(comfy: Server, size: tuple[int, int] = (1280, 720)) -> Iterator[Any]:
    """Open the page of a server; requests to other hosts are blocked. Skips the test if there is no Chromium."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium (set CHROMIUM)")
    comfy.post("/settings/Comfy.TutorialCompleted", True)  # otherwise the first visit shows a dialog of templates
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": size[0], "height": size[1]})
        local = re.compile(r"(https?|wss?)://127\.0\.0\.1|data:|blob:")
        tab.route("**/*", lambda route: route.continue_() if local.match(route.request.url) else route.abort())
        tab.goto(comfy.url)
        wait_until_ready(tab)
        tab.set_default_timeout(10_000)
        yield tab
        browser.close()


def wait_until_ready(page: Any) -> None:
    """Wait for the nodes, and for the workflow that the page opens by itself, which would replace the test's."""
    page.wait_for_function(
        """() => window.LiteGraph?.registered_node_types.LegoMoLE_LegoMerge
            && window.app?.extensionManager?.workflow?.activeWorkflow?.changeTracker
            && !window.comfyAPI?.changeTracker?.ChangeTracker.isLoadingGraph""",
        timeout=60_000,
    )
    page.wait_for_timeout(300)


def settle(page: Any) -> None:
    """Wait for what the page does in the next frames: it adds and removes sockets, and draws widgets."""
    page.evaluate(
        """async () => { for (let i = 0; i < 6; i++) await new Promise(next => requestAnimationFrame(next)); }"""
    )


def open_workflow(page: Any, workflow: dict[str, Any]) -> None:
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    settle(page)


def open_empty(page: Any) -> None:
    """Open an empty workflow, with a new id, because the page identifies widgets by the ids of graph and node."""
    page.evaluate("() => app.canvas.setGraph(app.graph.rootGraph)")  # out of subgraphs
    open_workflow(page, {"id": str(uuid.uuid4()), "nodes": [], "links": [], "version": 0.4})
    page.wait_for_function("() => !document.querySelector('.lm')")  # the widgets of the last workflow


def setting(page: Any, name: str, value: Any) -> None:
    page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])
    settle(page)


def sent(page: Any, kind: str) -> dict[str, Any]:
    """Return the inputs of the only node of a kind in the prompt that the page would send to the server."""
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    (node,) = (node for node in prompt.values() if node["class_type"] == kind)
    return node["inputs"]


def run(page: Any, comfy: Server) -> None:
    """Queue the workflow, and wait until it has succeeded and the page has heard of it."""
    page.evaluate(
        """() => { window.isDone = false;
            app.api.addEventListener('execution_success', () => (window.isDone = true), { once: true }); }"""
    )
    with page.expect_response("**/prompt") as answer:
        page.evaluate("() => app.queuePrompt(0, 1)")
    body = answer.value.json()
    assert body.get("node_errors") == {}, body
    status = comfy.history(body["prompt_id"])["status"]
    assert status["status_str"] == "success", status
    page.wait_for_function("() => window.isDone")
    settle(page)
