"""What a command on a client's gradient starts from: the arguments that say whose it is, and what they come to."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradinv.cli.say import listed, percent

# torch takes seconds to import: what needs it is imported by the functions, so that help and mistakes answer at once.
if TYPE_CHECKING:
    from torch import Tensor

    from gradinv.config import AttackConfig
    from gradinv.models import Model
    from gradinv.sources import Picture
    from gradinv.types import Observation


NAMED = 12  # classes of a batch that are named before the work


@dataclass(frozen=True, eq=False)
class Task:
    """Whose gradient it is and what is asked of it. `pixels` (B, 3, S, S) and `labels` are None where nobody knows
    them; they serve the evaluation and never reach the attack. `given` are labels that are told beside an
    observation."""

    model: Model
    config: AttackConfig
    observation: Observation
    pixels: Tensor | None
    labels: list[int] | None
    defences: list[str]
    given: list[int] | None = field(default=None, kw_only=True)


def add_client(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The client's pictures and what it shares of them. → the group of the latter, for more of its kind."""
    pictures = parser.add_argument_group("the client's pictures")
    pictures.add_argument("images", nargs="*", metavar="IMAGE", help="a picture file, or the name of a gallery picture")
    pictures.add_argument("--samples", type=int, metavar="N", help="draw N pictures from the gallery")
    pictures.add_argument("--imagenet", metavar="DIR", help="a folder in ImageNet layout (else: GRADINV_IMAGENET)")
    pictures.add_argument("--random", type=int, metavar="N", help="draw N pictures from that folder")
    pictures.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="how many pictures to draw where none is named (from --imagenet, else the gallery); otherwise a check; of "
        "an observation that has it wrong, how many pictures it is of",
    )
    pictures.add_argument(
        "--class",
        action="append",
        default=[],
        dest="classes",
        metavar="CLASS",
        help="class name or WordNet id of the picture files: once for all, or once for each; by default that of the "
        "file's folder (n01443537), else what the network takes the picture for; beside --observation the labels, "
        "where they are known",
    )
    shared = parser.add_argument_group("what the client shares")
    shared.add_argument(
        "--mode",
        choices=("eval", "train"),
        help="the forward mode of the client's network; in train mode its running statistics after the step are shared "
        "too (default: eval, or train where a setting needs that)",
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
        "--observation",
        metavar="FILE",
        help="take what was saved by `gradinv invert --save-observation`, or by your own loop, without pictures",
    )
    add_corrections(shared)
    return shared


