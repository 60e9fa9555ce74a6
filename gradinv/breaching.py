"""Other people's attacks on the same network and the same gradient, for comparison. Nothing else needs them.

The one that is adapted is `breaching` 0.1.2 (Geiping et al.), an optional extra. Its attacks run with their own
settings; only the number of iterations is set, and there is one trial.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import statistics
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gradinv.models import Model
from gradinv.types import GradinvError, Observation

BREACHING = ("invertinggradients", "seethroughgradients")
"""The attacks of `breaching` that are compared with: Geiping et al. 2020, and its rebuilding of GradInversion."""


class Stopped(Exception):
    """The attack was asked to stop before its last iteration; nothing of it is kept."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Pixels (B, 3, S, S) in [0, 1] in the order of the labels given, and what an iteration took (median of the second
    half of the run, so without what is only done once)."""

    pixels: Tensor
    seconds: float
    seconds_per_iteration: float | None


def require_breaching() -> Any:
    """The package. Raises GradinvError, saying how to install it, where it is not there or does not load."""
    try:
        with _quiet():
            return importlib.import_module("breaching")
    except ImportError as error:
        raise GradinvError(
            f"The comparison needs the package breaching ({error}); install it with: pip install 'gradinv[compare]'."
        ) from error


def breaching_attack(
    name: str,
    model: Model,
    observation: Observation,
    labels: Tensor,
    iterations: int,
    *,
    seed: int = 0,
    stop: threading.Event | None = None,
) -> Reconstruction:
    """Run `breaching`'s attack `name` for so many iterations on an observation, with the labels (B,) given to it.

    It sees what ours sees: the weights with their running statistics (which its BN term matches), the gradients in the
    parameters' order and the preprocessing. Of its candidates it returns the one with the smallest objective. The
    random start is torch's global generator's, set to `seed` for the run and put back. Raises GradinvError where the
    package is missing, and Stopped where `stop` is set.
    """
    breaching = require_breaching()
    device = model.device
    preprocessing = model.preprocessing
    shape = (3, preprocessing.size, preprocessing.size)
    payload = {
        "parameters": [parameter.detach() for parameter in model.network.parameters()],
        "buffers": list(model.network.buffers()),
        "metadata": SimpleNamespace(shape=shape, mean=preprocessing.mean, std=preprocessing.std, modality="vision"),
    }
    batch = {"num_data_points": observation.batch_size, "labels": labels.to(device), "local_hyperparams": None}
    gradients = [observation.gradients[item].to(device) for item, _ in model.network.named_parameters()]
    shared = {"gradients": gradients, "buffers": None, "metadata": batch}
    # A report every `callback` iterations would wait for the device.
    changes = [f"optim.max_iterations={iterations}", f"optim.callback={iterations + 1}", "restarts.num_trials=1"]
    with _quiet(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        attacker = breaching.attacks.prepare_attack(
            model.network,
            nn.CrossEntropyLoss(),
            breaching.get_attack_config(name, changes),
            {"device": device, "dtype": torch.float},
        )
        started = time.perf_counter()
        with _watched(attacker.objective, stop or threading.Event()) as stamps:
            found, _ = attacker.reconstruct([payload], [shared], {})
    steps = [after - before for before, after in pairwise(stamps)]
    return Reconstruction(
        pixels=preprocessing.denormalise(found["data"].detach().float()).cpu(),
        seconds=time.perf_counter() - started,
        seconds_per_iteration=statistics.median(steps[len(steps) // 2 :]) if steps else None,
    )


@contextlib.contextmanager
def _watched(objective: nn.Module, stop: threading.Event) -> Iterator[list[float]]:
    """While open, the times at which the objective was asked, once an iteration; Stopped is raised there for `stop`."""
    stamps: list[float] = []

    def hook(*_: object) -> None:
        if stop.is_set():
            raise Stopped
        stamps.append(time.perf_counter())

    handle = objective.register_forward_pre_hook(hook)
    try:
        yield stamps
    finally:
        handle.remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Its warnings are about versions of other packages, and it prints what it loads.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
