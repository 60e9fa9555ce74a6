"""`gradinv models`: the networks that can be attacked."""

from __future__ import annotations

import argparse
import json

from gradinv.cli.say import table

HELP = "list the networks that can be attacked"
EXAMPLES = ""


def add_arguments(parser: argparse.ArgumentParser, chosen: bool) -> None:
    """It has none of its own."""


def run(args: argparse.Namespace) -> int:
    from gradinv.models import MODELS

    if args.json:
        shown = ("name", "description", "size", "classes", "accuracy", "origin", "bundled")
        rows = [{name: getattr(info, name) for name in shown} for info in MODELS.values()]
        print(json.dumps({"models": rows}, indent=2))
        return 0
    header = ("name", "pixels", "classes", "top-1 %", "weights", "what")
    print(
        table(
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
