"""`gradinv invert`: from pictures to their gradient, and back."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from gradinv.cli.replay import report
from gradinv.cli.say import complain, diagnosis, listed, percent, speaker

# torch takes seconds to import: what needs it is imported by the functions, so that help and mistakes answer at once.
if TYPE_CHECKING:
    from torch import Tensor

    from gradinv.attack.state import RunState
    from gradinv.config import AttackConfig
    from gradinv.distributed import Ranks
    from gradinv.models import Model
    from gradinv.recording import Recorder, Resumption
    from gradinv.sources import Picture
    from gradinv.types import Observation, Snapshot


RECORDS = 100  # at most so many steps of a run are recorded, unless --every says otherwise

NAMED = 12  # classes of a batch that are named before the work
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
    pictures = parser.add_argument_group("the client's pictures")
    pictures.add_argument("images", nargs="*", metavar="IMAGE", help="a picture file, or the name of a gallery picture")
    pictures.add_argument("--samples", type=int, metavar="N", help="draw N pictures from the gallery")
    pictures.add_argument("--imagenet", metavar="DIR", help="a folder in ImageNet layout (else: GRADINV_IMAGENET)")
    pictures.add_argument("--random", type=int, metavar="N", help="draw N pictures from that folder")
    pictures.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="how many pictures to draw where none is named (from --imagenet, else the gallery); otherwise a check",
    )
    pictures.add_argument(
        "--class",
        action="append",
        default=[],
        dest="classes",
        metavar="CLASS",
        help="class name or WordNet id of the picture files: once for all, or once for each; by default that of the "
        "file's folder (n01443537), else what the network takes the picture for",
    )
    shared = parser.add_argument_group("what the client shares")
    shared.add_argument(
        "--mode",
        choices=("eval", "train"),
        help="the forward mode of the client's network; in train mode its running statistics after the step are shared "
        "too (default: train where --bn inferred needs that, else eval)",
    )
    shared.add_argument(
        "--defence",
        action="append",
        default=[],
        dest="defences",
        metavar="D",
        help="what the client does to its gradient first, in the order given: none, clip:C (norm), noise:S (standard "
        "deviation), dp:C,E,D (clipped to C, with noise for (E, D)-privacy of the whole batch), prune:P (share), "
        "quantise:B (bits)",
    )
    shared.add_argument(
        "--save-observation", metavar="FILE", help="write what the server receives to FILE and end there"
    )
    shared.add_argument(
        "--observation", metavar="FILE", help="invert what was saved like that, or by your own loop, without pictures"
    )
    options = parser.add_argument_group("the run")
    options.add_argument(
        "--model", default="auto", help="a name that `gradinv models` lists, or a weights file (default: %(default)s)"
    )
    options.add_argument("--image-size", type=int, metavar="PX", help="side of the images (default: the model's own)")
    options.add_argument("--device", default="auto", help="cpu, cuda, … (default: %(default)s)")
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
class _Task:
    """All that a run starts from. `pixels` (B, 3, S, S) and `labels` are None where nobody knows them."""

    model: Model
    config: AttackConfig
    observation: Observation
    pixels: Tensor | None
    labels: list[int] | None
    defences: list[str]
    every: int
    out: Path | None
    resumed: Resumption | None = None


@dataclass(frozen=True, eq=False)
class _Told:
    """What the other ranks hear of a run from the first, which alone reads files; the model each one loads itself."""

    weights: str
    image_size: int
    device: str
    config: AttackConfig
    observation: Observation
    every: int
    state: RunState | None


def run(args: argparse.Namespace) -> int:
    from gradinv.distributed import joined

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
    from gradinv.attack.inversion import invert
    from gradinv.models import load_model
    from gradinv.types import GradinvError

    stop = threading.Event()
    with signals_set(stop):
        try:
            told: _Told | None = ranks.tell(None)
            if told is None:
                return 0
            with ranks.together():
                model = load_model(told.weights, device=told.device, image_size=told.image_size)
                stream = invert(
                    model,
                    told.observation,
                    told.config,
                    every=told.every,
                    stop=stop,
                    resume=told.state,
                    ranks=ranks,
                )
            for _ in stream:
                pass
        except GradinvError:
            # The first rank says it. An exit code would have torchrun end that one before it has.
            if args.debug:
                raise
    return 0


def _invert(args: argparse.Namespace, task: _Task, say: Callable[[str], None], ranks: Ranks) -> int:
    from gradinv import metrics
    from gradinv.attack.inversion import invert
    from gradinv.models import MODELS
    from gradinv.recording import DirectoryStore, Recorder, thinned

    model, config, resumed = task.model, task.config, task.resumed
    state = None if resumed is None else resumed.state
    weights = model.name if args.model == "auto" else args.model
    size, device = model.preprocessing.size, model.device.type
    ranks.tell(_Told(weights, size, device, config, task.observation, task.every, state))
    stop = threading.Event()
    with ranks.together():
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
        )
    first = next(stream)  # what cannot be run is said here, before anything is written
    if ranks.count > 1:
        say(f"{ranks.count} ranks share the {config.seeds} seeds.")
    _describe_labels(say, task, first)
    out = task.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{model.name}"
    baseline = (
        None if task.pixels is None else float(metrics.psnr(metrics.constant_colour(task.pixels), task.pixels).mean())
    )

    error: BaseException | None = None
    with signals_set(stop) as received:
        recorder = Recorder(
            DirectoryStore(out),
            config=config,
            model=model,
            observation=task.observation,
            originals=task.pixels,
            labels=task.labels,
            every=task.every,
            defences=task.defences,
            weights=None if args.model in ("auto", *MODELS) else str(Path(args.model).expanduser().resolve()),
            ranks=ranks.count,
            state=stream.state,
            resumed=resumed,
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


def _ended(
    args: argparse.Namespace,
    say: Callable[[str], None],
    run: dict[str, Any],
    out: Path,
    error: BaseException | None,
    signalled: int,
) -> int:
    """Say how the run ended. → the exit code."""
    from gradinv.recording import Recording
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
    say(f"The run is kept in {out}.")
    return 0


def _begun(args: argparse.Namespace, say: Callable[[str], None]) -> _Task:
    """A run as the arguments have it: of pictures, or of what somebody else observed."""
    import torch

    from gradinv.cli.settings import config_from, settings_given
    from gradinv.defenses import parse_all
    from gradinv.models import load_model
    from gradinv.types import GradinvError
    from gradinv.victim import observe

    out = _choose_folder(args.out)
    if args.every is not None and args.every < 1:
        raise GradinvError(f"--every takes a number of steps of at least 1, not {args.every}.")
    settings = settings_given(args)
    pixels, labels, observation = None, None, None
    if args.observation is not None:
        observation = _read_observation(args)
        size = observation.preprocessing.size if args.image_size is None else args.image_size
        model = load_model(_model_of(args, observation), device=args.device, image_size=size)
        config = config_from(args.preset, model.name, settings)
    else:
        model = load_model(args.model, device=args.device, image_size=args.image_size)
        config = config_from(args.preset, model.name, settings)
        mode = _choose_mode(args, config)
        pictures = _choose_pictures(args, model, config.seed, say)
        pixels = _open_pictures(pictures, model, say)
        labels = _choose_labels(args, pictures, pixels, model, say)
        observation = observe(model, pixels, torch.tensor(labels), share_bn=config.bn == "exact", mode=mode)
    defences = parse_all(args.defences, config.seed)
    for defence in defences:
        observation = defence(observation)
    return _Task(
        model=model,
        config=config,
        observation=observation,
        pixels=pixels,
        labels=labels,
        defences=[defence.text for defence in defences],
        every=every(args, config),
        out=out,
    )


def _resumed(args: argparse.Namespace, say: Callable[[str], None]) -> _Task:
    """The run in the folder --resume, from where it last stood. Raises GradinvError where it cannot go on."""
    import torch

    from gradinv.models import load_model
    from gradinv.recording import Resumption
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
    model = load_model(recorded["weights"], device=device, image_size=recorded["image_size"])
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
    return _Task(
        model=model,
        config=resumed.config,
        observation=resumed.observation,
        pixels=resumed.originals,
        labels=resumed.run["labels"]["true"],
        defences=resumed.run["client"]["defences"],
        every=resumed.run["every"],
        out=resumed.store.path,
        resumed=resumed,
    )


def _beside_resume(args: argparse.Namespace) -> str:
    """The first option that was given although a resumed run has its own; empty where there is none."""
    if args.images:
        return f"the picture {args.images[0]}"
    defaults = {"model": "auto", "device": "auto", "preset": "demo", "classes": [], "defences": []}
    names = ("samples", "imagenet", "random", "batch_size", "classes", "mode", "defences", "save_observation")
    for name in (*names, "observation", "model", "image_size", "device", "preset", "config", "out", "every"):
        if getattr(args, name) != defaults.get(name):
            return "--" + {"classes": "class", "defences": "defence"}.get(name, name.replace("_", "-"))
    settings = [name.partition(" ")[2] for name in vars(args) if name.startswith("setting ")]
    return f"--{settings[0].replace('_', '-')}" if settings else ""


def _save(args: argparse.Namespace, task: _Task, say: Callable[[str], None]) -> int:
    """Write the observation and end."""
    task.observation.save(Path(args.save_observation).expanduser())
    say(
        f"What the server receives is in {args.save_observation}; invert it with: gradinv invert --observation "
        f"{args.save_observation}."
    )
    if args.json:
        facts = {
            "format": 1,
            "observation": args.save_observation,
            "model": {"name": task.model.name, "sha256": task.model.sha256},
            "client": {
                "batch_size": task.observation.batch_size,
                "mode": task.observation.mode,
                "defences": task.defences,
            },
        }
        print(json.dumps(facts, indent=2))
    return 0


def _read_observation(args: argparse.Namespace) -> Observation:
    """Raises GradinvError for a file that is none, and where something else is said of the client as well."""
    from gradinv.types import GradinvError, Observation

    names = ("samples", "imagenet", "random", "batch_size", "mode")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    given += ["--class"] if args.classes else []
    given = [f"the picture {args.images[0]}"] if args.images else given
    if given:
        raise GradinvError(f"An observation is inverted without any pictures; leave {given[0]} or --observation out.")
    return Observation.load(Path(args.observation).expanduser())


def _model_of(args: argparse.Namespace, observation: Observation) -> str:
    """The model that the observation names, unless another is asked for."""
    from gradinv.models import MODELS
    from gradinv.types import GradinvError

    if args.model != "auto":
        return str(args.model)
    if observation.model_name not in MODELS:
        raise GradinvError(
            f"The observation is of {observation.model_name!r}, which is not the name of a model; name the weights "
            "file with --model."
        )
    return observation.model_name


def _choose_mode(args: argparse.Namespace, config: AttackConfig) -> str:
    from gradinv.types import GradinvError

    if config.bn != "inferred":
        return args.mode or "eval"
    if args.mode == "eval":
        raise GradinvError(
            "In eval mode the client keeps no new running statistics from which --bn inferred could tell the batch's; "
            "leave --mode eval out, or take another --bn."
        )
    return "train"


def _choose_folder(name: str | None) -> Path | None:
    """The folder that was asked for. Raises GradinvError where something is in it already, or it cannot be written."""
    from gradinv.types import GradinvError

    path = Path("runs" if name is None else name).expanduser()
    try:
        if name is not None and path.is_dir() and any(path.iterdir()):
            raise GradinvError(f"The folder {path} is not empty; name another with --out, or remove it first.")
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:
        raise GradinvError(f"The folder {path} cannot be used ({error.strerror}); name another with --out.") from error
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "is write-protected" if there.is_dir() else "is a file"
        raise GradinvError(f"Nothing can be written to {path}, since {there} {reason}; name another with --out.")
    return None if name is None else path


def every(args: argparse.Namespace, config: AttackConfig) -> int:
    every: int | None = args.every
    return every if every is not None else -(-config.iterations // RECORDS)


def _choose_pictures(args: argparse.Namespace, model: Model, seed: int, say: Callable[[str], None]) -> list[Picture]:
    """By name, or drawn from the gallery or a folder. Raises GradinvError where the request contradicts itself."""
    from gradinv import sources
    from gradinv.types import GradinvError

    if args.images:
        if args.samples is not None or args.random is not None or args.imagenet is not None:
            raise GradinvError("Pictures are either named or drawn at random (--samples, --imagenet), not both.")
        if args.batch_size not in (None, len(args.images)):
            raise GradinvError(
                f"The batch size is the number of pictures named, {len(args.images)}, not {args.batch_size}; "
                "leave --batch-size out."
            )
        gallery = sources.gallery(model)
        return [sources.from_path(name) if _is_path(name) else sources.find(gallery, name) for name in args.images]
    if args.samples is not None and (args.random is not None or args.imagenet is not None):
        raise GradinvError("Pictures are drawn from the gallery (--samples) or a folder (--imagenet), not both.")
    counts = {count for count in (args.samples, args.random, args.batch_size) if count is not None}
    if len(counts) > 1:
        raise GradinvError(
            f"The batch size is {args.batch_size} and {args.samples if args.random is None else args.random} pictures "
            "are to be drawn; leave one of the two out."
        )
    if not counts:
        wanted = "--random N" if args.imagenet is not None else "--samples N"
        raise GradinvError(f"Which pictures? Name some (gradinv invert goldfish lion) or draw some with {wanted}.")
    (count,) = counts
    if args.random is not None or args.imagenet is not None:
        known = {item.wnid for item in model.classes}
        pictures, warning = sources.ImageFolder(args.imagenet).draw(count, seed, known)
    else:
        pictures, warning = sources.draw(sources.gallery(model), count, seed)
    if warning:
        say(warning)
    return pictures


def _is_path(name: str) -> bool:
    path = Path(name)
    return path.name != name or path.suffix != "" or path.is_file()


def _open_pictures(pictures: Sequence[Picture], model: Model, say: Callable[[str], None]) -> Tensor:
    """Decode and preprocess: → pixels (B, 3, S, S) in [0, 1]. Notes on what was converted are said."""
    import torch

    from gradinv.images import to_pixels

    batch = []
    for picture in pictures:
        image, notes = picture.load()
        for note in notes:
            say(note)
        batch.append(to_pixels(image, model.preprocessing))
    return torch.stack(batch)


def _choose_labels(
    args: argparse.Namespace, pictures: Sequence[Picture], pixels: Tensor, model: Model, say: Callable[[str], None]
) -> list[int]:
    """Each picture's label: named by --class, known to its source, or else what the network takes it for."""
    from gradinv.types import GradinvError

    files = [index for index, picture in enumerate(pictures) if args.images and _is_path(args.images[index])]
    if args.classes and len(args.classes) not in (1, len(files)):
        raise GradinvError(
            f"--class was given {len(args.classes)} times for {len(files)} picture files; "
            "give it once, or once for each."
        )
    if args.classes and not files:
        raise GradinvError("--class is for picture files; the classes of the other pictures are known.")
    named = [_find_class(name, model) for name in args.classes]
    chosen = dict(zip(files, named * len(files) if len(named) == 1 else named, strict=False))
    labels = []
    for index, picture in enumerate(pictures):
        label = chosen.get(index)
        if label is None and picture.wnid:
            label = model.class_index(picture.wnid)
            if label is None:
                raise GradinvError(
                    f"{model.name} does not know the class {picture.name} of {picture.title}; "
                    "take another model, or another class with --class."
                )
        if label is None:
            label = int(model.predict(pixels[index : index + 1])[0])
            say(f"{picture.title}: no class was given; {model.name} takes it for {model.class_name(label)}.")
        labels.append(label)
    return labels


