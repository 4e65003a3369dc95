"""ComfyUI's page in a headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
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


def open_workflow(page: Any, workflow: dict[str, Any]) -> None:
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(300)  # the page adds sockets of growing rows a moment later
