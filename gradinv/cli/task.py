"""What a command on a client's gradient starts from: what the arguments that say whose it is come to."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradinv import metrics, sources
from gradinv.cli.say import listed, percent, say
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.defenses import parse_all
from gradinv.images import to_pixels
from gradinv.models import MODELS, Model, load_model
from gradinv.sources import Picture
from gradinv.types import GradinvError, Observation

NAMED = 12  # classes of a batch that are named before the work


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """Whose gradient it is and what is asked of it. `pixels` (B, 3, S, S) and `labels` are None where nobody knows
    them; they serve the evaluation and never reach the attack. `given` are labels (B,) told beside an observation."""

    model: Model
    config: AttackConfig
    observation: Observation
    pixels: Tensor | None = None
    labels: list[int] | None = None
    defences: list[str]
    given: Tensor | None = None


def begin(args: argparse.Namespace, configure: Callable[[str], AttackConfig]) -> Task:
    """What the arguments ask for: pictures, or what somebody else observed.

    configure: from the model's name to the settings, which may depend on it.
    """
    pixels, labels, given = None, None, None
    if args.observation is not None:
        observation, model = _observed_alone(args)
        config = configure(model.name)
        if args.classes:
            count = observation.batch_size
            given = torch.tensor(_named(args, model, count, f"an observation of {count} pictures"))
    else:
        if args.update:
            raise GradinvError("--update is said of an observation; leave it out, or name the file with --observation.")
        model = load_model(args.model, device=args.device, image_size=args.image_size, mean=args.mean, std=args.std)
        config = configure(model.name)
        mode = _choose_mode(args, config)
        pictures = _choose_pictures(args, model, config.seed)
        pixels = _open_pictures(pictures, model)
        labels = _choose_labels(args, pictures, pixels, model)
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
    return Task(
        model=model,
        config=config,
        observation=observation,
        pixels=pixels,
        labels=labels,
        defences=[defence.text for defence in defences],
        given=given,
    )


def observed(args: argparse.Namespace, image_size: int | None = None) -> tuple[Observation, Model]:
    """The file --observation, with what the arguments correct of it, and the model that it names, unless another is
    asked for. Raises GradinvError for a file that is none, and where the weights have to be named."""
    observation = Observation.load(args.observation)
    names = ("batch_size", "label_smoothing")
    observation = replace(observation, **{name: told for name in names if (told := getattr(args, name)) is not None})
    if args.update:
        observation = observation.negated()
    name = observation.model_name if args.model == "auto" else args.model
    if args.model == "auto" and name not in MODELS:
        raise GradinvError(
            f"The observation is of {name!r}, which is not the name of a model; name the weights file with --model."
        )
    theirs = observation.preprocessing
    size = theirs.size if image_size is None else image_size
    return observation, load_model(name, device=args.device, image_size=size, mean=args.mean, std=args.std, like=theirs)


def _observed_alone(args: argparse.Namespace) -> tuple[Observation, Model]:
    """Raises GradinvError where something else is said of the client as well."""
    names = ("samples", "imagenet", "random", "mode")
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    given = [f"the picture {args.images[0]}"] if args.images else given
    if given:
        raise GradinvError(f"An observation is inverted without any pictures; leave {given[0]} or --observation out.")
    return observed(args, args.image_size)


def _named(args: argparse.Namespace, model: Model, count: int, what: str) -> list[int]:
    """The labels that --class tells of so many pictures: one for all, or one for each. Raises GradinvError."""
    if len(args.classes) not in (1, count):
        raise GradinvError(f"--class was given {len(args.classes)} times for {what}; give it once, or once for each.")
    named = [_find_class(name, model) for name in args.classes]
    return named * count if len(named) == 1 else named


def _choose_mode(args: argparse.Namespace, config: AttackConfig) -> str:
    if config.bn != "inferred":
        return args.mode or "eval"
    if args.mode == "eval":
        raise GradinvError(
            "In eval mode the client keeps no new running statistics from which --bn inferred could tell the batch's; "
            "leave --mode eval out, or take another --bn."
        )
    return "train"


def _choose_pictures(args: argparse.Namespace, model: Model, seed: int) -> list[Picture]:
    """By name, or drawn from the gallery or a folder. Raises GradinvError where the request contradicts itself."""
    folder = args.random is not None or args.imagenet is not None
    if args.images:
        if args.samples is not None or folder:
            raise GradinvError("Pictures are either named or drawn at random (--samples, --imagenet), not both.")
        if args.batch_size not in (None, len(args.images)):
            raise GradinvError(
                f"The batch size is the number of pictures named, {len(args.images)}, not {args.batch_size}; "
                "leave --batch-size out."
            )
        gallery = sources.gallery(model)
        return [sources.from_path(name) if _is_path(name) else sources.find(gallery, name) for name in args.images]
    if args.samples is not None and folder:
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
    if folder:
        pictures, warning = sources.ImageFolder(args.imagenet).draw(count, seed, {item.wnid for item in model.classes})
    else:
        pictures, warning = sources.draw(sources.gallery(model), count, seed)
    if warning:
        say(warning)
    return pictures


def _is_path(name: str) -> bool:
    path = Path(name)
    return path.name != name or path.suffix != "" or path.is_file()


def _open_pictures(pictures: Sequence[Picture], model: Model) -> Tensor:
    """Decode and preprocess: → pixels (B, 3, S, S) in [0, 1]. Notes on what was converted are said."""
    batch = []
    for picture in pictures:
        image, notes = picture.load()
        for note in notes:
            say(note)
        batch.append(to_pixels(image, model.preprocessing))
    return torch.stack(batch)


def _choose_labels(args: argparse.Namespace, pictures: Sequence[Picture], pixels: Tensor, model: Model) -> list[int]:
    """Each picture's label: named by --class, known to its source, or else what the network takes it for."""
    files = [index for index, picture in enumerate(pictures) if args.images and _is_path(args.images[index])]
    if args.classes and not files:
        raise GradinvError("--class is for picture files; the classes of the other pictures are known.")
    chosen = {}
    if args.classes:
        chosen = dict(zip(files, _named(args, model, len(files), f"{len(files)} picture files"), strict=True))
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


