"""The page in a real browser: drawing, history, comparing, sweeps; by keyboard, on a phone, in the dark."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from fluxrun.config.schema import GROUPS

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine (apt-get install chromium)"),
]

HTML = "<img src=x onerror=\"document.body.dataset.hacked='1'\"><b>bold</b>"
PATIENCE_MS = 120_000


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def drawn(server):
    """A finished run; with it the worker is warm, and no test waits for its imports."""
    run = server.draw("prompt=a first picture")
    assert run["state"] == "completed"
    return run["id"]


@pytest.fixture
def page(browser, server, drawn):
    context = browser.new_context(viewport={"width": 1440, "height": 900}, base_url=server.client.address)
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda request: problems.append(request.url) if server.client.address not in request.url else None
    )
    page.goto("/")
    page.select_option("#model", "tiny")
    yield page
    context.close()
    assert not [problem for problem in problems if not problem.startswith(("blob:", "data:"))]


def tiny(page):
    for key, value in (("width", "64"), ("height", "64"), ("steps", "2")):
        page.fill(f"#{key}", value)


def test_drawing_by_keyboard(page, server):
    tiny(page)
    page.focus("#prompt")
    page.keyboard.type(f"{HTML} a long prompt {'word ' * 60}")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#result")).to_be_visible()
    expect(page.locator("#pictures img")).to_have_count(1)
    expect(page.locator("#shown-prompt")).to_contain_text("<b>bold</b>")
    expect(page.locator("#ran tr")).to_have_count(len(GROUPS))
    assert page.locator("#times div").count() >= 3
    assert page.evaluate("document.body.dataset.hacked") is None
    assert page.locator("#stage b").count() == 0
    before = page.url
    page.click("#again")
    expect(page).not_to_have_url(before)  # its end
    first, second = server.ask("GET", "/api/runs?search=bold")["runs"][:2]
    assert server.record(first["id"])["images"][0]["sha256"] == server.record(second["id"])["images"][0]["sha256"]
    with page.expect_download() as download:
        page.click("#preset-save")
    assert "# @package _global_" in download.value.path().read_text()


def test_what_would_fall_back_is_said_before_drawing(page):
    page.click("#options-box summary")
    grey = page.locator("#group-attention option[value=flash4]")
    assert "falls" in (grey.get_attribute("class") or "")
    page.select_option("#group-attention", "flash4")
    expect(page.locator("#about-attention")).to_contain_text("runs as sdpa")
    expect(page.locator("#options-count")).to_contain_text("1 would fall back")


def test_an_error_and_a_stop(page):
    page.click("#options-box summary")
    page.fill("#more", "sede=4")
    page.fill("#prompt", "x")
    page.click("#go")
    expect(page.locator("#problem")).to_contain_text("did you mean 'seed'")
    page.fill("#more", "")
    tiny(page)
    page.fill("#steps", "500")
    page.click("#go")
    expect(page.locator("#doing")).to_contain_text("step")
    page.click("#stop")
    expect(page.locator("#problem")).to_contain_text("interrupted")


def test_a_record_with_html_in_every_text(page, server, drawn):
    name = "20200101-000000-0badf00d"
    folder = server.output / "runs" / name
    record = server.record(drawn)

    def poisoned(value):
        if isinstance(value, dict):
            return {HTML if not key.isidentifier() else key: poisoned(item) for key, item in value.items()}
        return (
            [poisoned(item) for item in value] if isinstance(value, list) else HTML if isinstance(value, str) else value
        )

    folder.mkdir(exist_ok=True)
    options = {
        HTML: {"requested": HTML, "effective": HTML, "fallbacks": [{"option": HTML, "reason": HTML}], "facts": {}}
    }
    poison = {
        **poisoned(record),
        "options": options,
        "error": {"type": HTML, "message": HTML, "stage": HTML},
        "notes": [HTML],
    }
    (folder / "run.json").write_text(json.dumps(poison))
    page.goto("/#history")
    expect(page.locator("#runs a").first).to_be_visible()
    page.goto(f"/#run={name}")
    expect(page.locator("#notes li")).to_have_text(HTML)
    time.sleep(0.5)
    assert page.evaluate("document.body.dataset.hacked") is None
    assert page.locator("main b").count() == 0


def test_history_and_comparing(page, server):
    for seed in (1, 2):
        assert server.draw("prompt=a kite", f"seed={seed}")["state"] == "completed"
    page.click("nav a[data-view=history]")
    page.fill("#search", "kite")
    expect(page.locator("#runs a")).to_have_count(2)
    page.fill("#search", "nothing like it")
    expect(page.locator("#history-empty")).to_be_visible()
    page.fill("#search", "kite")
    for number in (0, 1):
        expect(page.locator("#runs a")).to_have_count(2)
        page.locator("#runs a").nth(number).click()
        expect(page.locator("#result")).to_be_visible()
        page.click("#to-compare")
        if number == 0:
            page.click("nav a[data-view=history]")
    expect(page.locator("#distance")).to_contain_text("PSNR")
    page.locator("#split").fill("20")
    assert page.evaluate("document.getElementById('edge').style.left") == "20%"


def test_a_sweep(page):
    tiny(page)
    page.fill("#prompt", "a sweep")
    page.click("nav a[data-view=sweep]")
    page.check("#axes input[value=sdpa]")
    page.check("#axes input[value=math]")
    expect(page.locator("#sweep-count")).to_have_text("2 pictures")
    page.click("#sweep-go")
    expect(page.locator("#sweep-state")).to_contain_text("2 of 2 done")
    expect(page.locator("#sweep-rows img")).to_have_count(2)
    expect(page.locator("#report")).to_be_visible()
    with page.context.expect_page() as opened:
        page.click("#report")
    expect(opened.value.locator("h1")).to_be_visible()


@pytest.mark.parametrize("width", [390, 820])
def test_no_view_is_wider_than_the_screen(browser, server, width):
    context = browser.new_context(
        viewport={"width": width, "height": 800}, base_url=server.client.address, color_scheme="dark"
    )
    page = context.new_page()
    for view in ("draw", "history", "compare", "sweep"):
        page.goto(f"/#{view}")
        expect(page.locator(f"#{view}")).to_be_visible()
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(18, 23, 28)"
    context.close()
