"""Does the page work in a browser: no errors, no sideways scroll, numbers on hover?

It is opened in headless Chromium, where that is installed. A screenshot of each view
stays in the folder that the variable SCREENSHOTS names, otherwise with pytest's files.
"""

import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_directories import CURVATURE, GRADIENT_DOT, sweep_part, write_run

from entropy_ddp.report.writing import write_report

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HOSTILE = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
TEXTS = [["1", HOSTILE, " long words", "\n"] * 30, ["2", "4"], ["8", "16", "32"] * 200]
# The response with the hostile token; the longest one moves the entropy more.
SECOND_TEXT = ".texts > li:nth-child(2) .tokens"
READABLE = 4.5  # WCAG 2: contrast of text at level AA


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with every part, a failed check and long texts."""
    failed = {
        "name": "ESS / N", "value": 0.05, "expected": ">= 0.1 " + "to be trusted " * 9,
        "verdict": "fail", "hint": "probe a smaller update.lr_override",
    }  # fmt: skip
    parts = {"curvature": CURVATURE, "gradient_dot": GRADIENT_DOT, **sweep_part()}
    run = write_run(
        tmp_path_factory.mktemp("runs") / "run",
        {**parts, "status": "untrusted", "audit": [failed]},
        texts=TEXTS,
        prompt=HOSTILE,
    )
    return write_report([run], None).page


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium at the page, with its console and its requests recorded."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    folder = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.get(page.as_uri())
    yield driver
    driver.quit()


def look(browser: Any, *, width: int = 1280, dark: bool = False) -> None:
    """Show the page at this width, light or dark."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {
        "width": width,
        "height": 900,
        "deviceScaleFactor": 1,
        "mobile": width < 600,
    }
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_the_page_fetches_nothing_and_complains_of_nothing(
    browser: Any, page: Path
) -> None:
    """No request but the page's own, no console message, no text that ran."""
    messages = [
        json.loads(entry["message"])["message"]
        for entry in browser.get_log("performance")
    ]
    sent = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
        and message["params"]["documentURL"] == page.as_uri()
    }
    assert {url for url in sent if not url.startswith("data:")} == {page.as_uri()}
    assert browser.get_log("browser") == []
    assert browser.title == "Entropy change: run"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False)])
def test_nothing_scrolls_sideways(
    browser: Any, tmp_path: Path, width: int, dark: bool
) -> None:
    """On a screen and on a phone, also with everything unfolded."""
    look(browser, width=width, dark=dark)
    for unfolded in (False, True):
        browser.execute_script(
            "for (const d of document.querySelectorAll('details')) d.open = arguments[0]",
            unfolded,
        )
        scrolled, shown = browser.execute_script(
            "return [document.scrollingElement.scrollWidth, innerWidth]"
        )
        assert scrolled <= shown
        if not unfolded:
            name = f"report-{width}-{'dark' if dark else 'light'}.png"
            _keep_screenshot(browser, tmp_path / name)


def _keep_screenshot(browser: Any, path: Path) -> None:
    """The whole page as an image."""
    size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    taken = browser.execute_cdp_cmd(
        "Page.captureScreenshot",
        {"captureBeyondViewport": True, "clip": {**size, "scale": 1}},
    )
    content = base64.b64decode(taken["data"])
    assert content.startswith(b"\x89PNG")
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / path.name
    path.write_bytes(content)


def test_hovering_a_token_shows_its_numbers(browser: Any) -> None:
    """Also by keyboard and by tap; Escape and looking elsewhere put them away."""
    look(browser)
    tip = browser.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    token = browser.find_element(By.CSS_SELECTOR, f"{SECOND_TEXT} [data-n]")
    ActionChains(browser).move_to_element(token).perform()
    said = tip.text
    for words in (
        "token 1", "position 1", "share +9.5 × 10⁻⁵ nats per token", "log p −3.25 nats",
        "entropy 0.875 nats", "advantage −0.5", "covariance score 0.0625",
    ):  # fmt: skip
        assert words in said.replace("\N{NO-BREAK SPACE}", " ")
    ActionChains(browser).move_to_element(
        browser.find_element(By.CSS_SELECTOR, "h1")
    ).perform()
    assert not tip.is_displayed()
    browser.execute_script(
        "document.querySelector(arguments[0]).focus()", f"{SECOND_TEXT} [tabindex='0']"
    )
    assert "position 1" in tip.text
    active = browser.switch_to.active_element
    active.send_keys(Keys.ARROW_RIGHT)
    assert "position 2" in tip.text
    assert HOSTILE in tip.text
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()
    look(browser, width=400)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    token.click()
    assert "position 1" in tip.text
    box = browser.execute_script(
        "const b = arguments[0].getBoundingClientRect(); return [b.left, b.right]", tip
    )
    assert 0 <= box[0] and box[1] <= 400


CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function blend(colours) {
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function luminance(rgb) {
  const [r, g, b] = rgb.map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(node) {
  const grounds = [];
  for (let at = node; at instanceof Element; at = at.parentElement) {
    grounds.unshift(getComputedStyle(at).backgroundColor);
  }
  const style = getComputedStyle(node);
  const ink = node instanceof SVGElement ? style.fill : style.color;
  const ground = blend(grounds);
  const [a, b] = [luminance(ground), luminance(blend([...grounds, ink]))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}
const found = {};
for (const node of document.querySelectorAll("main *")) {
  const has = [...node.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim());
  if (!has || node.tagName === "STYLE") continue;
  const kind = `${node.tagName} ${node.getAttribute("class") || ""}`;
  found[kind] = Math.min(found[kind] ?? 99, contrast(node));
}
return found;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_contrast(browser: Any, dark: bool) -> None:
    """On its ground, light or dark, the strongest tokens and the figures included."""
    look(browser, dark=dark)
    found = browser.execute_script(CONTRASTS)
    assert {"SPAN cold", "SPAN warm", "text ", "P alarm", "H1 "} <= set(found)
    assert {kind: c for kind, c in found.items() if c < READABLE} == {}


def test_a_comparison_is_read_on_any_screen(browser: Any, tmp_path: Path) -> None:
    """Wide or narrow, light or dark, folded or not; the page before comes back."""
    before = browser.current_url
    runs = [
        write_run(
            tmp_path / f"step{step}",
            config={"checkpoint.path": f"out/checkpoint-{step}"},
            texts=TEXTS,
        )
        for step in (10, 20, 30)
    ]
    browser.get(write_report(runs, None).page.as_uri())
    for width, dark in ((1280, False), (1280, True), (400, False), (400, True)):
        look(browser, width=width, dark=dark)
        name = f"comparison-{width}-{'dark' if dark else 'light'}.png"
        _keep_screenshot(browser, tmp_path / name)
        browser.execute_script(
            "for (const d of document.querySelectorAll('details')) d.open = true"
        )
        scrolled, shown = browser.execute_script(
            "return [document.scrollingElement.scrollWidth, innerWidth]"
        )
        assert scrolled <= shown
        found = browser.execute_script(CONTRASTS)
        assert {kind: c for kind, c in found.items() if c < READABLE} == {}
    assert browser.get_log("browser") == []
    browser.get(before)
