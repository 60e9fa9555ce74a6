"""How long a run takes: a rough prior from the shape of the work, what was measured since, and a run's own steps."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque

import torch

from gradinv.config import FROM_PAINTING, AttackConfig
from gradinv.models import Model

_REPEATS = 3  # of the short measurement, of which the fastest counts
_MEASURED = 2  # images in it
MEASURABLE = 10  # steps from which a run tells how fast the next one will be
_KEPT = 5  # runs of a kind that are remembered
# A run shows nothing of its pace before so many seconds of steps, and at least two stretches of them.
_ENOUGH = 2.0
# The latest stretches, of which the median counts: those of so many seconds, and not fewer than three, of which one may
# have had to wait. Another load on the machine shows within about that time.
_LATEST, _FEWEST = 5.0, 3
_OLD = 60.0  # seconds after which the short measurement is taken again: how busy the machine is may have changed

# What an iteration takes for each image and seed, and the layers for each image, as multiples of what the network takes
# forwards and backwards for one: measured on the bundled networks with 1 to 16 images, right to a factor of about 2.
_BELOW_A_LAYER, _MATCHED, _MATCHED_WHOLE = 0.2, 0.7, 1.2
_SOLVED = 25.0
_SMALL = 64  # px of a picture up to which that holds
_SOLVED_MORE = 16  # images from which solving takes longer for each of them, since they are solved for together

_Kind = tuple[str, int, bool, bool, str]
_ratios: dict[_Kind, deque[float]] = {}
_probes: dict[tuple[str, int], tuple[float, float]] = {}  # by network and size: seconds, and when that was
_guard = threading.Lock()


class Pace:
    """How fast the steps of one run are. Its first step also prepares all others, so it is left out; then the median
    of the stretches of the latest seconds counts, which one that had to wait for other work does not move."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        self._stretches: deque[tuple[float, int]] = deque()

    def add(self, seconds: float, step: int, first: int = 0) -> None:
        """A step was done after so many seconds of the search, which began at the step `first`."""
        if step <= first:
            return
        if self._last is not None and step > self._last[1]:
            self._stretches.append((seconds - self._last[0], step - self._last[1]))
            while len(self._stretches) > _FEWEST and self._spent - self._stretches[0][0] >= _LATEST:
                self._stretches.popleft()
        self._last = seconds, step

    @property
    def speed(self) -> float | None:
        """Seconds an iteration; None as long as nothing worth telling is known."""
        if len(self._stretches) < 2 or self._spent < _ENOUGH:
            return None
        return statistics.median(seconds / steps for seconds, steps in self._stretches)

    @property
    def _spent(self) -> float:
        return sum(seconds for seconds, _ in self._stretches)


def probe(model: Model) -> float:
    """Seconds that the network takes forwards and backwards for one image: measured at the first call and then once a
    minute at most, in less than half a second with the bundled ones. Whoever else uses the network has to wait
    meanwhile."""
    key = model.name, model.preprocessing.size
    if key not in _probes or time.monotonic() - _probes[key][1] > _OLD:
        side = model.preprocessing.size
        images = torch.zeros(_MEASURED, 3, side, side, device=model.device)
        parameters = list(model.network.parameters())
        times = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            found = torch.autograd.grad(model.network(images).sum(), parameters)
            float(found[0].flatten()[0])  # a GPU has computed it by then
            times.append(time.perf_counter() - began)
        _probes[key] = min(times) / _MEASURED, time.monotonic()
    return _probes[key][0]


def estimate(model: Model, config: AttackConfig, batch_size: int) -> float:
    """About how many seconds a run takes, the solving included: the prior, corrected by the latest runs of its kind."""
    return _corrected(_kind(model, config)) * _prior(model, config, batch_size)


def solving(model: Model, batch_size: int) -> float:
    """About how many seconds it takes to solve the layers: the prior, corrected by the latest batches that were
    solved."""
    return _corrected(_solving_kind(model)) * _solving_prior(model, batch_size)


def solved(model: Model, batch_size: int, seconds: float) -> None:
    """Remember how long it took to solve the layers."""
    _remember(_solving_kind(model), seconds / _solving_prior(model, batch_size))


def _solving_kind(model: Model) -> _Kind:
    return model.name, model.preprocessing.size, True, False, ""


def _solving_prior(model: Model, batch_size: int) -> float:
    # Nearly all of it is for the largest layers, whose equations grow with the picture while the network's cost does
    # not, as long as its weights are most of it.
    larger = max(1.0, model.preprocessing.size / _SMALL)
    return probe(model) * larger * _SOLVED * batch_size * (1 + batch_size / _SOLVED_MORE)


def measured(model: Model, config: AttackConfig, batch_size: int, seconds: float) -> None:
    """Remember how long a whole run took, its solving included."""
    _remember(_kind(model, config), seconds / _prior(model, config, batch_size))


def _corrected(kind: _Kind) -> float:
    """How many times as long as the prior says work of a kind took of late."""
    with _guard:
        known = list(_ratios.get(kind, ()))
    # The prior counts as one of them: a single run on a busy machine does not decide.
    return math.exp(statistics.median([0.0, *map(math.log, known)]))


def _remember(kind: _Kind, ratio: float) -> None:
    with _guard:
        _ratios.setdefault(kind, deque(maxlen=_KEPT)).append(ratio)


def forget() -> None:
    """Nothing was measured yet. For tests."""
    with _guard:
        _ratios.clear()


def _kind(model: Model, config: AttackConfig) -> _Kind:
    """What the prior may misjudge alike."""
    return model.name, model.preprocessing.size, config.needs_layers, config.gradient > 0, config.optimiser


def _prior(model: Model, config: AttackConfig, batch_size: int) -> float:
    whole = config.layers == "all" or config.boundary == "loss"
    each = _BELOW_A_LAYER if config.needs_layers else _MATCHED_WHOLE if whole else _MATCHED
    search = probe(model) * each * batch_size * config.seeds * _iterations(model, config)
    return search + _solving_prior(model, batch_size) if config.needs_layers else search


def _iterations(model: Model, config: AttackConfig) -> int:
    """How many there will be. From a picture that a learned prior painted they are fewer than the preset's, unless the
    picture is of a node above the boundary, which is only known once the layers are solved."""
    if config.start != "decoder" or config.iterations != AttackConfig.preset("demo", model.name).iterations:
        return config.iterations
    return max(changes["iterations"] for changes in FROM_PAINTING.values())
