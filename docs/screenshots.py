"""Take the pictures of the pages that the documentation shows: `python docs/screenshots.py` writes docs/images/*.webp.

Starts the app on a free port, runs one reconstruction and photographs every page in Chromium, light and dark, on a
wide screen and on a phone. The names say page, width and scheme. Of each page that it opens it says how soon it was
painted, how far its parts moved meanwhile, and what the browser's console complained about. `--chromium` names a
browser where none is found. On two cores it takes some minutes.
"""

from __future__ import annotations

import argparse
import io
from itertools import product
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from serving import ROOT, WATCH, chromium, served, settled

SIZES = {1280: (860, 1.5), 390: (844, 1.5)}
"""By width the height of the screen and the pixels of a CSS pixel."""
SCHEMES = ("light", "dark")
LOOKS = tuple(product(SIZES, SCHEMES))
STILL = {
    "replay": "replay?run=four&beside=noise",
    "labels": "labels?repeats=2",
    "batch": "batch?reveal=true",
    "layers": "layers?noise=1e-5",
    "defences": "defences?clip=1&noise=1e-4",
    "how": "how",
}
"""By name the pages where nothing goes on, with the settings that they are shown with."""
LIVE = ("live-start", "live-running", "live-finished")
REBUILT = "4 of 4 labels read from the gradient alone"
MAIN = '[data-testid="stMain"]'
LATE = """() => Number([...document.querySelectorAll('.gi-progress')].at(-1)?.getAttribute('aria-valuenow')) >= 60"""
HOUR = 3_600_000  # milliseconds
MEASURES = """() => [
  performance.getEntriesByName('first-contentful-paint')[0]?.startTime / 1000, performance.now() / 1000, window.shifted
]"""
QUALITY = 68


class Camera:
    """Photographs pages, no higher than `most` CSS pixels and at least as high as the screen, into `folder`."""

    def __init__(self, browser: Browser, folder: Path, most: int) -> None:
        self.browser, self.folder, self.most = browser, folder, most
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, url: str, width: int = 1280, scheme: str = "light") -> Page:
        """A page that has been drawn completely, of a new visitor. Nothing moves by itself in it."""
        height, scale = SIZES[width]
        page = self.browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme="dark" if scheme == "dark" else "light",
            device_scale_factor=scale,
            has_touch=width < 640,
            reduced_motion="reduce",
        )
        page.set_default_timeout(HOUR)
        page.add_init_script(WATCH)
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
        page.goto(url)
        settled(page)
        painted, drawn, shifted = page.evaluate(MEASURES)
        print(
            f"{url} at {width} px: first contentful paint {painted:.1f} s, drawn {drawn:.1f} s, "
            f"layout shift {shifted:.3f}, {len(wrong)} errors",
            *dict.fromkeys(wrong),
            sep="\n  ",
            flush=True,
        )
        return page

    def take(self, page: Page, name: str, width: int, scheme: str) -> None:
        """Write what is in sight, and what one has to scroll for up to `most`; say the picture's name."""
        page.mouse.move(0, 0)
        page.wait_for_timeout(1500)
        whole = page.evaluate(f"() => document.querySelector('{MAIN}').scrollHeight")
        least = SIZES[width][0]
        page.set_viewport_size({"width": width, "height": max(least, min(whole, self.most))})
        page.wait_for_timeout(1000)
        with Image.open(io.BytesIO(page.screenshot())) as image:
            name = f"{name}-{width}-{scheme}"
            image.convert("RGB").save(self.folder / f"{name}.webp", quality=QUALITY, method=6)
            print(name, flush=True)


def live(camera: Camera, address: str, names: set[str]) -> None:
    """Photograph the choice, the run when it is almost through, and its end."""
    for width, scheme in LOOKS if "live-start" in names else ():
        page = camera.open(address, width, scheme)
        page.get_by_text(REBUILT).wait_for()
        camera.take(page, "live-start", width, scheme)
        page.close()
    for width, scheme in () if names.isdisjoint(LIVE[1:]) else LOOKS:  # a run for each, which is over soon
        page = camera.open(address, width, scheme)
        page.get_by_text(REBUILT).wait_for()
        page.get_by_role("button", name="Rebuild the pictures").click()
        for name in LIVE[1:]:
            if name == "live-running":
                page.wait_for_function(LATE)
            else:
                page.get_by_text("Finished after").wait_for()
                settled(page)
            if name in names:
                camera.take(page, name, width, scheme)
        page.close()


def main() -> None:
    """Photograph the pages that are asked for, else all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help=f"of {', '.join((*LIVE, *STILL))}; default: all")
    parser.add_argument("--model", default="resnet18-tiny", help="of the run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--iterations", type=int, help="default: the demo preset's")
    parser.add_argument("--most", type=int, default=1200, help="height of a picture at most, in CSS pixels")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--chromium", default=chromium(), help="path of the browser")
    asked = parser.parse_args()
    names = set(asked.pages) or {*LIVE, *STILL}
    if unknown := sorted(names - {*LIVE, *STILL}):
        parser.error(f"no such page: {', '.join(unknown)}")
    settings = f"model={asked.model}&seeds={asked.seeds}"
    if asked.iterations is not None:
        settings += f"&iterations={asked.iterations}"
    with served() as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=asked.chromium, args=["--no-sandbox"])
        camera = Camera(browser, asked.out, asked.most)
        for name, (width, scheme) in product((name for name in STILL if name in names), LOOKS):
            page = camera.open(f"{server.address}/{STILL[name]}", width, scheme)
            camera.take(page, name, width, scheme)
            page.close()
        live(camera, f"{server.address}/?{settings}", names)
        browser.close()


if __name__ == "__main__":
    main()
