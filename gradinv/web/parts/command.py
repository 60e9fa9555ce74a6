"""What is chosen on the page, as a command line."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from gradinv.config import AttackConfig
from gradinv.models import MODELS, Model
from gradinv.web.parts.gradient import OwnGradient
from gradinv.web.parts.pick import Batch, Chosen


def line(network: Model, batch: Batch | OwnGradient, defences: Sequence[str], preset: str, config: AttackConfig) -> str:
    """The command that does what the page would; a picture or a gradient that was brought is named as its file was."""
    words = ["gradinv", "invert"]
    if isinstance(batch, OwnGradient):
        words += ["--observation", batch.name, *(["--update"] if batch.update else [])]
    else:
        words += [_name(member.chosen) for member in batch.members]
        files = [member for member in batch.members if member.chosen.source == "upload"]
        words += [word for member in files for word in ("--class", member.name)]
    words += ["--model", network.name]
    size = network.preprocessing.size
    if not isinstance(batch, OwnGradient) and size != MODELS[network.name].size:  # a gradient says its own
        words += ["--image-size", str(size)]
    words += [word for text in defences for word in ("--defence", text)]
    words += ["--preset", preset]
    base = AttackConfig.preset(preset, network.name)
    for item in dataclasses.fields(AttackConfig):
        value = getattr(config, item.name)
        if value != getattr(base, item.name):
            words += _option(item.name.replace("_", "-"), value)
    return shlex.join(words)


def _name(chosen: Chosen) -> str:
    if chosen.source == "gallery":
        return chosen.id
    return chosen.picture.key


def _option(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