def add_corrections(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """What an observation may not say of itself."""
    group.add_argument(
        "--update", action="store_true", help="the observation holds an update −η g, as federated averaging shares it"
    )
    group.add_argument(
        "--label-smoothing",
        type=float,
        metavar="E",
        help="the client's labels are (1 − E) y + E / N (of an observation it is solved for where it is not given)",
    )


def add_network(group: argparse._ArgumentGroup) -> None:
    """The network, and where it runs."""
    group.add_argument(
        "--model", default="auto", help="a name that `gradinv models` lists, or a weights file (default: %(default)s)"
    )
    group.add_argument("--image-size", type=int, metavar="PX", help="side of the images (default: the model's own)")
    group.add_argument("--device", default="auto", help="cpu, cuda, … (default: %(default)s)")
    add_normalisation(group)


def add_normalisation(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """What the network's pixels are normalised by, where that is not as usual."""
    for name, none in (("mean", "0"), ("std", "1")):
        group.add_argument(
            f"--{name}",
            type=_moments,
            metavar="X[,X,X]",
            help=f"{name} that pixels are normalised by, of each channel or one for all; {none} for no normalisation "
            "(default: what the weights file or the observation states, else ImageNet's)",
        )


def _moments(text: str) -> list[float] | float:
    """For argparse, which says what a ValueError is about."""
    values = [float(part) for part in text.split(",")]
    return values[0] if len(values) == 1 else values


_moments.__name__ = "float"  # as argparse calls what is expected


def begin(args: argparse.Namespace, configure: Callable[[str], AttackConfig], say: Callable[[str], None]) -> Task:
    """What the arguments of `add_client` and `add_network` ask for: pictures, or what somebody else observed.

    configure: from the model's name to the settings, which may depend on it.
    """
    import torch

    from gradinv.client import observe
    from gradinv.defenses import parse_all
    from gradinv.models import load_model
    from gradinv.types import GradinvError

    pixels, labels, given = None, None, None
    if args.observation is not None:
        observation = _read_observation(args)
        theirs = observation.preprocessing
        model = load_model(
            _model_of(args, observation),
            device=args.device,
            image_size=theirs.size if args.image_size is None else args.image_size,
            mean=args.mean,
            std=args.std,
            like=theirs,
        )
        config = configure(model.name)
        given = _given(args, model, observation.batch_size)
    else:
        if args.update:
            raise GradinvError("--update is said of an observation; leave it out, or name the file with --observation.")
        model = load_model(args.model, device=args.device, image_size=args.image_size, mean=args.mean, std=args.std)
        config = configure(model.name)
        mode = _choose_mode(args, config)
        pictures = _choose_pictures(args, model, config.seed, say)
        pixels = _open_pictures(pictures, model, say)
        labels = _choose_labels(args, pictures, pixels, model, say)
        observation = observe(
            model,
            pixels,
            torch.tensor(labels),
            share_bn=config.bn == "exact",
            mode=mode,
            label_smoothing=args.label_smoothing or 0.0,
        )
    defences = parse_all(args.defences, config.seed)
    for defence in defences:
        observation = defence(observation)
    return Task(model, config, observation, pixels, labels, [defence.text for defence in defences], given=given)


def _given(args: argparse.Namespace, model: Model, count: int) -> list[int] | None:
    """The labels of an observation's images, where --class tells them."""
    from gradinv.types import GradinvError

    if not args.classes:
        return None
    if len(args.classes) not in (1, count):
        raise GradinvError(
            f"--class was given {len(args.classes)} times for an observation of {count} pictures; give it once, or "
            "once for each."
        )
    named = [_find_class(name, model) for name in args.classes]
    return named * count if len(named) == 1 else named


def _read_observation(args: argparse.Namespace) -> Observation:
    """Raises GradinvError for a file that is none, and where something else is said of the client as well."""
    from gradinv.types import GradinvError

    names = ("samples", "imagenet", "random", "mode")
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    given = [f"the picture {args.images[0]}"] if args.images else given
    if given:
        raise GradinvError(f"An observation is inverted without any pictures; leave {given[0]} or --observation out.")
    return corrected(args)


def corrected(args: argparse.Namespace) -> Observation:
    """The file --observation, with what `add_corrections` and --batch-size say of it. Raises GradinvError for a file
    that is none."""
    from gradinv.types import Observation

    observation = Observation.load(args.observation)
    names = ("batch_size", "label_smoothing")
    told = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    observation = replace(observation, **told)
    return observation.negated() if args.update else observation


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
        named = f"gradinv {args.command} goldfish lion"
        raise GradinvError(f"Which pictures? Name some ({named}) or draw some with {wanted}.")
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


def write_barred(path: Path) -> str:
    """Why nothing can be written into a folder, which need not be there yet; empty where it can. Raises OSError where
    even that cannot be told."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        return f"{there} is a file"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} is write-protected"


def describe(say: Callable[[str], None], task: Task) -> None:
    """The network, the client's batch and what the server has of it."""
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
    repeats = 0 if labels is None else len(labels) - len(set(labels))
    if repeats and config.labels == "column-minimum":
        say(f"Classes repeat: {config.labels} restores distinct labels, so at least {repeats} will be wrong.")


def facts(task: Task) -> dict[str, Any]:
    """What `--json` prints of whatever is done with a gradient."""
    observation = task.observation
    return {
        "format": 1,
        "model": {"name": task.model.name, "sha256": task.model.sha256},
        "client": {"batch_size": observation.batch_size, "mode": observation.mode, "defences": task.defences},
    }


def describe_labels(
    say: Callable[[str], None],
    task: Task,
    restored: Sequence[int],
    method: str,
    confidence: float | None,
    notes: Sequence[str],
) -> None:
    """What the gradient was found to be, the labels that were read of it, how, and how many are right where that is
    known."""
    for note in notes:
        say(note)
    labels = task.labels
    names = ", ".join(task.model.class_name(label) for label in restored)
    if method == "given":
        say(f"Labels as they were given: {names}")
        return
    right = ""
    if labels is not None:
        from gradinv import metrics

        right = f" ({metrics.labels_right(restored, labels)} of {len(labels)} right)"
    sure = "" if confidence is None else f", with a confidence of {percent(confidence)}"
    say(f"Labels restored from the gradient: {names}{right}; read by the method {method}{sure}")