def _find_class(text: str, model: Model) -> int:
    """The label of a WordNet id or a class name, or of the only class whose name contains the text."""
    from gradinv.types import GradinvError

    if (label := model.class_index(text)) is not None:
        return label
    names = [item.name.casefold() for item in model.classes]
    wanted = text.casefold().strip()
    exact = [label for label, name in enumerate(names) if name == wanted]
    found = exact or [label for label, name in enumerate(names) if wanted and wanted in name]
    if len(found) == 1:
        return found[0]
    if found:
        raise GradinvError(
            f"The class {text!r} could be {listed([model.class_name(label) for label in found[:5]], 'or')}; "
            "name one of them."
        )
    near = difflib.get_close_matches(wanted, names, n=3)
    hint = f"did you mean {listed(near, 'or')}?" if near else "name another, or take another model."
    raise GradinvError(f"{model.name} has no class {text!r}; {hint}")


def _check(task: _Task) -> None:
    """Raises GradinvError where there is nothing to describe: the observation is damaged or lacks statistics."""
    from gradinv.attack.objective import bn_targets
    from gradinv.checks import check_observation

    check_observation(task.model, task.observation)
    bn_targets(task.model, task.observation, task.config)


def _describe(say: Callable[[str], None], task: _Task) -> None:
    from gradinv.defenses import parse_all

    model, observation, config, labels = task.model, task.observation, task.config, task.labels
    size = model.preprocessing.size
    accuracy = "" if model.accuracy is None else f", top-1 {model.accuracy:g} %"
    say(f"{model.name}: {len(model.classes)} classes at {size} × {size} px{accuracy}, on {model.device}")
    if labels is not None:
        names = [model.class_name(label) for label in labels[:NAMED]]
        more = f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
        say(f"The client's batch: {', '.join(names)}{more}")
    for defence in parse_all(task.defences, config.seed):
        say(f"Its defence {defence.text}: {defence.note}")
    if task.defences and (observation.bn is not None or observation.running is not None):
        say("No defence covers the batch-normalisation statistics that it shares.")
    norm = sum(float(gradient.square().sum()) for gradient in observation.gradients.values()) ** 0.5
    numbers = sum(gradient.numel() for gradient in observation.gradients.values())
    say(
        f"The server receives the mean gradient of {len(observation.gradients)} parameters ({numbers:,} numbers, "
        f"norm {norm:.3g}) and the batch size {observation.batch_size}."
    )
    say("It knows the weights and the preprocessing, but neither the pictures nor their labels.")
    if observation.mode == "train":
        say("The client's network is in train mode, in which batch normalisation takes the batch's own statistics.")
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
    repeats = 0 if labels is None else len(labels) - len(set(labels))
    if repeats and config.labels == "column-minimum":
        say(f"Classes repeat: {config.labels} restores distinct labels, so at least {repeats} will be wrong.")


def _describe_labels(say: Callable[[str], None], task: _Task, first: Snapshot) -> None:
    restored, labels, asked = first.labels, task.labels, task.config.labels
    names = ", ".join(task.model.class_name(label) for label in restored)
    right = ""
    if labels is not None:
        right = f" ({sum((Counter(labels) & Counter(restored)).values())} of {len(labels)} right)"
    read = f"auto: {first.label_method}" if asked == "auto" else asked
    sure = "" if first.label_confidence is None else f", confidence {percent(first.label_confidence)}"
    say(f"Labels restored from the gradient: {names}{right}; read by {read}{sure}")
    if first.features_residual is not None:
        say(f"Recovered features explain the final layer's gradient up to {percent(first.features_residual)}.")
    if first.boundary not in ("loss", "logits"):
        say(f"The layers are solved down to {first.boundary}; below it the pixels are searched for.")
    elif task.config.boundary == "auto":
        say("The layers below could not be solved, so pixels are searched for until their gradient matches.")


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
    """What says how far the seeds are: the gradients' distance, or that of the solved activations."""
    if "activations" in snapshot.terms:
        return "activations", snapshot.terms["activations"].raw
    return "distance", snapshot.distance


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
