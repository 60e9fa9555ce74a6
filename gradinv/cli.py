"""The command `gradinv`: invert, models, replay.

Exit codes: 0, 2 for bad use (nothing was run), 1 for a run that failed, 130 for Ctrl-C and 143 for SIGTERM with the run
kept. Results go to the standard output, progress, notes and errors to the standard error where `--json` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from gradinv import __version__

# torch takes seconds to import: what needs it is imported by the commands, so that help and mistakes answer at once.
if TYPE_CHECKING:
    from torch import Tensor

    from gradinv.config import AttackConfig
    from gradinv.models import Model
    from gradinv.recording import Recorder, Recording
    from gradinv.sources import Picture
    from gradinv.types import Observation, Snapshot

RECORDS = 100  # about how many steps of a run are recorded, unless --every says otherwise
REFRESH = 0.5  # seconds between two updates of the progress bar

DESCRIPTION = """\
Turn the gradient that a client of federated learning shares back into the pictures behind it.
"""

EXAMPLES = """\
examples:
  gradinv invert goldfish tabby lion coffee --model resnet18-tiny --seeds 1
  gradinv replay runs/20250131-120000-resnet18-tiny --gif consensus.gif
  gradinv models

"gradinv invert --help" lists every setting of the attack.
"""

INVERT_EXAMPLES = """\
examples:
  gradinv invert goldfish tabby lion coffee            pictures of the bundled gallery, by name
  gradinv invert holiday.jpg --class "sports car"      a picture of your own and its class
  gradinv invert --samples 4 --seed 7                  four of the gallery, drawn at random
  gradinv invert --imagenet val --random 8             eight of a folder in ImageNet layout (<wnid>/*.JPEG)
  gradinv invert lion --preset paper --iterations 500  the constants of the paper, but fewer steps
  gradinv invert lion --gradient 0 --json              the control without the gradient, for a script
  gradinv invert lion --config runs/old/run.json       the settings of an earlier run

exit codes: 0; 2 bad use; 1 the run failed; 130 stopped by Ctrl-C, with what was recorded kept
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. → its exit code; mistakes in the arguments themselves exit with 2, as argparse does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters is no reason to fail
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        # Within, because the settings of the attack import torch: seconds in which Ctrl-C may come.
        return _run(_parser(with_settings=command == "invert").parse_args(argv))
    except KeyboardInterrupt:
        return _complain("Interrupted; nothing was kept.", 130)


def _run(args: argparse.Namespace) -> int:
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has gone (as `head` does): nothing is left to say, also at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        return _complain(*_diagnosis(error))


def _parser(*, with_settings: bool) -> argparse.ArgumentParser:
    """The settings of the attack are added only for the command that has them, since they need torch."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "gradinv", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=layout, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gradinv {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object and nothing else to the output")
    common.add_argument(
        "--debug",
        action="store_true",
        default=os.environ.get("GRADINV_DEBUG", "0") not in ("", "0"),
        help="show the traceback of an error (also: GRADINV_DEBUG=1)",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str, epilog: str = "") -> Any:
        added = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=epilog,
            parents=[common],
            formatter_class=layout,
            allow_abbrev=False,
        )
        added.set_defaults(run=run)
        return added

    invert = command("invert", _invert, "reconstruct pictures from the gradient of their batch", INVERT_EXAMPLES)
    _add_run_options(invert)
    if with_settings:
        _add_settings(invert)
    command("models", _models, "list the networks that can be attacked")
    replay = command("replay", _replay, "show what a recorded run found, or make an animation of it")
    replay.add_argument("directory", metavar="DIR", help="the folder of the run")
    replay.add_argument("--gif", metavar="FILE", help="write the consensus over the steps as an animated GIF")
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
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
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--model", default="auto", help="a name that `gradinv models` lists, or a weights file (default: %(default)s)"
    )
    run.add_argument("--image-size", type=int, metavar="PX", help="side of the images (default: the model's own)")
    run.add_argument("--device", default="auto", help="cpu, cuda, … (default: %(default)s)")
    run.add_argument("--preset", default="demo", help="paper or demo (default: %(default)s)")
    run.add_argument("--config", metavar="FILE", help="settings as JSON over those of the preset, or a run.json")
    run.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/<time>-<model>)")
    run.add_argument("--every", type=int, metavar="N", help=f"record every N steps (default: about {RECORDS} records)")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One option for each field of AttackConfig; those left out keep the preset's value."""
    from gradinv.config import AttackConfig

    group = parser.add_argument_group("settings of the attack (default: the preset's)")
    for item in dataclasses.fields(AttackConfig):
        flag = "--" + item.name.replace("_", "-")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": item.metadata["help"].replace("%", "%%")}
        if isinstance(item.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(item.default, tuple):
            options |= {"type": _shares, "metavar": "S,S,…"}
        elif item.metadata["choices"]:
            options["choices"] = item.metadata["choices"]
        else:
            options |= {"type": type(item.default), "metavar": "N" if isinstance(item.default, int) else "X"}
        group.add_argument(flag, dest=_setting(item.name), **options)


def _setting(name: str) -> str:
    # Apart from the other options, whatever a field may be called.
    return f"setting {name}"


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(share) for share in text.split(",") if share.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers separated by commas are expected, not {text!r}") from error


# --- gradinv invert


def _invert(args: argparse.Namespace) -> int:
    import torch

    from gradinv import metrics
    from gradinv.inversion import invert
    from gradinv.models import load_model
    from gradinv.recording import DirectoryStore, Recorder, Recording, thinned
    from gradinv.types import GradinvError
    from gradinv.victim import observe

    say = _speaker(args)
    out = _choose_folder(args.out)
    if args.every is not None and args.every < 1:
        raise GradinvError(f"--every takes a number of steps of at least 1, not {args.every}.")
    settings = _settings(args)
    model = load_model(args.model, device=args.device, image_size=args.image_size)
    config = _config(args.preset, model.name, settings)
    pictures = _choose_pictures(args, model, config.seed, say)
    pixels = _open_pictures(pictures, model, say)
    labels = _choose_labels(args, pictures, pixels, model, say)

    observation = observe(model, pixels, torch.tensor(labels), share_bn=config.bn == "exact")
    _describe(say, model, observation, config, labels)

    stop = threading.Event()
    stream = invert(model, observation, config, every=_every(args, config), interval=REFRESH, stop=stop)
    first = next(stream)  # what cannot be run is said here, before anything is written
    _describe_labels(say, model, labels, first.labels)
    out = out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{model.name}"
    baseline = float(metrics.psnr(metrics.constant_colour(pixels), pixels).mean())

    error: BaseException | None = None
    with _signals_set(stop) as received:
        recorder = Recorder(
            DirectoryStore(out), config=config, model=model, observation=observation, originals=pixels, labels=labels
        )
        shown = _with_progress(first, stream, recorder, config.iterations, baseline)
        try:
            for _ in recorder.follow(thinned(shown, _every(args, config))):
                pass
        except (Exception, KeyboardInterrupt) as raised:
            if args.debug:
                raise
            error = raised

    run = recorder.run
    done = f"{run['iterations']['done']} of {run['iterations']['total']} iterations"
    if args.json:
        print(json.dumps(run, indent=2))
    elif not isinstance(error, KeyboardInterrupt):
        # A full disk may be why the run failed; then even less can be read back than was shown so far.
        with contextlib.suppress(GradinvError):
            _report(say, Recording.open(out))
    if isinstance(error, KeyboardInterrupt):
        return _complain(f"Quit at once; what had been recorded of {done} is kept in {out}.", 130)
    if error is not None:
        sentence, _ = _diagnosis(error)
        return _complain(f"{sentence.rstrip('.')}. What had been recorded after {done} is kept in {out}.", 1)
    if run["status"] == "stopped":
        return _complain(f"Stopped after {done}; the run is kept in {out}.", 128 + received[0])
    say(f"The run is kept in {out}.")
    return 0


def _choose_folder(name: str | None) -> Path | None:
    """The folder that was asked for. Raises GradinvError where something is in it already."""
    from gradinv.types import GradinvError

    if name is None:
        return None
    path = Path(name).expanduser()
    try:
        if path.is_dir() and any(path.iterdir()):
            raise GradinvError(f"The folder {path} is not empty; name another with --out, or remove it first.")
    except OSError as error:
        raise GradinvError(f"The folder {path} cannot be used ({error.strerror}); name another with --out.") from error
    return path


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What is to differ from the preset: the configuration file's settings, then those of the command line."""
    from gradinv.config import AttackConfig
    from gradinv.types import GradinvError

    settings: dict[str, Any] = {}
    if args.config is not None:
        try:
            settings = json.loads(Path(args.config).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise GradinvError(f"The configuration {args.config} cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise GradinvError(f"The configuration {args.config} is not JSON ({error}).") from error
        if isinstance(settings, dict) and "format" in settings and isinstance(settings.get("config"), dict):
            settings = settings["config"]  # a run.json
        if not isinstance(settings, dict):
            raise GradinvError(f"The configuration {args.config} must be a JSON object of settings.")
    given = vars(args)
    names = (item.name for item in dataclasses.fields(AttackConfig))
    return {**settings, **{name: given[_setting(name)] for name in names if _setting(name) in given}}


def _config(preset: str, model: str, settings: Mapping[str, Any]) -> AttackConfig:
    from gradinv.config import AttackConfig

    base = AttackConfig.preset(preset, model)
    return AttackConfig.from_dict({**base.to_dict(), **settings})


def _every(args: argparse.Namespace, config: AttackConfig) -> int:
    every: int | None = args.every
    return every if every is not None else max(1, config.iterations // RECORDS)


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
            f"The class {text!r} could be {_listed([model.class_name(label) for label in found[:5]], 'or')}; "
            "name one of them."
        )
    near = difflib.get_close_matches(wanted, names, n=3)
    hint = f"did you mean {_listed(near, 'or')}?" if near else "name another, or take another model."
    raise GradinvError(f"{model.name} has no class {text!r}; {hint}")


def _describe(
    say: Callable[[str], None], model: Model, observation: Observation, config: AttackConfig, labels: Sequence[int]
) -> None:
    size = model.preprocessing.size
    accuracy = "" if model.accuracy is None else f", top-1 {model.accuracy:g} %"
    say(f"{model.name}: {len(model.classes)} classes at {size} × {size} px{accuracy}, on {model.device}")
    say(f"The client's batch: {', '.join(model.class_name(label) for label in labels)}")
    norm = sum(float(gradient.square().sum()) for gradient in observation.gradients.values()) ** 0.5
    numbers = sum(gradient.numel() for gradient in observation.gradients.values())
    say(
        f"The server receives the mean gradient of {len(observation.gradients)} parameters ({numbers:,} numbers, "
        f"norm {norm:.3g}) and the batch size {observation.batch_size}."
    )
    say("It knows the weights and the preprocessing, but neither the pictures nor their labels.")
    if observation.bn is not None:
        say("The client also shares the exact batch-normalisation statistics of its batch (--bn exact).")
    elif config.bn == "approx":
        say("Batch-normalisation statistics: those stored in the weights (--bn approx).")
    repeats = len(labels) - len(set(labels))
    if repeats and config.labels == "column-minimum":
        say(f"Classes repeat: {config.labels} restores distinct labels, so at least {repeats} will be wrong.")


def _describe_labels(say: Callable[[str], None], model: Model, labels: Sequence[int], restored: Sequence[int]) -> None:
    right = sum((Counter(labels) & Counter(restored)).values())
    names = ", ".join(model.class_name(label) for label in restored)
    say(f"Labels restored from the gradient: {names} ({right} of {len(labels)} right)")


def _with_progress(
    first: Snapshot, stream: Iterator[Snapshot], recorder: Recorder, total: int, baseline: float
) -> Iterator[Snapshot]:
    """Pass the snapshots on and show how far the run is; on the standard error, and only where that is a terminal."""
    from tqdm import tqdm

    yield first
    with tqdm(total=total, unit="it", dynamic_ncols=True, disable=None) as bar:
        for snapshot in stream:
            # The PSNR of the last record: it is measured there anyway.
            psnr = recorder.curves[-1]["consensus_psnr"]
            distance = sum(snapshot.distance) / max(1, len(snapshot.distance))
            bar.set_postfix_str(f"distance {distance:.3f}, PSNR {psnr:.1f} dB (constant {baseline:.1f})", refresh=False)
            bar.update(snapshot.step - bar.n)
            yield snapshot


@contextlib.contextmanager
def _signals_set(stop: threading.Event) -> Iterator[list[int]]:
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


# --- gradinv models


def _models(args: argparse.Namespace) -> int:
    from gradinv.models import MODELS

    if args.json:
        shown = ("name", "description", "size", "classes", "accuracy", "origin", "bundled")
        rows = [{name: getattr(info, name) for name in shown} for info in MODELS.values()]
        print(json.dumps({"models": rows}, indent=2))
        return 0
    header = ("name", "pixels", "classes", "top-1 %", "weights", "what")
    print(
        _table(
            header,
            [
                (info.name, info.size, info.classes, info.accuracy, info.origin, info.description)
                for info in MODELS.values()
            ],
            numbers=(1, 2, 3),
        )
    )
    print("auto takes resnet50 where a GPU and its weights are at hand, else resnet50-tiny.")
    print("A path to a weights file works as well: a torchvision-style ResNet as .safetensors or weights-only .pth.")
    return 0


# --- gradinv replay


def _replay(args: argparse.Namespace) -> int:
    from gradinv.recording import DirectoryStore, Recording, gif

    say = _speaker(args)
    recording = Recording.open(args.directory)
    if args.gif is not None:
        target = Path(args.gif).expanduser()
        DirectoryStore(target.parent).write(target.name, gif(recording))
        say(f"The animation is in {target}.")
    if args.json:
        print(json.dumps(recording.run, indent=2))
        return 0
    run = recording.run
    environment = run["environment"]
    say(f"{run['model']['name']} on {environment['device']}, gradinv {environment['gradinv']}: {run['status']}")
    if "error" in run:
        say(run["error"])
    _report(say, recording)
    return 0


# --- what both show


def _report(say: Callable[[str], None], recording: Recording) -> None:
    """Images, terms and costs of a recorded run. A PSNR never stands without that of a constant colour."""
    run = recording.run
    if not recording.steps:
        say("Nothing was recorded of this run yet.")
        return
    say("")
    say(_image_table(recording))
    say("")
    if terms := _term_table(recording):
        say(terms)
        say("")
    each = run["seconds_per_iteration"]
    memory = run["peak_memory_mb"]
    say(
        f"{run['iterations']['done']} of {run['iterations']['total']} iterations in {run['seconds']:.1f} s"
        + ("" if each is None else f", {each:.3f} s each")
        + ("" if memory is None else f", at most {memory / 1000:.2f} GB of memory")
        + f"; {len(recording.steps)} steps recorded"
    )


def _image_table(recording: Recording) -> str:
    from gradinv import metrics

    run = recording.run
    true, restored = run["labels"]["true"], run["labels"]["restored"]
    if true is None:
        return _table(("#", "restored"), [(i, recording.class_name(label)) for i, label in enumerate(restored)])
    measured, note = run["metrics"], ""
    if measured is None:
        measured, note = _measured_on_frames(recording), "\n(measured on the last recorded frame, which is lossy)"
    rows: list[tuple[object, ...]] = []
    for index, (label, place) in enumerate(zip(true, recording.order(), strict=True)):
        name = recording.class_name(restored[place])
        found = name if restored[place] == label else f"{name} (wrong)"
        rows.append((index, recording.class_name(label), found, *(c[index] for c in metrics.columns(measured))))
    if len(rows) > 1:
        rows.append(("", "mean", "", *(metrics.mean(column) for column in metrics.columns(measured))))
    formatted = [
        (*row[:3], *(_figure(value, 2 if place < 3 else 3) for place, value in enumerate(row[3:]))) for row in rows
    ]
    header = ["#", "class", "restored"]
    header += [f"{name} {of}" for name in ("PSNR", "SSIM") for of in ("seeds", "consensus", "constant")]
    footer = "PSNR in dB; seeds: mean over the seeds; constant: each picture's mean colour, the baseline"
    return _table(header, formatted, numbers=range(3, 9)) + "\n" + footer + note


def _measured_on_frames(recording: Recording) -> dict[str, Any]:
    """The metrics of a run that never ended, as run.json would have them."""
    from gradinv import metrics
    from gradinv.types import GradinvError

    last, originals = recording.snapshot(recording.steps[-1]), recording.originals()
    if originals is None:
        raise GradinvError(f"{recording.store} lacks its originals; record the run again.")
    true = recording.run["labels"]["true"]

    def measured(images: Tensor) -> dict[str, list[float | None]]:
        return metrics.measure(images[metrics.pair(images, last.labels, originals, true)], originals)

    return {
        "seeds": [measured(pixels) for pixels in last.seeds],
        "consensus": measured(last.consensus),
        "baseline": metrics.measure(metrics.constant_colour(originals), originals),
    }


def _term_table(recording: Recording) -> str:
    """Each term's weighted value and the matching distance, mean over the seeds, at the first and the last record."""
    from gradinv import metrics

    rows: dict[int, list[dict[str, Any]]] = {}
    for row in recording.curves:
        if row["distance"] is not None:
            rows.setdefault(row["step"], []).append(row)
    if not rows:
        return ""
    ends = sorted({min(rows), max(rows)})
    names = ["distance", *(name for name in rows[ends[0]][0] if name.endswith(".weighted"))]
    table = [
        (
            name.removesuffix(".weighted"),
            *(_figure(metrics.mean([row[name] for row in rows[step]]), 4) for step in ends),
        )
        for name in names
    ]
    header = ("term (weighted)", *(f"step {step}" for step in ends))
    return _table(header, table, numbers=range(1, 1 + len(ends)))


def _figure(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float | int) else "–"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """Aligned columns, those of `numbers` to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = (
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _listed(words: Sequence[str], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


# --- how things are said


def _speaker(args: argparse.Namespace) -> Callable[[str], None]:
    """Where text for people goes: to the output, or aside where that is for a machine."""
    stream = sys.stderr if args.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=stream, flush=True)

    return say


def _diagnosis(error: BaseException) -> tuple[str, int]:
    """One sentence and the exit code: 2 for what the user can mend, 1 for what nobody foresaw."""
    from gradinv.types import GradinvError

    if isinstance(error, GradinvError):
        return str(error), 2
    reason = " ".join(str(error).split())
    return f"Unexpected {type(error).__name__}: {reason or 'no reason given'} (--debug shows where).", 1


def _complain(sentence: str, code: int) -> int:
    print(f"gradinv: {sentence}", file=sys.stderr)
    return code
