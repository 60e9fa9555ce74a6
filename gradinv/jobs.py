"""Jobs: one worker thread, a queue with places, leases, limits. Nothing here knows of Streamlit or touches the disk.

Whoever watches a job polls `JobManager.state`, which also renews the job's lease. The worker publishes immutable
updates; a watcher that comes late, or twice, sees the same.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from gradinv import pace
from gradinv.types import GradinvError, memory_exhausted

log = logging.getLogger(__name__)

Status = Literal["queued", "running", "done", "stopped", "failed"]
FINISHED: frozenset[Status] = frozenset({"done", "stopped", "failed"})


@dataclass(frozen=True)
class Limits:
    """What a manager accepts and keeps. A host sets each field by the environment variable GRADINV_MAX_<FIELD>, as in
    GRADINV_MAX_COST=1e8; these are all that there are.

    cost               batch size × pixels of an image × iterations × seeds of one job
    gradient           bytes of a gradient that a visitor brings; the server also takes no more than its maxUploadSize
    gradients          bytes of all such gradients that are held, of all visitors together; as many again of files that
                       are just being sent
    waiting            jobs in the queue
    retained           finished jobs that are kept, of all visitors together
    retained_bytes     what these may hold
    retained_seconds   how long one is kept that nobody looks at any more
    lease              seconds after which a job that nobody looks at makes room for one that waits; longer than the one
                       tick a minute to which browsers slow the timers of a hidden tab
    """

    cost: float = 1e12
    gradient: int = 128 * 2**20
    gradients: int = 1024 * 2**20
    waiting: int = 20
    retained: int = 24
    retained_bytes: int = 256 * 2**20
    retained_seconds: float = 6 * 3600.0
    lease: float = 180.0

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Limits:
        """The defaults, but for what the variables say. Raises GradinvError for what is no positive number."""
        given: dict[str, Any] = {}
        for item in fields(cls):
            name = f"GRADINV_MAX_{item.name.upper()}"
            if text := variables.get(name):
                value = math.nan
                with contextlib.suppress(ValueError):
                    value = float(text)
                if not 0 < value < math.inf:
                    raise GradinvError(f"{name} must be a positive number such as {item.default:g}, not {text!r}.")
                given[item.name] = math.ceil(value) if isinstance(item.default, int) else value
        return cls(**given)


class Handle(Protocol):
    """What a job's work sees of the manager: `stop` is set when it is to end; whatever it has published stays."""

    @property
    def stop(self) -> threading.Event: ...

    def publish(self, update: Any, size: int, remaining: float | None = None) -> None:
        """Replace what watchers see. `size`: bytes held by this job as a whole; `remaining`: seconds until it ends, as
        far as it knows."""


class Work(Protocol):
    """What a job does. `cost` is batch size × pixels of an image × iterations × seeds."""

    @property
    def cost(self) -> int: ...

    def check(self) -> None:
        """Raises GradinvError where the work cannot be accepted."""

    def __call__(self, handle: Handle) -> Status:
        """Do it, publish on the way, and say whether it is `done` or was `stopped`. May raise anything."""


