"""`gradinv evaluate`: the paper's tables and more, on any model and image folder."""

from __future__ import annotations

import argparse
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gradinv.cli.arguments import BATCH_SIZE, DEFENCES
from gradinv.cli.progress import counted, signals_set
from gradinv.cli.say import answer, complain, figure, say, table
from gradinv.cli.settings import config_from, settings_given
from gradinv.config import AttackConfig
from gradinv.evaluation import plan
from gradinv.evaluation.ledger import Ledger
from gradinv.evaluation.plan import ABOUT_MATCHING, COLUMNS, EXPERIMENTS, Plan, Row
from gradinv.evaluation.running import measure
from gradinv.evaluation.table import GAINS
from gradinv.models import load_model
from gradinv.types import GradinvError


def run(args: argparse.Namespace) -> int:
    name: str = args.evaluation
    _check_options(args)
    settings = settings_given(args)
    folder = args.imagenet or os.environ.get("GRADINV_IMAGENET")
    if not folder:
        raise GradinvError("Which pictures? Name a folder in ImageNet layout with --imagenet DIR.")
    model = load_model(args.model, device=args.device, image_size=args.image_size, mean=args.mean, std=args.std)
    preset = args.preset or ("matching" if name in ABOUT_MATCHING else "demo")
    config = config_from(preset, model.name, settings)
    planned = Plan(
        command=name,
        model=args.model if args.model != "auto" else model.name,
        imagenet=str(folder),
        rows=_rows(args, config, several="seeds" in settings and config.seeds > 1),
        batches=EXPERIMENTS[name].batches if args.batches is None else args.batches,
        seed=config.seed,
        half=args.half,
        image_size=args.image_size,
        mean=args.mean,
        std=args.std,
        device=str(model.device),
        lpips=args.lpips,
    )
    out = Path(args.out or Path("evaluations") / f"{name}-{model.name}")
    ledger = Ledger(out, planned, model)
    total = len(planned.tasks)
    if there := total - len(ledger.missing):
        say(f"{there} of {total} parts are in {out} already.")

    stop = threading.Event()
    with signals_set(stop) as received:
        _measure(ledger, args.workers, stop)
    _report(args, ledger)
    left = len(ledger.missing)
    if left and received:
        return complain(
            f"Stopped after {total - left} of {total} parts; they are kept in {out}, and the same command goes on.",
            128 + received[0],
        )
    say(f"The results are kept in {out}.")
    if left:
        return complain(f"{left} of {total} parts failed; the same command tries them again.", 1)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises GradinvError for options that the evaluation does not have."""
    experiment = EXPERIMENTS[args.evaluation]
    if args.sizes is not None and not experiment.sizes:
        raise GradinvError(
            f"--sizes does not go with {args.evaluation}, whose batches have one size; use --batch-size."
        )
    if args.batch_size is not None and experiment.sizes:
        raise GradinvError(f"--batch-size does not go with {args.evaluation}, which has several; use --sizes.")
    if args.defences is not None and not experiment.defences:
        raise GradinvError(f"--defences does not go with {args.evaluation}; it has none.")


def _rows(args: argparse.Namespace, config: AttackConfig, *, several: bool) -> tuple[Row, ...]:
    sizes = EXPERIMENTS[args.evaluation].sizes if args.sizes is None else args.sizes
    size = BATCH_SIZE if args.batch_size is None else args.batch_size
    defences = tuple(DEFENCES if args.defences is None else args.defences)
    rows: dict[str, Callable[[], tuple[Row, ...]]] = {
        "labels": lambda: plan.label_rows(sizes),
        "ablation": lambda: plan.ablation_rows(config, size),
        "matching": lambda: plan.matching_rows(config, size),
        "identify": lambda: plan.identification_rows(sizes, defences),
        "ingredients": lambda: plan.ingredient_rows(config, size),
        "batch-size": lambda: plan.size_rows(config, sizes),
        "defences": lambda: plan.defence_rows(config, size, defences),
        "compare": lambda: plan.comparison_rows(config, size, several=several),
    }
    made = rows[args.evaluation]()
    return made if args.rows is None else plan.chosen_rows(made, args.rows)


def _measure(ledger: Ledger, workers: int, stop: threading.Event) -> None:
    """Do what is missing, with how far it is and the time left on the standard error where that is a terminal."""
    total = len(ledger.plan.tasks)
    done = total - len(ledger.missing)
    with (
        counted(desc="gallery", unit="picture", leave=False, delay=1) as report,
        tqdm(desc=ledger.plan.command, total=total, initial=done, unit="part", dynamic_ncols=True, disable=None) as bar,
    ):
        try:
            for row, batch in measure(ledger, workers=workers, stop=stop, report=report):
                bar.set_postfix_str(f"{row.name}, batch {batch}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            if not stop.is_set():
                raise


def _report(args: argparse.Namespace, ledger: Ledger) -> None:
    """Write and print the result, and what could not be measured."""
    result = ledger.write()
    note = ledger.draw()
    if not answer(args, result):
        say(f"{_heading(result)}\n\n{results_table(result, EXPERIMENTS[args.evaluation].metrics)}")
        if gains := gains_table(result):
            say(f"\n{gains}")
        for row in result["rows"] if args.evaluation == "defences" else ():
            say(f"{row['defence']}: {' '.join(row['notes'])}")
        say("")
    if note:
        say(note)
    for row, batch in ledger.missing:
        if sentence := ledger.errors.get((row.name, batch)):
            say(f"{row.name}, batch {batch}: {sentence}")


def _heading(result: Mapping[str, Any]) -> str:
    config = result["config"]
    rows = result["rows"]
    most = max((row["n"] for row in rows), default=0)
    pictures = {
        "report": "the earlier half of each class's files, which nothing was tuned on",
        "tune": "the later half of each class's files, which settings are tuned on",
        "all": "all files of each class",
    }[config["half"]]
    batches = f"{most} batch" if most == 1 else f"{most} batches"
    return f"{result['command']}: {config['model']['name']}, {batches} of {pictures}; mean ± standard error"


def results_table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """One line a row: mean ± standard error of the metrics `names` that anything was measured of."""
    rows = result["rows"]
    shown = [name for name in names if any(row["mean"].get(name) is not None for row in rows)]
    header = ["", "batches", *(COLUMNS[name].title for name in shown)]
    cells = [
        [
            row["name"],
            row["n"],
            *(_cell(row["mean"].get(name), row["stderr"].get(name), COLUMNS[name].digits) for name in shown),
        ]
        for row in rows
    ]
    return table(header, cells, right=range(1, len(header)))


def gains_table(result: Mapping[str, Any]) -> str:
    """What each row gains over the one that it is compared with, paired by batch; empty where no row is."""
    lines = []
    for row in result["rows"]:
        for name in GAINS:
            if gain := row.get("gain", {}).get(name):
                digits = COLUMNS[name].digits
                sign = "+" if gain["mean"] >= 0 else "−"
                shown = f"{sign}{_cell(abs(gain['mean']), gain['stderr'], digits)}"
                lines.append((row["name"], row["judged"], name.upper(), shown, gain["over"]))
    if not lines:
        return ""
    return table(("paired gain of", "by its", "in", "is", "over"), lines, right=[3])


def _cell(mean: float | None, error: float | None, digits: int) -> str:
    if mean is None or not math.isfinite(mean):
        return "–"
    return figure(mean, digits) + ("" if error is None else f" ± {figure(error, digits)}")