def check_writable(path: Path, *, file: bool = False) -> None:
    """Raises GradinvError where nothing can be written to a file or into a folder, which need not be there yet."""
    folder = path.parent if file else path
    try:
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        if file and path.is_dir():
            barred = f"{path} is a folder"
        elif not there.is_dir():
            barred = f"{there} is a file"
        else:
            barred = "" if os.access(there, os.W_OK | os.X_OK) else f"{there} is write-protected"
    except OSError as error:
        barred = f"it cannot be used ({error.strerror})"
    if barred:
        raise GradinvError(f"Nothing can be written to {path}, since {barred}; name another with --out.")


def describe(task: Task) -> None:
    """The network, the client's batch and what the server has of it."""
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
    known = "not the pictures" if task.given is not None else "neither the pictures nor their labels"
    say(f"It knows the weights and the preprocessing, but {known}.")
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
    task: Task, restored: Sequence[int], method: str, confidence: float | None, notes: Sequence[str]
) -> None:
    """What the gradient was found to be, the labels that were read of it, how, and how many are right where that is
    known."""
    for note in notes:
        say(note)
    names = ", ".join(task.model.class_name(label) for label in restored)
    if method == "given":
        say(f"Labels as they were given: {names}")
        return
    right = ""
    if task.labels is not None:
        right = f" ({metrics.labels_right(restored, task.labels)} of {len(task.labels)} right)"
    sure = "" if confidence is None else f", with a confidence of {percent(confidence)}"
    say(f"Labels restored from the gradient: {names}{right}; read by the method {method}{sure}")