@dataclass(frozen=True)
class JobState:
    """A job at one moment. `place` is 0 for what is not queued, else 1 for the next to run; `wait` is the seconds until
    it begins, None where that cannot be told. `update` is the latest published, `reason` one sentence on why it failed
    or was dropped, `stopping` whether it was told to end and has not yet, `owner` whoever submitted it."""

    id: str
    status: Status
    place: int
    wait: float | None
    update: Any
    reason: str | None
    work: Work
    stopping: bool = False
    owner: str | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will be published."""
        return self.status in FINISHED


@dataclass(eq=False)
class _Job:
    id: str
    work: Work
    owner: str | None
    leased_until: float
    published: Callable[[_Job, float | None], None]
    status: Status = "queued"
    update: Any = None
    size: int = 0
    reason: str | None = None
    begun: float = 0.0
    ends: float | None = None  # when it will have ended, by what it published last
    stop: threading.Event = field(default_factory=threading.Event)

    def publish(self, update: Any, size: int, remaining: float | None = None) -> None:
        self.update, self.size = update, size
        self.published(self, remaining)


class JobManager:
    """Runs one job at a time in the order of submission. Every method may be called from any thread."""

    def __init__(self, limits: Limits | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or Limits()
        self._clock = clock
        self._changed = threading.Condition(threading.RLock())
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._queue: deque[_Job] = deque()
        self._running: _Job | None = None
        self._closed = False
        self._worker: threading.Thread | None = None

    def submit(self, work: Work, owner: str | None = None) -> str:
        """Queue work → the job's id, which nobody can guess. Raises GradinvError for what is not accepted, and for an
        owner's second job as long as the first has not ended."""
        work.check()
        if work.cost > self.limits.cost:
            raise GradinvError(
                f"This run is {work.cost / self.limits.cost:.1f} times as large as this server accepts (pictures × "
                "pixels × iterations × seeds); choose fewer of them."
            )
        with self._changed:
            self._drop_abandoned()
            if self.unfinished(owner) is not None:
                raise GradinvError("Your last run has not ended yet; stop it or wait for it before you start another.")
            if len(self._queue) >= self.limits.waiting:
                raise GradinvError(f"{len(self._queue)} runs are waiting already; try again in a few minutes.")
            job = _Job(secrets.token_urlsafe(16), work, owner, self._clock() + self.limits.lease, self._published)
            self._jobs[job.id] = job
            self._queue.append(job)
            self._revive()
            self._changed.notify_all()
            return job.id

    def unfinished(self, owner: str | None) -> str | None:
        """The id of an owner's job that waits or runs, or None."""
        with self._changed:
            own = (job.id for job in self._jobs.values() if job.owner == owner and job.status not in FINISHED)
            return next(own, None) if owner is not None else None

    def state(self, job_id: str) -> JobState | None:
        """The job as it stands, or None where it is not known (any more). Renews its lease."""
        with self._changed:
            self._forget()
            job = self._jobs.get(job_id)
            if job is None:
                return None
            job.leased_until = self._clock() + self.limits.lease
            self._drop_abandoned()
            self._revive()
            place = self._queue.index(job) + 1 if job.status == "queued" else 0
            wait, stopping = self._wait(place), job.stop.is_set() and job.status not in FINISHED
            return JobState(job.id, job.status, place, wait, job.update, job.reason, job.work, stopping, job.owner)

    def cancel(self, job_id: str) -> None:
        """End a job: at once where it waits, within one iteration where it runs; nothing where it has ended."""
        with self._changed:
            job = self._jobs.get(job_id)
            if job is not None and job.status == "queued":
                self._leave_queue(job, None)
            elif job is not None:
                job.stop.set()

    def wait(self, job_id: str, until: Callable[[JobState], bool], timeout: float) -> bool:
        """Block until the job's state satisfies `until`; False where it does not in `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: (state := self.state(job_id)) is not None and until(state), timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Stop what runs, drop what waits, and end the worker. Jobs submitted later start a new one."""
        with self._changed:
            worker, self._closed = self._worker, True
            for job in list(self._queue):
                self._leave_queue(job, "The server is shutting down.")
            if self._running is not None:
                self._running.stop.set()
            self._changed.notify_all()
        if worker is not None:
            worker.join(timeout)
        with self._changed:
            self._worker, self._closed = None, False

    def _wait(self, place: int) -> float | None:
        """Seconds until the job at a place of the queue begins, as if all went as fast as the one that runs."""
        running, now = self._running, self._clock()
        if place == 0 or running is None or running.ends is None:
            return None
        each = (running.ends - running.begun) / max(1, running.work.cost)
        return max(0.0, running.ends - now) + each * sum(job.work.cost for job in list(self._queue)[: place - 1])

    def _revive(self) -> None:
        """Start the worker where there is none (any more); the job that it was lost with has failed."""
        if self._worker is not None and self._worker.is_alive():
            return
        if self._running is not None:
            self._running.status, self._running.reason = "failed", "The server lost this run; start it again."
            self._running = None
        if self._queue:
            self._worker = threading.Thread(target=self._serve, name="gradinv-worker", daemon=True)
            self._worker.start()

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            status: Status = "failed"
            reason: str | None = None
            try:
                status = job.work(job)
            except BaseException as error:  # whatever a job does, the next visitor's must run
                reason = sentence(error)
            with self._changed:
                job.status, job.reason = status, reason or job.reason
                self._running = None
                self._forget()
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            self._drop_abandoned()
            job = self._queue.popleft()
            job.status, job.begun = "running", self._clock()
            self._running = job
            self._changed.notify_all()
            return job

    def _published(self, job: _Job, remaining: float | None) -> None:
        with self._changed:
            job.ends = None if remaining is None else self._clock() + remaining
            self._drop_abandoned()
            self._changed.notify_all()

    def _drop_abandoned(self) -> None:
        """Where somebody waits, jobs that nobody watches any more make room; what they have published is kept."""
        with self._changed:
            now = self._clock()
            if all(job.leased_until < now for job in self._queue):
                return
            reason = "This run ended because its page had been closed while others waited."
            for job in [job for job in self._queue if job.leased_until < now]:
                self._leave_queue(job, reason)
            running = self._running
            if running is not None and running.leased_until < now and not running.stop.is_set():
                running.reason = reason
                running.stop.set()

    def _leave_queue(self, job: _Job, reason: str | None) -> None:
        self._queue.remove(job)
        job.status, job.reason = "stopped", reason
        self._forget()
        self._changed.notify_all()

    def _forget(self) -> None:
        """Drop finished jobs that nobody has looked at for long, then the oldest beyond the limits, those that nobody
        watches first; of the latter never the newest."""
        now = self._clock()
        for job in [job for job in self._jobs.values() if job.status in FINISHED]:
            if job.leased_until + self.limits.retained_seconds < now:
                del self._jobs[job.id]
        finished = [job for job in self._jobs.values() if job.status in FINISHED]
        finished.sort(key=lambda job: job.leased_until >= now)  # stable: within each kind the oldest comes first
        size = sum(job.size for job in finished)
        while len(finished) > 1 and (len(finished) > self.limits.retained or size > self.limits.retained_bytes):
            oldest = finished.pop(0)
            size -= oldest.size
            del self._jobs[oldest.id]


def sentence(error: BaseException, what: str = "The run") -> str:
    """What a visitor reads of an exception in `what`; the log has the rest."""
    if isinstance(error, GradinvError):
        return str(error)
    log.error("%s failed", what, exc_info=error)
    return (
        memory_exhausted(error) or f"{what} failed unexpectedly ({type(error).__name__}); the server's log says more."
    )


_manager: JobManager | None = None
_guard = threading.Lock()


def manager() -> JobManager:
    """The process's one manager: a module global, so that no visitor's "clear cache" can empty it."""
    global _manager
    with _guard:
        if _manager is None:
            _manager = JobManager(Limits.from_environment())
            atexit.register(_manager.close)
        return _manager


def reset() -> None:
    """Close the manager and forget its jobs; the next `manager()` is a new one. For tests."""
    global _manager
    with _guard:
        if _manager is not None:
            atexit.unregister(_manager.close)
            _manager.close()
            _manager = None
        pace.forget()
