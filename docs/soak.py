"""Many visitors at once, for minutes: `python docs/soak.py` starts the app and says whether it stood that.

Each visitor without a browser speaks the page's own protocol over a websocket: opens the page, starts a run, follows it
to its end and comes again; every fourth closes its tab half-way, every fifth brings a hostile address. Browsers do the
same in Chromium. Ends with 1 where anything but a plain refusal went wrong or the server's memory grows faster than
`--slope`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = "model=resnet18-tiny&seeds=1&pictures=goldfish"
HOSTILE = (
    "job=../../etc/passwd",
    f"job={'x' * 10_000}",
    "model=%00&seeds=1e999&iterations=-9223372036854775809&pictures=" + "." * 5_000,
    "pictures=%3Cscript%3Ealert(1)%3C/script%3E&bn='%20OR%201=1&preset=%F0%9F%92%A3&hide=%22%3E",
)
PATIENCE = 120.0  # seconds without a word from the server after which it counts as hung


@dataclass
class Report:
    """What came of it. `memory` holds (seconds, MB) of the server, `troubles` whatever should not have happened."""

    finished: int = 0
    left: int = 0
    refused: int = 0
    hostile: int = 0
    browsers: int = 0
    waits: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def slope(self) -> float:
        """MB a minute, by least squares over the last six tenths: before, models and caches are still filled."""
        late = np.array(self.memory[int(0.4 * len(self.memory)) :])
        return float(60 * np.polyfit(late[:, 0], late[:, 1], 1)[0]) if len(late) > 2 else 0.0


@contextlib.contextmanager
def served(**variables: str) -> Iterator[tuple[str, psutil.Process]]:
    """The app on a free port for as long as the context lasts: host and port, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "streamlit", "run", "app.py", f"--server.port={host.partition(':')[2]}"]
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "STREAMLIT_SERVER_ADDRESS": "127.0.0.1", **variables}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{host}/_stcore/health", timeout=5):
                    break
                if process.poll() is not None:
                    raise SystemExit("The app did not start.")
                time.sleep(0.2)
            yield host, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()
            log.seek(0)
            if "Traceback" in (said := log.read()):
                print(said, file=sys.stderr)


class Visitor:
    """One session over a websocket; what the page has shown so far."""

    def __init__(self, connection: ClientConnection, query: str) -> None:
        self.connection, self.query = connection, query
        self.buttons: dict[str, str] = {}
        self.fragment: tuple[str, float] | None = None
        self.words: list[str] = []
        self.errors: list[str] = []
        self.rerun()

    def rerun(self, pressed: str | None = None, fragment: str = "") -> None:
        """Let the script, or one fragment of it, run to its end, with a button pressed or none."""
        message = BackMsg()
        message.rerun_script.query_string = self.query
        message.rerun_script.fragment_id = fragment
        if pressed is not None:
            state = message.rerun_script.widget_states.widgets.add()
            state.id, state.trigger_value = self.buttons[pressed], True
        self.words, self.errors = [], []
        self.connection.send(message.SerializeToString())
        while not self._take(ForwardMsg.FromString(self.connection.recv(timeout=PATIENCE))):
            pass

    def _take(self, message: ForwardMsg) -> bool:
        """Note what a message says; → whether the script has ended."""
        kind = message.WhichOneof("type")
        if kind == "page_info_changed":
            self.query = message.page_info_changed.query_string
        elif kind == "auto_rerun":
            self.fragment = message.auto_rerun.fragment_id, message.auto_rerun.interval
        elif kind == "script_finished":
            if message.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN:
                return True
            self.fragment = None  # the whole page follows, with other fragments or none
        elif kind == "delta" and message.delta.WhichOneof("type") == "new_element":
            element = message.delta.new_element
            name = element.WhichOneof("type")
            if name == "button":
                self.buttons[element.button.label] = element.button.id
            elif name == "markdown":
                self.words.append(element.markdown.body)
            elif name == "exception":
                self.errors.append(f"{element.exception.type}: {element.exception.message}")
            elif name == "alert":
                self.words.append(element.alert.body)
                if element.alert.format == element.alert.ERROR:
                    self.errors.append(element.alert.body)
        return False

    def says(self, text: str) -> bool:
        """Whether the page has shown that since the last rerun."""
        return any(text in words for words in self.words)


