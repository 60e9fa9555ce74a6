"""Many visitors at once, for minutes: `python docs/soak.py` starts the app and says whether it stood that.

Each visitor without a browser speaks the page's own protocol over a websocket: opens the page, starts a run, follows it
to its end and comes again; every fourth closes its tab half-way, every fifth brings a hostile address. Browsers do the
same in Chromium. Ends with 1 where anything but a plain refusal went wrong or the server's memory grows faster than
`--slope`, by more than twice the standard error of that.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field

import numpy as np
import psutil
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from serving import chromium, served, settled

SETTINGS = "model=resnet18-tiny&seeds=1&pictures=goldfish"
HOSTILE = (
    "job=../../etc/passwd",
    f"job={'x' * 10_000}",
    "model=%00&seeds=1e999&iterations=-9223372036854775809&pictures=" + "." * 5_000,
    "pictures=%3Cscript%3Ealert(1)%3C/script%3E&bn='%20OR%201=1&preset=%F0%9F%92%A3&hide=%22%3E",
)
FULL = "runs are waiting already"  # what a visitor reads whom the queue has no place for
GONE = ("This run is not kept here any more", "its page had been closed while others waited")
PATIENCE = 120.0  # seconds without a word from the server after which it counts as hung
BLOCKS = 10  # into which the memory's course is divided: samples that follow each other are not independent


@dataclass
class Report:
    """What came of it. `waits` and `browsed` are the seconds from the button to the result, without and in a browser,
    `opened` those until a browser had drawn the page, `memory` holds (seconds, MB) of the server, `troubles` whatever
    should not have happened."""

    finished: int = 0
    left: int = 0
    refused: int = 0
    hostile: int = 0
    waits: list[float] = field(default_factory=list)
    opened: list[float] = field(default_factory=list)
    browsed: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def slope(self) -> tuple[float, float]:
        """MB a minute and its standard error, by least squares over the last six tenths: before, models and caches are
        still filled. The line goes through the means of `BLOCKS` stretches. The error is infinite where there are fewer
        samples."""
        late = np.array(self.memory[int(0.4 * len(self.memory)) :])
        if len(late) < BLOCKS:
            return 0.0, float("inf")
        seconds, size = np.array([block.mean(axis=0) for block in np.array_split(late, BLOCKS)]).T
        line, covariance = np.polyfit(seconds / 60, size, 1, cov=True)
        return float(line[0]), float(np.sqrt(covariance[0, 0]))


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
        if any(FULL in error for error in visitor.errors):
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


def browse(host: str, path: str | None, iterations: int, until: float, report: Report) -> None:
    """The same in a browser, in its own thread."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        while time.monotonic() < until:
            page = browser.new_page()
            page.set_default_timeout(PATIENCE * 1000)
            page.on("pageerror", lambda error: report.troubles.append(f"browser: {error}"))
            step = "opening the page"
            try:
                begun = time.monotonic()
                page.goto(f"http://{host}/?{SETTINGS}&iterations={iterations}")
                button = page.get_by_role("button", name="Rebuild the pictures")
                button.wait_for()
                settled(page)
                report.opened.append(time.monotonic() - begun)
                step = "waiting for the result"
                begun = time.monotonic()
                button.click()
                ends = [page.get_by_text(text) for text in ("Finished after", FULL, *GONE)]
                any_end = ends[0].or_(ends[1]).or_(ends[2]).or_(ends[3]).first
                any_end.wait_for(timeout=max(1.0, until - begun) * 1000)
                if ends[0].count():
                    report.browsed.append(time.monotonic() - begun)
                elif ends[1].count():
                    report.refused += 1
                    time.sleep(2)
                else:
                    report.troubles.append(f"browser: {any_end.inner_text()}")
            except Exception as error:  # playwright's own kinds; what matters is whether there was time left
                if time.monotonic() < until:
                    report.troubles.append(f"browser, {step}: {str(error).splitlines()[0]}")
            page.close()
        browser.close()


def soak(
    visitors: int,
    browsers: int,
    seconds: float,
    *,
    turns: int | None = None,
    iterations: int = 3,
    browser: str | None = None,
) -> Report:
    """Serve the app to so many for so long, or until each visitor without a browser has come `turns` times."""
    report = Report()
    limits = {"GRADINV_MAX_WAITING": "10", "GRADINV_MAX_RETAINED": "8", "GRADINV_MAX_LEASE": "10"}
    with served(OMP_NUM_THREADS="1", **limits) as server:
        host, process = server.host, psutil.Process(server.process.pid)
        begun = time.monotonic()
        until = begun + seconds
        shared = (iterations, until, report)
        threads = [
            threading.Thread(target=come_again, args=(host, number, turns, *shared)) for number in range(visitors)
        ]
        threads += [threading.Thread(target=browse, args=(host, browser, *shared)) for _ in range(browsers)]
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
        try:
            urllib.request.urlopen(f"http://{host}/_stcore/health", timeout=PATIENCE).close()
        except OSError as error:
            report.troubles.append(f"The server does not answer any more: {error}")
        if "Traceback" in (said := server.said()):
            report.troubles.append(f"The server's log holds a traceback:\n{said[said.index('Traceback') :]}")
    return report


def main() -> int:
    """Do it and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--browsers", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--iterations", type=int, default=3, help="of each run")
    parser.add_argument("--slope", type=float, default=10, help="MB a minute that the server may grow at most")
    parser.add_argument("--chromium", default=chromium(), help="path of the browser")
    asked = parser.parse_args()
    report = soak(
        asked.visitors, asked.browsers, 60 * asked.minutes, iterations=asked.iterations, browser=asked.chromium
    )
    print(f"{asked.visitors} visitors and {asked.browsers} browsers for {asked.minutes:g} minutes:")
    print(
        f"{report.finished} runs finished and {len(report.browsed)} in browsers, {report.left} tabs closed half-way, "
        f"{report.refused} refused by the full queue, {report.hostile} hostile addresses, {len(report.troubles)} "
        "troubles."
    )
    for what, seconds in (
        ("From the button to the result", report.waits),
        ("In browsers, until the page was drawn", report.opened),
        ("In browsers, from the button to the result", report.browsed),
    ):
        if seconds:
            print(f"{what}: median {np.median(seconds):.1f} s, at most {max(seconds):.1f} s.")
    sizes, (slope, error) = [size for _, size in report.memory], report.slope()
    print(
        f"Memory: {sizes[0]:.0f} MB at first, {max(sizes):.0f} at most, {slope:+.2f} ± {error:.2f} MB a minute "
        f"(standard error over {BLOCKS} stretches) after the first four tenths."
    )
    grows = slope - 2 * error > asked.slope
    if not grows and slope + 2 * error > asked.slope:
        print(f"Whether it grows by less than {asked.slope:g} MB a minute cannot be told; let it run longer.")
    for trouble in dict.fromkeys(report.troubles):
        print(f"  {trouble}")
    return int(bool(report.troubles) or grows)


if __name__ == "__main__":
    sys.exit(main())
