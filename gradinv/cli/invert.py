"""`gradinv invert`: from pictures to their gradient, and back."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from gradinv.cli.replay import report
from gradinv.cli.say import complain, diagnosis, percent, solved_to, speaker
from gradinv.cli.task import Task, add_client, add_network, begin, describe, describe_labels, facts, write_barred

# torch takes seconds to import: what needs it is imported by the functions, so that help and mistakes answer at once.
if TYPE_CHECKING:
    from gradinv.attack.inversion import Snapshots
    from gradinv.attack.state import RunState
    from gradinv.config import AttackConfig
    from gradinv.execution.distributed import Ranks
    from gradinv.recording.recorder import Recorder
    from gradinv.recording.replay import Resumption
    from gradinv.types import Observation, Recovered, Snapshot, SolvedNode


RECORDS = 100  # at most so many steps of a run are recorded, unless --every says otherwise

REFRESH = 0.5  # seconds between two updates of the progress bar

HELP = "reconstruct pictures from the gradient of their batch"
EXAMPLES = """\
examples:
  gradinv invert goldfish tabby lion coffee            pictures of the bundled gallery, by name
  gradinv invert holiday.jpg --class "sports car"      a picture of your own and its class
  gradinv invert --samples 4 --seed 7                  four of the gallery, drawn at random
  gradinv invert --imagenet val --random 8             eight of a folder in ImageNet layout (<wnid>/*.JPEG)
  gradinv invert lion --preset paper --iterations 500  the constants of the paper, but fewer steps
  gradinv invert lion --gradient 0 --json              the control without the gradient, for a script
  gradinv invert lion --config runs/old/run.json       the settings of an earlier run
  gradinv invert lion --defence clip:1 --defence quantise:4
                                                       what the client does to its gradient before it shares it
  gradinv invert --observation mine.safetensors        a gradient of your own training loop, nothing else known
  gradinv invert --resume runs/old                     go on with a run that was stopped or killed
  torchrun --nproc-per-node=4 -m gradinv invert lion   the seeds shared out over four processes, each with a GPU if any

exit codes: 0; 2 bad use; 1 the run failed; 130 stopped by Ctrl-C, with what was recorded kept
"""


def add_arguments(parser: argparse.ArgumentParser, chosen: bool) -> None:
    """The options of the command, with all settings of the attack where it is the one that was `chosen`."""
    add_client(parser).add_argument(
        "--save-observation", metavar="FILE", help="write what the server receives to FILE and end there"
    )
    options = parser.add_argument_group("the run")
    add_network(options)
    options.add_argument("--preset", default="demo", help="paper, matching or demo (default: %(default)s)")
    options.add_argument("--config", metavar="FILE", help="settings as JSON over those of the preset, or a run.json")
    options.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/<time>-<model>)")
    options.add_argument(
        "--every", type=int, metavar="N", help=f"record every N steps (default: at most {RECORDS} records)"
    )
    options.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, with its own settings")
    if chosen:
        from gradinv.cli.settings import add_settings

        add_settings(parser)


@dataclass(frozen=True, eq=False)
class _Run(Task):
    """An inversion: how often it is recorded and where, and what it goes on from."""

    every: int
    out: Path | None
    resumed: Resumption | None = None


@dataclass(frozen=True, eq=False)
class _Broadcast:
    """What the other ranks hear of a run from the first, which alone reads files; the model each one loads itself."""

    weights: str
    device: str
    config: AttackConfig
    observation: Observation
    every: int
    state: RunState | None
    given: list[int] | None


def run(args: argparse.Namespace) -> int:
    from gradinv.execution.distributed import joined

    with joined() as ranks:
        if ranks.rank > 0:
            return _follow(args, ranks)
        say = speaker(args)
        task = _begun(args, say) if args.resume is None else _resumed(args, say)
        _check(task)
        _describe(say, task)
        if args.save_observation is None:
            return _invert(args, task, say, ranks)
        ranks.tell(None)
        return _save(args, task, say)


def _follow(args: argparse.Namespace, ranks: Ranks) -> int:
    """The part of every rank but the first: its share of the seeds, without a word or a file of its own."""
    import torch

    from gradinv.attack.inversion import invert
    from gradinv.models import load_model
    from gradinv.types import GradinvError

    stop = threading.Event()
    with signals_set(stop):
        try:
            told: _Broadcast | None = ranks.tell(None)
            if told is None:
                return 0
            with ranks.together():
                theirs = told.observation.preprocessing
                model = load_model(
                    told.weights, device=told.device, image_size=theirs.size, mean=theirs.mean, std=theirs.std
                )
                stream = invert(
                    model,
                    told.observation,
                    told.config,
                    every=told.every,
                    stop=stop,
                    resume=told.state,
                    ranks=ranks,
                    labels=None if told.given is None else torch.tensor(told.given),
                )
            for _ in stream:
                pass
        except GradinvError:
            # The first rank says it. An exit code would have torchrun end that one before it has.
            if args.debug:
                raise
    return 0


def _invert(args: argparse.Namespace, task: _Run, say: Callable[[str], None], ranks: Ranks) -> int:
    from gradinv.attack.inversion import invert

    model, config, resumed = task.model, task.config, task.resumed
    state = None if resumed is None else resumed.state
    weights = model.name if args.model == "auto" else args.model
    ranks.tell(_Broadcast(weights, model.device.type, config, task.observation, task.every, state, task.given))
    stop = threading.Event()
    with ranks.together():
        began = time.perf_counter()
        recovered = _recover(task, ranks)
        solved = time.perf_counter() - began
        stream = invert(
            model,
            task.observation,
            config,
            every=task.every,
            # Of several ranks each snapshot has to be gathered: only those that are recorded are worth that.
            interval=REFRESH if ranks.count == 1 else None,
            stop=stop,
            resume=state,
            ranks=ranks,
            recovered=recovered,
        )
    first = next(stream)  # what cannot be run is said here, before anything is written
    if ranks.count > 1:
        say(f"{ranks.count} ranks share the {config.seeds} seeds.")
    _describe_labels(say, task, first, recovered.notes)
    if resumed is None:
        _describe_layers(say, recovered, first, solved)
        _describe_prior(say, first)
    return _record(args, task, say, ranks, stream, first, stop)


def _record(
    args: argparse.Namespace,
    task: _Run,
    say: Callable[[str], None],
    ranks: Ranks,
    stream: Snapshots,
    first: Snapshot,
    stop: threading.Event,
) -> int:
    """Go through the run, record and show it, and say how it ended. → the exit code."""
    from gradinv import metrics
    from gradinv.models import MODELS
    from gradinv.recording.recorder import Recorder, thinned
    from gradinv.recording.stores import DirectoryStore

    out = task.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{task.model.name}"
    baseline = (
        None if task.pixels is None else float(metrics.psnr(metrics.constant_colour(task.pixels), task.pixels).mean())
    )

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
        shown = _with_progress(first, stream, recorder, baseline)
        try:
            for _ in recorder.follow(thinned(shown, task.every)):
                pass
        except (Exception, KeyboardInterrupt) as raised:
            if args.debug:
                raise
            error = raised
        # Still within: torchrun sends SIGTERM where another rank was lost, which is to be said first.
        # Without a signal of its own, this rank was stopped by another's.
        return _ended(args, say, recorder.run, out, error, received[0] if received else signal.SIGTERM)


def _recover(task: _Run, ranks: Ranks) -> Recovered:
    """What is solved before the search. Where that takes long, a terminal shows which layer it has come to."""
    import torch
    from tqdm import tqdm

    from gradinv.attack.memory import check_memory
    from gradinv.recovery.recover import recover

    # What would be wrong after the layers is said before.
    share = replace(task.config, seeds=len(ranks.share(task.config.seeds)))
    check_memory(task.model, task.observation.batch_size, share)
    with tqdm(desc="Solving layers", unit="layer", leave=False, dynamic_ncols=True, disable=None) as bar:

        def progress(node: SolvedNode) -> None:
            bar.set_postfix_str(node.name, refresh=False)
            bar.update()

        given = None if task.given is None else torch.tensor(task.given)
        return recover(task.model, task.observation, task.config, labels=given, progress=progress)


def _ended(
    args: argparse.Namespace,
    say: Callable[[str], None],
    run: dict[str, Any],
    out: Path,
    error: BaseException | None,
    signalled: int,
) -> int:
    """Say how the run ended. → the exit code."""
    from gradinv.recording.replay import Recording
    from gradinv.types import GradinvError

    done = f"{run['iterations']['done']} of {run['iterations']['total']} iterations"
    if args.json:
        print(json.dumps(run, indent=2))
    elif not isinstance(error, KeyboardInterrupt):
        # A full disk may be why the run failed; then even less can be read back than was shown so far.
        with contextlib.suppress(GradinvError):
            report(say, Recording.open(out))
    if isinstance(error, KeyboardInterrupt):
        return complain(f"Quit at once; what had been recorded of {done} is kept in {out}.", 130)
    if error is not None:
        sentence, _ = diagnosis(error)
        return complain(f"{sentence.rstrip('.')}. What had been recorded after {done} is kept in {out}.", 1)
    if run["status"] == "stopped":
        return complain(f"Stopped after {done}; go on with: gradinv invert --resume {out}", 128 + signalled)
    say(f"The run is kept in {out}. Its pictures are in {out / 'images'}.")
    return 0


def _begun(args: argparse.Namespace, say: Callable[[str], None]) -> _Run:
    """A run as the arguments have it."""
    from gradinv.cli.settings import config_from, settings_given
    from gradinv.types import GradinvError

    out = _choose_folder(args.out)
    if args.every is not None and args.every < 1:
        raise GradinvError(f"--every takes a number of steps of at least 1, not {args.every}.")
    if args.save_observation is not None and Path(args.save_observation).expanduser().exists():
        raise GradinvError(f"{args.save_observation} is there already; name another file, or remove it first.")
    settings = settings_given(args)
    task = begin(args, lambda model: config_from(args.preset, model, settings), say)
    return _Run(**vars(task), every=every(args, task.config), out=out)


def _resumed(args: argparse.Namespace, say: Callable[[str], None]) -> _Run:
    """The run in the folder --resume, from where it last stood. Raises GradinvError where it cannot go on."""
    import torch

    from gradinv.models import load_model
    from gradinv.recording.replay import Resumption
    from gradinv.types import GradinvError

    if given := _beside_resume(args):
        raise GradinvError(f"A resumed run keeps its own pictures and settings; leave {given} out.")
    resumed = Resumption.open(args.resume)
    recorded, environment = resumed.run["model"], resumed.run["environment"]
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
    recorded_labels = resumed.run["labels"]
    return _Run(
        model=model,
        config=resumed.config,
        observation=resumed.observation,
        pixels=resumed.originals,
        labels=recorded_labels["true"],
        given=recorded_labels["restored"] if recorded_labels["method"] == "given" else None,
        defences=resumed.run["client"]["defences"],
        every=resumed.run["every"],
        out=Path(args.resume).expanduser(),
        resumed=resumed,
    )


def _beside_resume(args: argparse.Namespace) -> str:
    """The first option that was given although a resumed run has its own; empty where there is none."""
    if args.images:
        return f"the picture {args.images[0]}"
    defaults = {"model": "auto", "device": "auto", "preset": "demo", "classes": [], "defences": [], "update": False}
    client = ("samples", "imagenet", "random", "batch_size", "classes", "mode", "defences", "save_observation")
    told = ("observation", "update", "label_smoothing", "model", "image_size", "mean", "std", "device")
    for name in (*client, *told, "preset", "config", "out", "every"):
        if getattr(args, name) != defaults.get(name):
            return "--" + {"classes": "class", "defences": "defence"}.get(name, name.replace("_", "-"))
    settings = [name.partition(" ")[2] for name in vars(args) if name.startswith("setting ")]
    return f"--{settings[0].replace('_', '-')}" if settings else ""


def _save(args: argparse.Namespace, task: _Run, say: Callable[[str], None]) -> int:
    """Write the observation and end."""
    task.observation.save(Path(args.save_observation).expanduser())
    say(
        f"What the server receives is in {args.save_observation}; invert it with: gradinv invert --observation "
        f"{args.save_observation}."
    )
    if args.json:
        print(json.dumps({**facts(task), "observation": args.save_observation}, indent=2))
    return 0


def _choose_folder(name: str | None) -> Path | None:
    """The folder that was asked for. Raises GradinvError where something is in it already, or it cannot be written."""
    from gradinv.types import GradinvError

    path = Path("runs" if name is None else name).expanduser()
    try:
        if name is not None and path.is_dir() and any(path.iterdir()):
            raise GradinvError(f"The folder {path} is not empty; name another with --out, or remove it first.")
        barred = write_barred(path)
    except OSError as error:
        raise GradinvError(f"The folder {path} cannot be used ({error.strerror}); name another with --out.") from error
    if barred:
        raise GradinvError(f"Nothing can be written to {path}, since {barred}; name another with --out.")
    return None if name is None else path


def every(args: argparse.Namespace, config: AttackConfig) -> int:
    every: int | None = args.every
    return every if every is not None else -(-config.iterations // RECORDS)


def _check(task: _Run) -> None:
    """Raises GradinvError where there is nothing to describe: the observation is damaged or lacks statistics."""
    from gradinv.attack.objective import bn_targets
    from gradinv.checks import check_observation

    check_observation(task.model, task.observation)
    bn_targets(task.model, task.observation, task.config)


def _describe(say: Callable[[str], None], task: _Run) -> None:
    describe(say, task)
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


def _describe_labels(say: Callable[[str], None], task: _Run, first: Snapshot, notes: Sequence[str]) -> None:
    describe_labels(say, task, first.labels, first.label_method, first.label_confidence, notes)
    if first.features_residual is not None:
        left = percent(first.features_residual)
        say(f"Recovered features leave {left} of the final layer's gradient unexplained.")


def _describe_prior(say: Callable[[str], None], first: Snapshot) -> None:
    """That a learned prior is used, and what it painted from."""
    from gradinv.prior import FEATURES

    if first.prior is not None:
        source = "the recovered features" if first.prior.node == FEATURES else f"the activations of {first.prior.node}"
        say(
            f"A learned prior (--start decoder): a network that learned from public pictures painted a picture from "
            f"{source}, which the search starts from."
        )


def _describe_layers(say: Callable[[str], None], recovered: Recovered, first: Snapshot, seconds: float) -> None:
    """How deep the layers were solved, in so many seconds, and what is left to search for."""
    if any(node.name == first.boundary for node in recovered.nodes):
        depth = solved_to(recovered.nodes)
        say(f"Layers solved from the gradient {depth}, {seconds:.0f} s; the pixels are searched for below it.")
    elif recovered.stopped:
        say(f"{recovered.stopped} So the pixels are searched for until their gradient matches.")


def _with_progress(
    first: Snapshot, stream: Iterator[Snapshot], recorder: Recorder, baseline: float | None
) -> Iterator[Snapshot]:
    """Pass the snapshots on and show how far the run is; on the standard error, and only where that is a terminal."""
    from tqdm import tqdm

    yield first
    with tqdm(total=first.steps, initial=first.step, unit="it", dynamic_ncols=True, disable=None) as bar:
        for snapshot in stream:
            name, values = _told(snapshot)
            shown = [f"{name} {sum(values) / max(1, len(values)):.3f}"]
            if baseline is not None:
                # The PSNR of the last record: it is measured there anyway.
                shown += [f"PSNR {recorder.curves[-1]['consensus_psnr']:.1f} dB (constant {baseline:.1f})"]
            bar.set_postfix_str(", ".join(shown), refresh=False)
            bar.update(snapshot.step - bar.n)
            yield snapshot


def _told(snapshot: Snapshot) -> tuple[str, tuple[float, ...]]:
    """What says how far the seeds are: the gradients' distance, or else the first term."""
    if snapshot.distance or not snapshot.terms:
        return "distance", snapshot.distance
    name = next(iter(snapshot.terms))
    return name, snapshot.terms[name].raw


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
