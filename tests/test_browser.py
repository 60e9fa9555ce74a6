"""The app as a process, driven in Chromium: from the first look to a reconstruction and back by its link."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from serving import PAGES, WATCH, served, settled

pytestmark = pytest.mark.browser

PATIENCE = 180_000  # milliseconds after which something hangs; nothing depends on how fast it is
RECONSTRUCTION = '.gi-board img[alt^="Reconstruction"]'

# Text whose contrast with what is painted behind it is below 4.5, in shadow trees and charts as well; icons and what is
# disabled left out.
FAINT = """() => {
  const parse = text => {
    const numbers = text.match(/[\\d.]+/g).map(Number), scale = text.startsWith('color(srgb') ? 255 : 1;
    return [...numbers.slice(0, 3).map(v => v * scale), numbers[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = colour => {
    const [red, green, blue] = colour.map(v => linear(v / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const above = node => node.parentElement ?? node.getRootNode().host;
  const behind = element => {
    const layers = [], text = element.getBoundingClientRect();
    const [x, y] = [(text.left + text.right) / 2, (text.top + text.bottom) / 2];
    for (let node = element, scrolls = false; node; node = above(node)) {
      const box = node.getBoundingClientRect(), style = getComputedStyle(node), colour = parse(style.backgroundColor);
      // What hangs out of its parent, as a slider's number, has something else behind it; not so what is scrolled away.
      scrolls ||= style.overflowY !== 'visible';
      if (!scrolls && (x < box.left || x > box.right || y < box.top || y > box.bottom)) continue;
      if (colour[3]) layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const faint = [];
  let seen = 0;
  const check = text => {
    const element = text.parentElement, style = getComputedStyle(element), words = text.textContent.trim();
    const visible = element.checkVisibility({opacityProperty: true, visibilityProperty: true});
    if (!words || !visible || element.getBoundingClientRect().width < 2) return;
    if (element.closest('script, style, [disabled]') || style.fontFamily.includes('Material')) return;
    const drawn = element.closest('svg') !== null;  // a chart's labels
    const colour = parse(drawn ? style.fill : style.color);
    if (drawn) colour[3] *= parseFloat(style.fillOpacity);
    for (let node = element; node; node = above(node)) colour[3] *= parseFloat(getComputedStyle(node).opacity);
    const ground = behind(element);
    const [high, low] = [luminance(over(colour, ground)), luminance(ground)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    seen += 1;
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)}: ${words}`);
  };
  const look = root => {
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
    while (walk.nextNode()) {
      if (walk.currentNode.nodeType === Node.TEXT_NODE) { if (walk.currentNode.parentElement) check(walk.currentNode); }
      else if (walk.currentNode.shadowRoot) look(walk.currentNode.shadowRoot);
    }
  };
  look(document.querySelector('[data-testid="stApp"]'));
  return seen < 20 ? ["there is hardly any text"] : faint;
}"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with served(OMP_NUM_THREADS="1") as running:
        yield running.address
        assert "Traceback" not in running.said(), running.said()


class Visit:
    """A page of the app with all that went wrong on it."""

    def __init__(self, browser: Any, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page.set_default_timeout(PATIENCE)
        self.page.add_init_script(WATCH)
        self.troubles: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("requestfailed", lambda request: self.troubles.append(request.url))
        self.page.on("request", lambda request: self._check(request.url))

    def _hear(self, message: Any) -> None:
        # Streamlit looks for its server below a page's own path first: two addresses that are not there.
        probe = message.location["url"].endswith(("/_stcore/health", "/_stcore/host-config"))
        if message.type == "error" and not (probe and "404" in message.text):
            self.troubles.append(f"{message.text} ({message.location['url']})")

    def _check(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
            self.troubles.append(f"asks for {url}")

    def open(self, url: str) -> Visit:
        self.page.goto(url)
        return self.settle()

    def settle(self) -> Visit:
        """Wait until the script has run and nothing is a placeholder any more."""
        settled(self.page)
        return self


def test_a_visitor_picks_pictures_and_sees_them_come_back_and_again_after_a_reload(server: str, browser: Any) -> None:
    visit = Visit(browser).open(f"{server}/?model=resnet18-tiny&seeds=1&iterations=150&pictures=goldfish")
    page = visit.page
    page.get_by_role("button", name="pizza").click()
    page.get_by_text("2 of 2 labels read from the gradient alone").wait_for()
    visit.settle()
    page.get_by_role("button", name="Rebuild the pictures").click()

    # Something moves before there is a picture: a layer after the other is solved.
    page.wait_for_selector(".gi-ladder .gi-exact")
    page.wait_for_selector(RECONSTRUCTION)
    first = page.locator(RECONSTRUCTION).first
    before = first.get_attribute("src")
    page.evaluate(f"() => {{ window.kept = document.querySelector('{RECONSTRUCTION}') }}")
    page.get_by_text("Finished after 150 of 150 iterations").wait_for()
    assert before is not None and before.startswith("data:image/webp")
    assert first.get_attribute("src") != before
    assert page.locator(RECONSTRUCTION).count() == 2

    # What has been drawn has a size, and the link leads back to it: after a reload, and in another tab.
    assert first.evaluate("image => image.complete && image.naturalWidth >= 64")
    assert "job=" in page.url
    shown = first.get_attribute("src")
    page.reload()
    page.wait_for_selector(RECONSTRUCTION)
    assert page.locator(RECONSTRUCTION).first.get_attribute("src") == shown
    other = Visit(browser).open(page.url)
    other.page.wait_for_selector(RECONSTRUCTION)
    for visitor in (other, Visit(browser, 390, "dark").open(page.url)):
        visitor.page.wait_for_selector('[data-testid="stPlotlyChart"]')  # drawn last
        visitor.settle()
        assert visitor.page.evaluate("() => window.shifted") < 0.1
        assert visitor.troubles == []
    assert other.page.locator(RECONSTRUCTION).first.get_attribute("src") == shown
    presented = Visit(browser).open(f"{page.url}&present=1")
    presented.page.wait_for_selector(RECONSTRUCTION)
    presented.page.wait_for_selector(".st-key-reveal button")
    presented.settle()
    assert presented.page.evaluate("() => window.shifted") < 0.1 and presented.troubles == []
    # Another browser watches: it can neither stop the run nor start it again.
    again = "The same batch, with a defence"
    assert (page.get_by_text(again).count(), other.page.get_by_text(again).count()) == (1, 0)
    with page.expect_download() as download:
        page.get_by_role("button", name="Everything").click()
    assert download.value.suggested_filename == "gradinv-resnet18-tiny-64px-goldfish-pizza-step-150.zip"

    # After another choice, the browser's Back leads to the run.
    page.get_by_role("button", name="New run").click()
    page.get_by_role("button", name="Rebuild the pictures").wait_for()
    visit.settle()
    page.go_back()
    page.get_by_text("Finished after 150 of 150 iterations").wait_for()
    assert visit.troubles == other.troubles == []


def test_live_pictures_are_swapped_in_place_and_stop_ends_the_run(server: str, browser: Any) -> None:
    visit = Visit(browser).open(f"{server}/?model=resnet18-tiny&seeds=1&iterations=5000&pictures=goldfish")
    page = visit.page
    page.get_by_role("button", name="Rebuild the pictures").click()
    page.wait_for_selector(RECONSTRUCTION)
    page.wait_for_selector('[data-testid="stEChartsChart"] canvas')  # comes with the first picture, or after it
    page.evaluate(
        f"""() => {{ window.kept = document.querySelector('{RECONSTRUCTION}'); window.source = window.kept.src;
        window.chart = document.querySelector('[data-testid="stEChartsChart"] canvas') }}"""
    )
    page.wait_for_function("() => window.kept.src !== window.source")
    assert page.evaluate("() => document.contains(window.kept) && document.contains(window.chart)")
    page.get_by_role("button", name="Stop and keep the result").click()
    page.get_by_text("Stopped after").wait_for()
    assert page.locator(RECONSTRUCTION).count() == 1
    assert visit.troubles == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
@pytest.mark.parametrize("name", PAGES)
def test_the_page_fits_can_be_read_and_says_what_its_pictures_show(
    server: str, browser: Any, name: str, width: int, scheme: str
) -> None:
    few = {"defences": "&batch_size=1", "layers": "&batch_size=2"}.get(name, "")  # they solve layers
    asked = f"{PAGES[name]}?model=resnet18-tiny&noise=1e-3&reveal=true{few}"
    visit = Visit(browser, width, scheme).open(f"{server}/{asked}")
    visit.page.wait_for_selector(".gi-knowledge" if name == "live" else '[data-testid="stExpander"]')  # drawn last
    visit.settle()
    assert visit.page.evaluate("() => window.shifted") < 0.1
    main = '[data-testid="stMain"]'
    assert visit.page.evaluate(f"() => document.querySelector('{main}').scrollWidth") <= width
    assert visit.page.evaluate("() => [...document.images].filter(image => !image.hasAttribute('alt')).length") == 0
    assert visit.page.evaluate(FAINT) == []
    assert visit.troubles == []
    visit.page.close()
