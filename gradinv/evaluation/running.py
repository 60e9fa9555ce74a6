"""Doing the tasks that are missing, in this process or in several."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.synchronize import Event
from typing import cast

import torch

from gradinv import breaching, metrics
from gradinv.breaching import Stopped
from gradinv.evaluation.bench import Bench
from gradinv.evaluation.ledger import Ledger
from gradinv.evaluation.plan import Plan, Row, Values
from gradinv.evaluation.tasks import TASKS
from gradinv.gallery import Progress
from gradinv.types import GradinvError, memory_exhausted


def measure(
    ledger: Ledger, *, workers: int = 1, stop: threading.Event | None = None, report: Progress | None = None
) -> Iterator[tuple[Row, int]]:
    """Do the tasks that are missing and keep each; yields every one that is done. Ends early where `stop` is set.

    With several workers each is a process of its own, with its share of this one's threads. A task that fails with a
    GradinvError or for want of memory is noted and the others go on. `report` is told how far the gallery is, where one
    is needed. Raises GradinvError where nothing can be measured, and KeyboardInterrupt where `stop` is set while the
    gallery is made.
    """
    stop = stop or threading.Event()
    if workers < 1:
        raise GradinvError(f"At least one worker has to do the work, not {workers}.")
    device = ledger.model.device.type
    if workers > 1 and device != "cpu":
        raise GradinvError(f"Several workers share a CPU; a {device} device is for one.")
    if any(row.peer is not None for row in ledger.plan.rows):
        breaching.require_breaching()
    bench = Bench(ledger.plan, ledger.model, stop, report)
    missing = ledger.missing
    if any(row.config is None for row, _ in missing) or ledger.plan.command in ("batch-size", "defences"):
        _ = bench.gallery  # once, before several processes would each make it
    if ledger.plan.lpips:
        metrics.lpips(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))  # said now where it cannot be had
    ledger.begin()
    workers = min(workers, len(missing))
    outcomes = _in_processes(ledger.plan, missing, workers, stop) if workers > 1 else _in_turn(bench, missing)
    for (row, batch), outcome in outcomes:
        ledger.add(row, batch, outcome)
        yield row, batch
    if ledger.errors and not ledger.values and not stop.is_set():
        raise GradinvError(next(iter(ledger.errors.values())))


def _in_turn(bench: Bench, tasks: Sequence[tuple[Row, int]]) -> Iterator[tuple[tuple[Row, int], Values | str]]:
    for row, batch in tasks:
        try:
            yield (row, batch), _do(bench, row, batch)
        except Stopped:
            return
        if bench.stop.is_set():
            return


def _do(bench: Bench, row: Row, batch: int) -> Values | str:
    try:
        return TASKS[bench.plan.command](bench, row, batch)
    except GradinvError as error:
        return str(error)
    except Exception as error:  # The next task may be smaller; what this one held is let go of with the exception.
        if (exhausted := memory_exhausted(error)) is None:
            raise
        return exhausted


_bench: Bench | None = None
"""In a worker process: the bench that its tasks share."""


def _in_processes(
    plan: Plan, tasks: Sequence[tuple[Row, int]], workers: int, stop: threading.Event
) -> Iterator[tuple[tuple[Row, int], Values | str]]:
    # spawn: a forked child of a process whose torch has started threads may hang.
    context = multiprocessing.get_context("spawn")
    ending = context.Event()
    threads = max(1, torch.get_num_threads() // workers)
    waiting = iter(tasks)
    with ProcessPoolExecutor(workers, context, _start_worker, (plan, threads, ending)) as pool:
        running = {pool.submit(_work, task) for task in itertools.islice(waiting, 2 * workers)}
        try:
            while running:
                done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                if stop.is_set():
                    return
                for future in done:
                    yield future.result()
                running |= {pool.submit(_work, task) for task in itertools.islice(waiting, len(done))}
        except BrokenProcessPool as error:
            raise GradinvError(
                "A worker process has ended, perhaps for want of memory; repeat the command with fewer workers."
            ) from error
        finally:
            ending.set()  # a task in progress ends within one evaluation
            pool.shutdown(cancel_futures=True)


def _start_worker(plan: Plan, threads: int, ending: Event) -> None:
    global _bench
    # Ctrl-C reaches every process of the terminal; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    # Of an event, only `is_set` is asked.
    stop = cast(threading.Event, ending)
    _bench = Bench(plan, plan.load(), stop)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers, and nobody would take what they go on to measure."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(task: tuple[Row, int]) -> tuple[tuple[Row, int], Values | str]:
    assert _bench is not None
    return task, _do(_bench, *task)
