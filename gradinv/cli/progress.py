"""How far a command is, and how it is stopped."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from tqdm import tqdm


@contextlib.contextmanager
def counted(**options: Any) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on the standard error, where that is a terminal: → to be called with how much is done, and of how
    much, where that is known."""
    with tqdm(dynamic_ncols=True, disable=None, **options) as bar:

        def to(done: int, total: int | None = None) -> None:
            bar.total = total or bar.total
            bar.update(done - bar.n)

        yield to


@contextlib.contextmanager
def signals_set(stop: threading.Event) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM set `stop`, the second one ends the process: → the signals received so far."""
    received: list[int] = []
    handled = (signal.SIGINT, signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stop.set()
        for other in handled:
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_DFL)

    previous = {number: signal.signal(number, handle) for number in handled}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