def visit(host: str, number: int, turn: int, iterations: int, until: float, report: Report) -> None:
    """Come, do one thing, and go."""
    chance = random.Random(1000 * number + turn)
    hostile = (number + turn) % 5 == 4
    query = chance.choice(HOSTILE) if hostile else f"{SETTINGS}&iterations={iterations}"
    with connect(f"ws://{host}/_stcore/stream", subprotocols=["streamlit"], max_size=None) as connection:  # type: ignore[list-item]
        visitor = Visitor(connection, query)
        if hostile:
            report.hostile += 1
            report.troubles += [f"{query[:60]}: {error}" for error in visitor.errors]
            return
        begun = time.monotonic()
        if "Rebuild the pictures" not in visitor.buttons:
            report.troubles.append(f"The page came without its button: {visitor.words[-3:]}, {visitor.errors}")
            return
        visitor.rerun("Rebuild the pictures")
        if any("runs are waiting already" in error for error in visitor.errors):
            report.refused += 1
            time.sleep(2)
            return
        while visitor.fragment is not None and time.monotonic() < until:
            if visitor.errors:
                break
            if (number + turn) % 4 == 3 and visitor.says("Step "):
                report.left += 1
                return
            identity, interval = visitor.fragment
            time.sleep(interval)
            visitor.rerun(fragment=identity)
        report.troubles += visitor.errors
        if visitor.says("**Finished**"):
            report.finished += 1
            report.waits.append(time.monotonic() - begun)
        elif time.monotonic() < until and not visitor.errors:
            report.troubles.append(f"A run ended without its result: {visitor.words[-3:]}")


def come_again(host: str, number: int, turns: int | None, iterations: int, until: float, report: Report) -> None:
    """A visitor's life, in its own thread."""
    turn = 0
    while time.monotonic() < until and turn != turns:
        try:
            visit(host, number, turn, iterations, until, report)
        except (OSError, TimeoutError, ConnectionClosed) as error:
            report.troubles.append(f"visitor {number}: {error!r}")
            time.sleep(1)
        turn += 1


def browse(host: str, chromium: str | None, iterations: int, until: float, report: Report) -> None:
    """The same in a browser, in its own thread."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        while time.monotonic() < until:
            page = browser.new_page()
            page.on("pageerror", lambda error: report.troubles.append(f"browser: {error}"))
            try:
                page.goto(f"http://{host}/?{SETTINGS}&iterations={iterations}", timeout=PATIENCE * 1000)
                page.get_by_role("button", name="Rebuild the pictures").click(timeout=PATIENCE * 1000)
                left = max(1.0, until - time.monotonic())
                page.get_by_text("Finished after").wait_for(timeout=left * 1000)
                report.browsers += 1
            except Exception as error:  # playwright's own kinds; what matters is whether there was time left
                if time.monotonic() < until:
                    report.troubles.append(f"browser: {str(error).splitlines()[0]}")
            page.close()
        browser.close()


def soak(
    visitors: int,
    browsers: int,
    seconds: float,
    *,
    turns: int | None = None,
    iterations: int = 3,
    chromium: str | None = None,
) -> Report:
    """Serve the app to so many for so long, or until each visitor without a browser has come `turns` times."""
    report = Report()
    limits = {"GRADINV_MAX_WAITING": "10", "GRADINV_MAX_RETAINED": "8", "GRADINV_MAX_LEASE": "10"}
    with served(OMP_NUM_THREADS="1", **limits) as (host, process):
        begun = time.monotonic()
        until = begun + seconds
        shared = (iterations, until, report)
        threads = [
            threading.Thread(target=come_again, args=(host, number, turns, *shared)) for number in range(visitors)
        ]
        threads += [threading.Thread(target=browse, args=(host, chromium, *shared)) for _ in range(browsers)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                report.troubles.append("The server is gone.")
                break
            report.memory.append((time.monotonic() - begun, process.memory_info().rss / 2**20))
            time.sleep(min(1.0, seconds / 20))
        for thread in threads:
            thread.join(PATIENCE)
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{host}/_stcore/health", timeout=30):
            return report
        report.troubles.append("The server does not answer any more.")
    return report


def main() -> int:
    """Do it and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--browsers", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--iterations", type=int, default=3, help="of each run")
    parser.add_argument("--slope", type=float, default=10, help="MB a minute that the server may grow at most")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="path of the browser")
    asked = parser.parse_args()
    report = soak(
        asked.visitors, asked.browsers, 60 * asked.minutes, iterations=asked.iterations, chromium=asked.chromium
    )
    sizes = [size for _, size in report.memory]
    print(f"{asked.visitors} visitors and {asked.browsers} browsers for {asked.minutes:g} minutes:")
    print(
        f"{report.finished} runs finished and {report.browsers} in browsers, {report.left} tabs closed half-way, "
        f"{report.refused} refused by the full queue, {report.hostile} hostile addresses, {len(report.troubles)} "
        "troubles."
    )
    if report.waits:
        print(
            f"From the button to the result: median {np.median(report.waits):.1f} s, at most {max(report.waits):.1f} s."
        )
    print(f"Memory: {sizes[0]:.0f} MB at first, {max(sizes):.0f} at most, {report.slope():+.2f} MB a minute later on.")
    for trouble in dict.fromkeys(report.troubles):
        print(f"  {trouble}")
    return int(bool(report.troubles) or report.slope() > asked.slope)


if __name__ == "__main__":
    sys.exit(main())
