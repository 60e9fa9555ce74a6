"""`gradinv models`: the networks that can be attacked."""

from __future__ import annotations

import argparse

from gradinv.cli.say import answer, say, table
from gradinv.models import MODELS


def run(args: argparse.Namespace) -> int:
    shown = ("name", "description", "size", "classes", "accuracy", "origin", "bundled")
    if answer(args, {"models": [{name: getattr(info, name) for name in shown} for info in MODELS.values()]}):
        return 0
    header = ("name", "pixels", "classes", "top-1 %", "weights", "what")
    rows = [(m.name, m.size, m.classes, m.accuracy, m.origin, m.description) for m in MODELS.values()]
    say(table(header, rows, right=(1, 2, 3)))
    say("auto takes resnet50 where a GPU and its weights are at hand, else resnet50-tiny.")
    say("A path to a weights file works as well: a torchvision-style ResNet as .safetensors or weights-only .pth.")
    return 0
