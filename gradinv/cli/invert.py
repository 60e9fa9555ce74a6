"""`gradinv invert`: from pictures to their gradient, and back."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gradinv import metrics
from gradinv.attack.inversion import Snapshots, invert
from gradinv.attack.memory import check_memory
from gradinv.attack.objective import bn_targets
from gradinv.checks import check_observation
from gradinv.cli.arguments import RECORDS, parser
from gradinv.cli.progress import signals_set
from gradinv.cli.replay import report
from gradinv.cli.say import answer, complain, diagnosis, percent, say, solved_to
from gradinv.cli.settings import PREFIX, config_from, settings_given
from gradinv.cli.task import Task, begin, check_writable, describe, describe_labels, facts
from gradinv.execution.distributed import Ranks, joined
from gradinv.models import MODELS, load_model
from gradinv.prior import FEATURES
from gradinv.recording.recorder import Recorder, thinned
from gradinv.recording.replay import Recording, Resumption
from gradinv.recording.stores import DirectoryStore
from gradinv.recovery.recover import recover
from gradinv.types import GradinvError, Recovered, Snapshot, SolvedNode

REFRESH = 0.5  # seconds between two updates of the progress bar


@dataclass(frozen=True, eq=False, kw_only=True)
class _Run(Task):
    """An inversion: how often it is recorded and where, and what it goes on from."""

    every: int
    out: Path | None
    resumed: Resumption | None = None


def run(args: argparse.Namespace) -> int:
    with joined() as ranks:
        if ranks.rank > 0:
            return _follow(args, ranks)
        task = _begun(args) if args.resume is None else _resumed(args)
        check_observation(task.model, task.observation)
        bn_targets(task.model, task.observation, task.config)  # what is damaged or lacks statistics is not described
        _describe(task)
        if args.save_observation is None:
            return _invert(args, task, ranks)
        ranks.tell(None)
        return _save(args, task)


def _follow(args: argparse.Namespace, ranks: Ranks) -> int:
    """The part of every rank but the first: its share of the seeds, without a word or a file of its own."""
    stop = threading.Event()
    with signals_set(stop):
        try:
            told: tuple[Any, ...] | None = ranks.tell(None)
            if told is None:
                return 0
            with ranks.together():
                weights, device, observation, config, options = told
                theirs = observation.preprocessing
                model = load_model(weights, device=device, image_size=theirs.size, mean=theirs.mean, std=theirs.std)
                stream = invert(model, observation, config, stop=stop, ranks=ranks, **options)
            for _ in stream:
                pass
        except GradinvError:
            # The first rank says it. An exit code would have torchrun end that one before it has.
            if args.debug:
                raise
    return 0


def _invert(args: argparse.Namespace, task: _Run, ranks: Ranks) -> int:
    model, config, observation, resumed = task.model, task.config, task.observation, task.resumed
    options: dict[str, Any] = {"every": task.every, "resume": None if resumed is None else resumed.state}
    # The first rank alone reads files; the model each one loads itself.
    weights = model.name if args.model == "auto" else args.model
    ranks.tell((weights, model.device.type, observation, config, {**options, "labels": task.given}))
    # Of several ranks each snapshot has to be gathered: only those that are recorded are worth that.
    interval = REFRESH if ranks.count == 1 else None
    stop = threading.Event()
    with ranks.together():
        began = time.perf_counter()
        recovered = _recover(task, ranks)
        solved = time.perf_counter() - began
        stream = invert(
            model, observation, config, interval=interval, stop=stop, ranks=ranks, recovered=recovered, **options
        )
    first = next(stream)  # what cannot be run is said here, before anything is written
    if ranks.count > 1:
        say(f"{ranks.count} ranks share the {config.seeds} seeds.")
    _describe_start(task, first, recovered, solved)
    return _record(args, task, ranks, stream, first, stop)


def _record(
    args: argparse.Namespace, task: _Run, ranks: Ranks, stream: Snapshots, first: Snapshot, stop: threading.Event
) -> int:
    """Go through the run, record and show it, and say how it ended. → the exit code."""
    out = task.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{task.model.name}"
    error: BaseException | None = None
    with signals_set(stop) as received:
        recorder = Recorder(
            DirectoryStore(out),
            config=task.config,
            model=task.model,
            observation=task.observation,
            originals=task.pixels,
            labels=task.labels,
            every=task.every,
            defences=task.defences,
            weights=None if args.model in ("auto", *MODELS) else str(Path(args.model).expanduser().resolve()),
            ranks=ranks.count,
            state=stream.state,
            resumed=task.resumed,
            recovered=stream.recovered,
        )
        try:
            for _ in recorder.follow(thinned(_with_progress(task, first, stream, recorder), task.every)):
                pass
        except (Exception, KeyboardInterrupt) as raised:
            if args.debug:
                raise
            error = raised
        # Still within: torchrun sends SIGTERM where another rank was lost, which is to be said first.
        # Without a signal of its own, this rank was stopped by another's.
        return _ended(args, recorder.run, out, error, received[0] if received else signal.SIGTERM)


def _recover(task: _Run, ranks: Ranks) -> Recovered:
    """What is solved before the search. Where that takes long, a terminal shows which layer it has come to."""
    # What would be wrong after the layers is said before.
    share = replace(task.config, seeds=len(ranks.share(task.config.seeds)))
    check_memory(task.model, task.observation.batch_size, share)
    with tqdm(desc="Solving layers", unit="layer", leave=False, dynamic_ncols=True, disable=None) as bar:

        def progress(node: SolvedNode) -> None:
            bar.set_postfix_str(node.name, refresh=False)
            bar.update()

        return recover(task.model, task.observation, task.config, labels=task.given, progress=progress)


def _ended(
    args: argparse.Namespace, run: dict[str, Any], out: Path, error: BaseException | None, signalled: int
) -> int:
    """Say how the run ended. → the exit code."""
    done = f"{run['iterations']['done']} of {run['iterations']['total']} iterations"
    if not answer(args, run) and not isinstance(error, KeyboardInterrupt):
        # A full disk may be why the run failed; then even less can be read back than was shown so far.
        with contextlib.suppress(GradinvError):
            report(Recording.open(out))
    if isinstance(error, KeyboardInterrupt):
        return complain(f"Quit at once; what had been recorded of {done} is kept in {out}.", 130)
    if error is not None:
        sentence, _ = diagnosis(error)
        return complain(f"{sentence.rstrip('.')}. What had been recorded after {done} is kept in {out}.", 1)
    if run["status"] == "stopped":
        return complain(f"Stopped after {done}; go on with: gradinv invert --resume {out}", 128 + signalled)
    say(f"The run is kept in {out}. Its pictures are in {out / 'images'}.")
    return 0


def _begun(args: argparse.Namespace) -> _Run:
    """A run as the arguments have it. Raises GradinvError, if something is in its folder already."""
    out = None if args.out is None else Path(args.out).expanduser()
    check_writable(out or Path("runs"))
    if out is not None and out.is_dir() and any(out.iterdir()):
        raise GradinvError(f"The folder {out} is not empty; name another with --out, or remove it first.")
    if args.every is not None and args.every < 1:
        raise GradinvError(f"--every takes a number of steps of at least 1, not {args.every}.")
    if args.save_observation is not None and Path(args.save_observation).expanduser().exists():
        raise GradinvError(f"{args.save_observation} is there already; name another file, or remove it first.")
    settings = settings_given(args)
    task = begin(args, lambda model: config_from(args.preset, model, settings))
    return _Run(**vars(task), every=args.every or -(-task.config.iterations // RECORDS), out=out)


def _resumed(args: argparse.Namespace) -> _Run:
    """The run in the folder --resume, from where it last stood. Raises GradinvError where it cannot go on."""
    if given := _beside_resume(args):
        raise GradinvError(f"A resumed run keeps its own pictures and settings; leave {given} out.")
    resumed = Resumption.open(args.resume)
    recorded, environment, labels = (resumed.run[name] for name in ("model", "environment", "labels"))
    device = environment["device"].partition(":")[0]  # any device of the kind
    if device == "cuda" and not torch.cuda.is_available():
        raise GradinvError(
            f"The run in {args.resume} is one of a CUDA device, whose random numbers a CPU does not repeat; resume it "
            "on a machine with one, or start it again."
        )
    theirs = resumed.observation.preprocessing
    model = load_model(recorded["weights"], device=device, image_size=theirs.size, mean=theirs.mean, std=theirs.std)
    if model.sha256 != recorded["sha256"]:
        raise GradinvError(
            f"The weights {recorded['weights']} have changed since the run in {args.resume} (sha256 "
            f"{model.sha256:.8}… instead of {recorded['sha256']:.8}…); put the old ones back or start it again."
        )
    args.model = recorded["weights"]
    say(f"Resumed after {resumed.state.step} of {resumed.config.iterations} iterations.")
    now = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name, value in now.items():
        if environment.get(name) != value:
            say(f"It ran with {name} {environment.get(name)} and goes on with {value}: the last digits may differ.")
    return _Run(
        model=model,
        config=resumed.config,
        observation=resumed.observation,
        pixels=resumed.originals,
        labels=labels["true"],
        given=torch.tensor(labels["restored"]) if labels["method"] == "given" else None,
        defences=resumed.run["client"]["defences"],
        every=resumed.run["every"],
        out=Path(args.resume).expanduser(),
        resumed=resumed,
    )


def _beside_resume(args: argparse.Namespace) -> str:
    """An option that was given although a resumed run has its own; empty where there is none."""
    usual = {**vars(parser().parse_args([args.command])), **{name: vars(args)[name] for name in ("output", "resume")}}
    given = [name for name, value in vars(args).items() if name not in ("json", "debug") and value != usual.get(name)]
    if args.images:
        return f"the picture {args.images[0]}"
    flags = [{"classes": "class", "defences": "defence"}.get(name, name.removeprefix(PREFIX)) for name in given]
    return f"--{flags[0].replace('_', '-')}" if flags else ""


def _save(args: argparse.Namespace, task: _Run) -> int:
    """Write the observation and end."""
    task.observation.save(args.save_observation)
    own = "" if task.model.name in MODELS else f" --model {args.model}"
    say(
        f"What the server receives is in {args.save_observation}; invert it with: gradinv invert --observation "
        f"{args.save_observation}{own}."
    )
    answer(args, {**facts(task), "observation": args.save_observation})
    return 0


def _describe(task: _Run) -> None:
    describe(task)
    config = task.config
    say(
        {
            "approx": "Batch-normalisation statistics: those stored in the weights (--bn approx).",
            "exact": "The client also shares the exact batch-normalisation statistics of its batch (--bn exact).",
            "inferred": "Batch-normalisation statistics: the batch's own, inferred from the running ones before and "
            "after the client's step (--bn inferred).",
            "none": "Batch-normalisation statistics are not matched (--bn none).",
        }[config.bn]
    )
    if config.gradient == 0 and not config.needs_layers:
        say("A control: the gradient is not matched (--gradient 0), only the labels are read from it.")


def _describe_start(task: _Run, first: Snapshot, recovered: Recovered, seconds: float) -> None:
    """What was read of the gradient, how deep the layers were solved, in so many seconds, what is left to search for,
    and from where. A run that goes on has said the latter before."""
    describe_labels(task, first.labels, first.label_method, first.label_confidence, recovered.notes)
    if first.features_residual is not None:
        left = percent(first.features_residual)
        say(f"Recovered features leave {left} of the final layer's gradient unexplained.")
    if task.resumed is not None:
        return
    if any(node.name == first.boundary for node in recovered.nodes):
        depth = solved_to(recovered.nodes)
        say(f"Layers solved from the gradient {depth}, {seconds:.0f} s; the pixels are searched for below it.")
    elif recovered.stopped:
        say(f"{recovered.stopped} So the pixels are searched for until their gradient matches.")
    if first.prior is not None:
        source = "the recovered features" if first.prior.node == FEATURES else f"the activations of {first.prior.node}"
        say(
            f"A learned prior (--start decoder): a network that learned from public pictures painted a picture from "
            f"{source}, which the search starts from."
        )


def _with_progress(task: _Run, first: Snapshot, stream: Iterator[Snapshot], recorder: Recorder) -> Iterator[Snapshot]:
    """Pass the snapshots on and show how far the run is; on the standard error, and only where that is a terminal."""
    baseline = None
    if task.pixels is not None:
        baseline = float(metrics.psnr(metrics.constant_colour(task.pixels), task.pixels).mean())
    yield first
    with tqdm(total=first.steps, initial=first.step, unit="it", dynamic_ncols=True, disable=None) as bar:
        for snapshot in stream:
            name, values = "distance", snapshot.distance
            if not values and snapshot.terms:  # no gradient is matched
                name = next(iter(snapshot.terms))
                values = snapshot.terms[name].raw
            shown = [f"{name} {sum(values) / max(1, len(values)):.3f}"]
            if baseline is not None:
                # The PSNR of the last record: it is measured there anyway.
                shown += [f"PSNR {recorder.curves[-1]['consensus_psnr']:.1f} dB (constant {baseline:.1f})"]
            bar.set_postfix_str(", ".join(shown), refresh=False)
            bar.update(snapshot.step - bar.n)
            yield snapshot
