"""The pictures of the server's page in docs/images: ``PYTHONPATH=tests python scripts/page_screenshots.py [FOLDER]``.

A real server draws with the bundled model; the page is looked at in Chromium as on a desk, a tablet and a phone.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright
from servers import start_server

PROMPTS = (
    "a red circle left of a blue square", "a green triangle above a yellow circle", "two blue squares",
    "a large purple circle and a small orange triangle",
)  # fmt: skip

LONG = "a red circle left of a blue square, and beside them, as far as a sentence of this length lets one see, " * 6


def main(folder: Path) -> None:
    """Draw, look, save."""
    home = Path(tempfile.mkdtemp(prefix="fluxrun-page-"))
    server = start_server(home)
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = opened(chromium, server.client.address, 390)
            page.goto(f"{server.client.address}/#history")
            page.locator("#history-empty").wait_for()
            save(page, folder / "serve_390_empty.png")
            for seed, prompt in enumerate(PROMPTS):
                run = server.ask(
                    "POST", "/api/runs", {"overrides": [f"prompt={prompt}", f"seed={seed}", "attention=flash4"]}
                )
                server.events(run["id"])
            page = opened(chromium, server.client.address, 1440)
            page.locator("#options-box summary").click()
            page.select_option("#group-attention", "flash4")
            page.fill("#prompt", PROMPTS[0])
            page.goto(f"{server.client.address}/#run={run['id']}")
            page.locator("#ran tr").first.wait_for()
            save(page, folder / "serve_1440.png")
            page = opened(chromium, server.client.address, 820, dark=True)
            page.goto(f"{server.client.address}/#history")
            page.locator("#runs img").first.wait_for()
            save(page, folder / "serve_820_history.png")
            page = opened(chromium, server.client.address, 390)
            page.fill("#prompt", LONG)
            page.locator("#options-box summary").click()
            page.fill("#more", "atention=math")
            page.locator("#options-box summary").click()
            page.click("#go")
            page.locator("#problem:not([hidden])").wait_for()
            save(page, folder / "serve_390_error.png")
            chromium.close()
    finally:
        server.process.terminate()
        server.process.wait(60)
        shutil.rmtree(home)


def opened(browser: Browser, address: str, width: int, *, dark: bool = False) -> Page:
    """The page in a window of its own."""
    height = 844 if width < 500 else 900
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    page.set_default_timeout(600_000)
    page.goto(address)
    page.locator("#group-attention").wait_for(state="attached")
    return page


def save(page: Page, path: Path) -> None:
    """What is to be seen, once it has settled."""
    page.wait_for_timeout(1500)
    page.screenshot(path=path)
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
