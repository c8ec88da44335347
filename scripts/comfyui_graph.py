"""The node in a real ComfyUI, looked at: ``PYTHONPATH=tests python scripts/comfyui_graph.py``; see docs/comfyui.md.

Loads docs/comfyui_api.json into the graph, draws, and writes what the page makes of it: docs/comfyui_workflow.json and
the picture of the graph in docs/images.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from comfyui_process import WORKFLOW, ComfyUI
from playwright.sync_api import Page, sync_playwright

DOCS = WORKFLOW.parent

ARRANGE = """(nodes) => {
  for (const [id, [x, y, width, height]] of Object.entries(nodes)) {
    const node = app.graph.getNodeById(id);
    node.pos = [x, y];
    node.setSize([width, height]);
    const after = node.widgets?.find((widget) => widget.name === "control_after_generate");
    if (after) after.value = "fixed";
  }
  app.canvas.ds.scale = 0.85;
  app.canvas.ds.offset = [75, 110];
  app.graph.setDirtyCanvas(true, true);
}"""

PLACES = {"1": (0, 0, 430, 950), "2": (490, 0, 430, 440), "3": (490, 490, 430, 460)}
"""Where a node is, and how large."""

SEEN = {"x": 90, "y": 84, "width": 812, "height": 866}
"""The part of the window with the graph."""


def main() -> None:
    """Load, draw, look, save."""
    home = Path(tempfile.mkdtemp(prefix="fluxrun-comfyui-"))
    comfy = ComfyUI(home)
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": 1280, "height": 960})
            page.set_default_timeout(600_000)
            look(page, comfy)
            chromium.close()
    finally:
        comfy.close()
        shutil.rmtree(home)


def look(page: Page, comfy: ComfyUI) -> None:
    """The workflow on the graph, drawn by the page's own button, and as the page saves it."""
    asked = json.loads(WORKFLOW.read_text())
    page.goto(f"http://127.0.0.1:{comfy.port}")
    page.wait_for_function("window.app?.graph && app.extensionManager?.setting")
    page.wait_for_timeout(3000)
    page.keyboard.press("Escape")  # its templates
    for shown in ("Comfy.Minimap.Visible", "Comfy.Graph.CanvasInfo"):
        page.evaluate("(name) => app.extensionManager.setting.set(name, false)", shown)
    page.evaluate("(api) => app.loadApiJson(api, 'flux2')", asked)
    page.evaluate(ARRANGE, PLACES)
    saved = without_nothing(page.evaluate("app.graph.serialize()"))
    page.evaluate("app.queuePrompt(0)")
    comfy.until(lambda: list((comfy.home / "output").glob("*.png")))
    page.wait_for_timeout(4000)
    page.evaluate(ARRANGE, PLACES)
    page.wait_for_timeout(2000)
    page.screenshot(path=DOCS / "images" / "comfyui_graph.png", clip=SEEN)
    page.evaluate("(graph) => app.loadGraphData(graph)", saved)
    loaded = page.evaluate("app.graphToPrompt()")["output"]
    assert all(loaded[id]["inputs"] | node["inputs"] == loaded[id]["inputs"] for id, node in asked.items()), loaded
    (DOCS / "comfyui_workflow.json").write_text(json.dumps(saved, indent=1) + "\n")


def without_nothing(value: Any) -> Any:
    """The same without the names that have no value."""
    if isinstance(value, dict):
        return {key: without_nothing(item) for key, item in value.items() if item is not None or key == "link"}
    return [without_nothing(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
