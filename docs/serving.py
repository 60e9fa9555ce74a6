"""What the scripts beside this file and the tests share: the app as a process of its own, and a browser to look at it.

`served` starts the app on a free port and stops it; `chromium` finds a browser; `settled` waits until a page is drawn.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent
READY = '[data-testid="stApp"][data-test-script-state="notRunning"]'
PAGES = {
    "live": "",
    "replay": "replay",
    "labels": "labels",
    "batch": "batch",
    "layers": "layers",
    "defences": "defences",
    "how": "how",
}
"""By name the paths of all pages."""
WATCH = """(() => {
  window.shifted = 0;
  const add = list => {
    for (const shift of list.getEntries()) if (!shift.hadRecentInput) window.shifted += shift.value;
  };
  new PerformanceObserver(add).observe({type: 'layout-shift', buffered: true});
})()"""
"""For a page to execute before its own scripts: `shifted` says how far its parts moved by themselves since then."""

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_PATHS = ("/usr/bin/chromium", "/snap/bin/chromium", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


@dataclass(frozen=True)
class Server:
    """The running app: where it answers, as host:port, and its process."""

    host: str
    process: subprocess.Popen[str]
    _log: IO[str] = field(repr=False)

    @property
    def address(self) -> str:
        """The address of its first page, without a slash at the end."""
        return f"http://{self.host}"

    def said(self) -> str:
        """What it has written to the console so far."""
        return Path(self._log.name).read_text(encoding="utf-8")


@contextlib.contextmanager
def served(folder: Path = ROOT, **variables: str) -> Iterator[Server]:
    """The app of a folder for as long as the context lasts, with these environment variables beside the present ones.

    Raises RuntimeError with what it said where it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    port = host.partition(":")[2]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.address=127.0.0.1", "--server.port", port]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **variables}, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        server = Server(host, process, log)
        try:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{host}/_stcore/health", timeout=5):
                    break
                if process.poll() is not None:
                    raise RuntimeError(f"The app did not start:\n{server.said()}")
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def chromium() -> str | None:
    """A Chromium that is installed here; else None, with which playwright takes its own."""
    return next(filter(None, map(shutil.which, _NAMES)), next((path for path in _PATHS if Path(path).exists()), None))


def settled(page: Page) -> None:
    """Wait until a page's script has run and nothing is a placeholder any more."""
    page.wait_for_selector(READY)
    page.wait_for_selector('[data-testid="stSkeleton"]', state="detached")
