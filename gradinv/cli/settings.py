"""The settings of the attack as options: one for each field of AttackConfig."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gradinv.cli.say import numbers
from gradinv.config import RENAMED, AttackConfig, Execution, retired, upgraded
from gradinv.errors import GradinvError

PREFIX = "setting "
"""Before a field's name in the arguments, apart from the other options, whatever it may be called."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One option for each field of AttackConfig; those left out keep the preset's value."""
    attack = parser.add_argument_group("settings of the attack (default: the preset's)")
    execution = parser.add_argument_group("how it is executed (the same result, to rounding)")
    for item in dataclasses.fields(AttackConfig):
        group = execution if item.name in Execution.__dataclass_fields__ else attack
        names = (item.name, *(old for old, new in RENAMED.items() if new == item.name))
        flags = ["--" + name.replace("_", "-") for name in names]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": item.metadata["help"].replace("%", "%%")}
        if isinstance(item.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(item.default, tuple):
            options |= {"type": numbers, "metavar": "S,S,…"}
        elif item.metadata["choices"]:
            options |= {"choices": item.metadata["choices"], "type": partial(_choice, item.name)}
        else:
            options |= {"type": type(item.default), "metavar": "N" if isinstance(item.default, int) else "X"}
        group.add_argument(*flags, dest=PREFIX + item.name, **options)
    # Older versions had it: `from_dict` puts it into tv and tv_chroma.
    attack.add_argument(
        "--tv-luma", dest=f"{PREFIX}tv_luma", type=float, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def _choice(name: str, text: str) -> str:
    if (gone := retired(name, text)) is not None:
        raise argparse.ArgumentTypeError(gone)
    return text


def settings_given(args: argparse.Namespace) -> dict[str, Any]:
    """What is to differ from the preset: the configuration file's settings, then those of the command line."""
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
    given = {name.removeprefix(PREFIX): value for name, value in vars(args).items() if name.startswith(PREFIX)}
    return {**upgraded(settings), **given}


def config_from(preset: str, model: str, settings: Mapping[str, Any]) -> AttackConfig:
    base = AttackConfig.preset(preset, model)
    return AttackConfig.from_dict({**base.to_dict(), **settings})
