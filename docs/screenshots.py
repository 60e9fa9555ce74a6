"""Take the pictures of the page that the documentation shows: `python docs/screenshots.py` writes docs/images/*.webp.

Starts the app on a free port, runs one reconstruction and photographs it in Chromium, which playwright finds itself
(`playwright install chromium`) or which `--chromium` names. On two cores it takes some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
READY = '[data-testid="stApp"][data-test-script-state="notRunning"]'
WIDE, PHONE = (1280, 860), (390, 844)
HOUR = 3_600_000  # milliseconds


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The app's address for as long as the context lasts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", f"--server.port={port}"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "STREAMLIT_SERVER_ADDRESS": "127.0.0.1"})
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/_stcore/health", timeout=5):
                break
            if process.poll() is not None:
                raise SystemExit("The app did not start; its messages are above.")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def opened(browser: Browser, url: str, size: tuple[int, int] = WIDE, scheme: str = "light") -> Page:
    """A page that has been drawn completely."""
    page = browser.new_page(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=2 if size == PHONE else 1.5,
    )
    page.set_default_timeout(HOUR)
    page.goto(url)
    page.wait_for_selector(READY)
    page.wait_for_selector('[data-testid="stSkeleton"]', state="detached")
    return page


def photograph(page: Page, name: str) -> None:
    """Write what is in sight to docs/images."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)
    IMAGES.mkdir(exist_ok=True)
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").save(IMAGES / f"{name}.webp", quality=84, method=6)


def main() -> None:
    """Photograph the choice, the run when it is almost through, and its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50-tiny")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--iterations", type=int, help="default: the demo preset's")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="path of the browser")
    asked = parser.parse_args()
    settings = f"model={asked.model}&seeds={asked.seeds}"
    if asked.iterations is not None:
        settings += f"&iterations={asked.iterations}"
    with served() as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=asked.chromium, args=["--no-sandbox"])
        page = opened(browser, f"{address}/?{settings}")
        page.get_by_text("labels read from the gradient alone").wait_for()
        photograph(page, "start")
        photograph(opened(browser, f"{address}/?{settings}", PHONE, "dark"), "start-phone-dark")
        page.get_by_role("button", name="Rebuild the pictures").click()
        page.wait_for_function(
            "() => Number(document.querySelector('.gi-progress')?.getAttribute('aria-valuenow')) >= 85"
        )
        photograph(page, "live")
        photograph(opened(browser, page.url, scheme="dark"), "live-dark")
        page.get_by_text("Finished after").wait_for()
        photograph(page, "finished")
        photograph(opened(browser, page.url, PHONE), "finished-phone")
        browser.close()


if __name__ == "__main__":
    main()
