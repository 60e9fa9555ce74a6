"""How evaluations of an objective are executed: by autograd, recorded or as a CUDA graph, and how many at a time."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gradinv.execution.tape import Program, Tape
from gradinv.types import GradinvError

log = logging.getLogger(__name__)

MODES = ("auto", "eager", "traced", "graph")

# Recording and checking cost about three evaluations; each one after that takes 0.5 to 0.95 of the time.
_WORTH_RECORDING = 20
# By how much the check lets the pixel gradient deviate from autograd's, relative to its norm. A recording of the same
# operations should not at all; a GPU's kernels may sum in another order.
_TOLERANCE = {"traced": 1e-5, "graph": 1e-3}
# What the images are multiplied by before each comparison; one that agrees is enough. Rounding moves a value over a
# ReLU's corner at times, and then the gradient differs by more.
_COMPARED = (0.75, 0.5, 0.25)


@dataclass(frozen=True, eq=False)
class LossTerms:
    """Scalars, still on the device: the weighted sum `total` (differentiable), each term's `raw` value, and the
    cosine `distance` of the gradients (NaN where no gradient is matched). Where no term mixes the images, `parts` (B,)
    are their shares of the total."""

    total: Tensor
    raw: Mapping[str, Tensor]
    distance: Tensor
    parts: Tensor | None = None


Function = Callable[[Tensor, Tensor], LossTerms]
"""What is evaluated: a function of normalised images (B, 3, S, S) and of the consensus that they are drawn to."""


@dataclass(frozen=True, eq=False)
class PixelGradient:
    """One evaluation: the `gradient` of the weighted sum with respect to the images (B, 3, S, S), that sum as `parts`,
    of each image (B,) or all in one (1,), and as scalars each term's `raw` value and the gradients' cosine `distance`;
    all detached."""

    gradient: Tensor
    parts: Tensor
    raw: Mapping[str, Tensor]
    distance: Tensor


class Stepper:
    """Evaluates a function of images together with the gradient of its total.

    `mode` says how: `eager` is autograd, the reference; `traced` runs a recording of the first evaluation, with
    autograd's result to the last bit; `graph` replays it as a CUDA graph (not yet measured on a GPU). Before that the
    recording is compared with autograd on other images. If recording, capture or comparison fails, one sentence is
    logged and `mode` becomes `eager`. Any thread may call it, one at a time; nothing is left behind in the thread or in
    the function.
    """

    def __init__(self, function: Function, mode: str = "auto", *, steps: int | None = None, parallel: int = 1) -> None:
        """At the first evaluation `auto` becomes the mode that pays for `steps` of them (None: for many). `each` runs
        `parallel` seeds at a time if the mode `side_by_side`.

        Raises GradinvError for an unknown mode.
        """
        if mode not in MODES:
            raise GradinvError(f"stepping takes one of {', '.join(MODES)}, not {mode!r}.")
        self.mode = mode
        self._function = function
        self._steps = steps
        self._parallel = parallel
        self._program: Program | None = None
        self._names: list[str] = []
        self._workers: ThreadPoolExecutor | None = None

    def __call__(self, images: Tensor, group: Tensor) -> PixelGradient:
        """Judge normalised images (B, 3, S, S) against the observation and the group's consensus, of the same shape.

        The shape stays the same from call to call. Raises GradinvError for `graph` where there is no CUDA device.
        """
        images, group = images.detach(), group.detach()
        program = self._ready(images, group)
        if program is None:
            return evaluate(self._function, images, group)
        # Also the first time, so that a run that is resumed has the very numbers of one that was not interrupted.
        return self._run(program, images, group)

    @property
    def parallel(self) -> int:
        """How many seeds `each` runs at a time, as the mode is now."""
        return self._parallel if side_by_side(self.mode) else 1

    def each(self, seeds: Tensor, group: Tensor, stop: threading.Event) -> list[PixelGradient]:
        """The same for every seed's images (g, B, 3, S, S); where `stop` is set on the way, only for the first few,
        within one evaluation."""
        seeds, group = seeds.detach(), group.detach()
        if min(self._parallel, len(seeds)) > 1 and not stop.is_set():
            program = self._ready(seeds[0], group)
            if program is not None and side_by_side(self.mode):
                return self._side_by_side(program, seeds, group, stop)
        found: list[PixelGradient] = []
        for images in seeds:
            if stop.is_set():
                break
            found.append(self(images, group))
        return found

    def _side_by_side(
        self, program: Program, seeds: Tensor, group: Tensor, stop: threading.Event
    ) -> list[PixelGradient]:
        if self._workers is None:
            self._workers = _workers(min(self._parallel, len(seeds)))
        found: list[PixelGradient] = []
        futures = [self._workers.submit(self._run, program, images, group) for images in seeds]
        try:
            for future in futures:
                if stop.is_set():
                    break
                found.append(future.result())
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
        return found

    def _ready(self, images: Tensor, group: Tensor) -> Program | None:
        """What to run; None where autograd is to."""
        self.mode = resolve_mode(self.mode, images.device, self._steps)
        if self.mode != "eager" and self._program is None:
            self._prepare(images, group)
        return self._program

    def _prepare(self, images: Tensor, group: Tensor) -> None:
        """Records the evaluation; what the recording gives is compared where it counts, on other images, since it may
        hold a value that depends on these."""
        tape = Tape()
        try:
            found = evaluate(self._function, images, group, tape)
            program = tape.program([found.gradient, found.parts, *found.raw.values(), found.distance])
        except Exception as error:  # Whatever it is: where autograd fails as well, that is what the caller gets to see.
            self._give_up(f"the evaluation cannot be recorded ({_one_line(error)})")
            return
        self._names = list(found.raw)
        deviation = math.nan
        try:
            if self.mode == "graph":
                program = _Captured(program, images, group)
            for scale in _COMPARED:
                others = scale * images.flip(-1), scale * group.flip(-1)
                deviation = _deviation(self._run(program, *others), evaluate(self._function, *others))
                if deviation <= _TOLERANCE[self.mode]:
                    self._program = program
                    return
        except Exception as error:
            self._give_up(f"the recorded evaluation cannot be run ({_one_line(error)})")
            return
        self._give_up(f"the recorded evaluation deviates from autograd's by a share of {deviation:.1e}")

    def _run(self, program: Program, images: Tensor, group: Tensor) -> PixelGradient:
        with torch.no_grad():
            gradient, parts, *raw, distance = program(images, group)
        return PixelGradient(gradient, parts, dict(zip(self._names, raw, strict=True)), distance)

    def _give_up(self, reason: str) -> None:
        log.warning("Every step runs eagerly, which is slower: %s.", reason)
        self.mode = "eager"


def resolve_mode(mode: str, device: torch.device, steps: int | None = None) -> str:
    """The mode itself; for `auto` a CUDA graph on a GPU, a recording on a CPU, and autograd for a few steps or
    elsewhere.

    Raises GradinvError for `graph` without a CUDA device.
    """
    if mode == "graph" and device.type != "cuda":
        raise GradinvError("stepping=graph needs a CUDA device; take auto, traced or eager.")
    if mode != "auto":
        return mode
    if steps is not None and steps < _WORTH_RECORDING:
        return "eager"
    return {"cuda": "graph", "cpu": "traced"}.get(device.type, "eager")


def side_by_side(mode: str) -> bool:
    """Whether evaluations may run at the same time: what a recording runs holds nothing that an evaluation changes."""
    return mode == "traced"


_setting_threads = threading.Lock()


def _workers(count: int) -> ThreadPoolExecutor:
    """Threads that run torch with an even share each of the caller's threads. They end with the executor."""
    begun = threading.Barrier(count + 1)
    with _setting_threads:
        threads = torch.get_num_threads()

        def begin() -> None:
            torch.set_num_threads(max(1, threads // count))
            torch.get_num_threads()  # A thread keeps what it finds at its first look, whatever others set later.
            begun.wait()

        workers = ThreadPoolExecutor(count, "seeds")
        try:
            for _ in range(count):  # Each waits for the others, so that each begins in a thread of its own.
                workers.submit(begin)
            begun.wait()
        finally:
            begun.abort()  # Where one cannot be started, the others would wait for ever.
            torch.set_num_threads(threads)
    return workers


def evaluate(function: Function, images: Tensor, group: Tensor, tape: Tape | None = None) -> PixelGradient:
    """The reference: the function and autograd's gradient of its total, recorded on the tape where there is one."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        with tape.recording(images, group) if tape is not None else nullcontext():
            found = function(images, group)
            (gradient,) = torch.autograd.grad(found.total, images)
            parts = found.total.detach().view(1) if found.parts is None else found.parts.detach()
    return PixelGradient(gradient, parts, found.raw, found.distance)


def _deviation(found: PixelGradient, expected: PixelGradient) -> float:
    """The largest relative deviation of the gradient (by its norm), its parts, the terms and the distance."""
    pairs = [(found.gradient, expected.gradient), (found.parts, expected.parts)]
    pairs += [(found.raw[name], raw) for name, raw in expected.raw.items()]
    if not expected.distance.isnan():
        pairs.append((found.distance, expected.distance))
    return max(float((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny)) for a, b in pairs)


def _one_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


_capturing = threading.Lock()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)


class _Captured:
    """A program as a CUDA graph: thousands of small kernels started at once, on buffers that stay where they are."""

    def __init__(self, program: Program, images: Tensor, group: Tensor) -> None:
        # The graph knows addresses alone: the constants at them live as long as the program.
        self._program = program
        with _capturing, torch.cuda.device(images.device), torch.no_grad():
            self._buffers = images.clone(), group.clone()
            stream = _side_stream(images.device)
            stream.wait_stream(torch.cuda.current_stream())
            # Also around the capture, which does not go back to the old stream where it fails.
            with torch.cuda.stream(stream):
                for _ in range(3):  # Libraries choose their kernels and take the stream's workspaces before.
                    program(*self._buffers)
                self._graph = torch.cuda.CUDAGraph()
                # What other threads do on the device meanwhile is theirs.
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    self._results = program(*self._buffers)
            torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, images: Tensor, group: Tensor) -> Sequence[Tensor]:
        for buffer, given in zip(self._buffers, (images, group), strict=True):
            buffer.copy_(given)
        self._graph.replay()
        return [result.clone() for result in self._results]
