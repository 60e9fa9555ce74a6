"""`gradinv evaluate`: the paper's tables and more, on any model and image folder."""

from __future__ import annotations

import argparse
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradinv.cli.invert import signals_set
from gradinv.cli.say import complain, figure, numbers, speaker, table
from gradinv.cli.task import add_normalisation

if TYPE_CHECKING:
    from gradinv.config import AttackConfig
    from gradinv.evaluation.ledger import Ledger
    from gradinv.evaluation.plan import Row
    from gradinv.models import Model

HELP = "measure the attack on many batches: the paper's tables, defences, other people's attacks"
EXAMPLES = """\
evaluations:
  labels      Table 1: the share of labels that each method restores, distinct and repeated
  ablation    Table 2: gradient only, + fidelity, + group, lazy and registered; and with the gradient off
  matching    Table 5: gradients compared by l2 and by cosine
  identify    which pictures of the whole folder were in the batch, from the gradient alone
  ingredients what the attack below the solved layers loses without each of its parts
  batch-size  quality, IIP and how far the layers are solved for K = 1 to 48
  defences    quality, labels and identification behind each defence
  compare     the public package breaching and ours, side by side (needs the extra gradinv[compare])

examples:
  gradinv evaluate labels --imagenet val --model resnet18-tiny
  gradinv evaluate ablation --imagenet val --model resnet18-tiny --seeds 4 --iterations 300 --workers 2
  gradinv evaluate compare --imagenet val --model resnet18-tiny --batch-size 8 --iterations 300 --seeds 4
  gradinv evaluate ablation --imagenet val --model resnet50 --preset paper --batch-size 8   the paper's setting

Every finished batch is kept at once; the same command goes on where it stopped. The folder of the evaluation holds
results.csv, results.json and figure.html. Batches come from the earlier half of each class's sorted files: settings
are tuned on the later half (--half tune) only.

exit codes: 0; 2 bad use; 1 some batches failed; 130 stopped by Ctrl-C, with what was measured kept
"""

EVALUATIONS = ("labels", "ablation", "matching", "identify", "ingredients", "batch-size", "defences", "compare")

DEFENCES = (
    *("none", "clip:1", "noise:1e-3", "noise:1e-2", "dp:1,8,1e-5"),
    *("prune:0.9", "prune:0.99", "quantise:8", "quantise:4", "quantise:1"),
)
BATCH_SIZE = 4


def add_arguments(parser: argparse.ArgumentParser, chosen: bool) -> None:
    """The options of all evaluations, with the attack's settings where this is the command that was `chosen`."""
    parser.add_argument("evaluation", metavar="EVALUATION", choices=EVALUATIONS, help=", ".join(EVALUATIONS))
    options = parser.add_argument_group("what is measured")
    options.add_argument("--imagenet", metavar="DIR", help="a folder in ImageNet layout (else: GRADINV_IMAGENET)")
    options.add_argument(
        "--half",
        choices=("report", "tune", "all"),
        default="report",
        help="which half of each class's sorted files batches are drawn from: the earlier one, which nothing was tuned "
        "on, the later one, or both (default: %(default)s)",
    )
    options.add_argument("--batches", type=int, metavar="N", help="how many batches (default: 8; labels 1000)")
    options.add_argument(
        "--batch-size", type=int, metavar="K", help=f"pictures a batch, where it is fixed (default: {BATCH_SIZE})"
    )
    options.add_argument(
        "--sizes",
        type=partial(numbers, kind=int),
        metavar="K,K,…",
        help="the batch sizes of labels, identify and batch-size",
    )
    options.add_argument(
        "--defences",
        nargs="+",
        metavar="TEXT",
        help=f"the defences of identify and defences, several at once joined by + (default: {' '.join(DEFENCES)})",
    )
    options.add_argument(
        "--rows",
        nargs="+",
        metavar="NAME",
        help="only these rows of the table (* stands for anything); the others can be measured into the same folder",
    )
    options.add_argument("--lpips", action="store_true", help="also LPIPS (its weights are downloaded on first use)")
    running = parser.add_argument_group("the run")
    running.add_argument(
        "--model", default="auto", help="a name that `gradinv models` lists, or a weights file (default: %(default)s)"
    )
    running.add_argument("--image-size", type=int, metavar="PX", help="side of the images (default: the model's own)")
    running.add_argument("--device", default="auto", help="cpu, cuda, … (default: %(default)s)")
    add_normalisation(running)
    running.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share the CPU (default: %(default)s)"
    )
    running.add_argument(
        "--preset", help="paper, matching or demo (default: demo; matching for the ablation and matching evaluations)"
    )
    running.add_argument("--config", metavar="FILE", help="settings as JSON over those of the preset, or a run.json")
    running.add_argument("--out", metavar="DIR", help="folder of the results (default: evaluations/<name>-<model>)")
    if chosen:
        from gradinv.cli.settings import add_settings

        add_settings(parser)


def run(args: argparse.Namespace) -> int:
    from gradinv.cli.settings import config_from, settings_given
    from gradinv.evaluation.ledger import Ledger
    from gradinv.evaluation.plan import ABOUT_MATCHING, EXPERIMENTS, Plan
    from gradinv.models import load_model
    from gradinv.types import GradinvError

    say = speaker(args)
    name: str = args.evaluation
    experiment = EXPERIMENTS[name]
    _check_options(args)
    settings = settings_given(args)
    folder = args.imagenet or os.environ.get("GRADINV_IMAGENET")
    if not folder:
        raise GradinvError("Which pictures? Name a folder in ImageNet layout with --imagenet DIR.")
    if args.workers < 1:
        raise GradinvError(f"--workers takes a number of processes of at least 1, not {args.workers}.")
    model = load_model(args.model, device=args.device, image_size=args.image_size, mean=args.mean, std=args.std)
    preset = args.preset or ("matching" if name in ABOUT_MATCHING else "demo")
    config = config_from(preset, model.name, settings)
    plan = Plan(
        command=name,
        model=args.model if args.model != "auto" else model.name,
        imagenet=str(folder),
        rows=_rows(args, config, several="seeds" in settings and config.seeds > 1),
        batches=experiment.batches if args.batches is None else args.batches,
        seed=config.seed,
        half=args.half,
        image_size=args.image_size,
        mean=args.mean,
        std=args.std,
        device=str(model.device),
        lpips=args.lpips,
    )
    out = Path(args.out or Path("evaluations") / f"{name}-{model.name}")
    ledger = Ledger(out, plan, model)
    if there := len(plan.tasks) - len(ledger.missing):
        say(f"{there} of {len(plan.tasks)} parts are in {out} already.")

    stop = threading.Event()
    with signals_set(stop) as received:
        _measure(ledger, model, args.workers, stop)
    _report(args, ledger, experiment.metrics)
    left = len(ledger.missing)
    if left and received:
        done = len(plan.tasks) - left
        return complain(
            f"Stopped after {done} of {len(plan.tasks)} parts; they are kept in {out}, and the same command goes on.",
            128 + received[0],
        )
    say(f"The results are kept in {out}.")
    if left:
        return complain(f"{left} of {len(plan.tasks)} parts failed; the same command tries them again.", 1)
    return 0


def _report(args: argparse.Namespace, ledger: Ledger, columns: Sequence[str]) -> None:
    """Write and print the result, and what could not be measured."""
    say = speaker(args)
    result = ledger.write()
    note = ledger.draw()
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        say(_heading(result))
        say("")
        say(results_table(result, columns))
        if gains := gains_table(result):
            say("")
            say(gains)
        for row in result["rows"] if args.evaluation == "defences" else ():
            say(f"{row['defence']}: {' '.join(row['notes'])}")
        say("")
    if note:
        say(note)
    for row, batch in ledger.missing:
        if sentence := ledger.errors.get((row.name, batch)):
            say(f"{row.name}, batch {batch}: {sentence}")


def _check_options(args: argparse.Namespace) -> None:
    """Raises GradinvError for options that the evaluation does not have."""
    from gradinv.evaluation.plan import EXPERIMENTS
    from gradinv.types import GradinvError

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
    from gradinv.evaluation import plan

    sizes = plan.EXPERIMENTS[args.evaluation].sizes if args.sizes is None else args.sizes
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


def _measure(ledger: Ledger, model: Model, workers: int, stop: threading.Event) -> None:
    """Do what is missing, with how far it is and the time left on the standard error where that is a terminal."""
    from tqdm import tqdm

    from gradinv.evaluation.running import measure

    total = len(ledger.plan.tasks)
    with (
        tqdm(desc="gallery", unit="picture", dynamic_ncols=True, disable=None, leave=False, delay=1) as pictures,
        tqdm(
            desc=ledger.plan.command,
            total=total,
            initial=total - len(ledger.missing),
            unit="part",
            dynamic_ncols=True,
            disable=None,
        ) as bar,
    ):

        def report(done: int, of: int) -> None:
            pictures.total = of
            pictures.update(done - pictures.n)

        try:
            for row, batch in measure(ledger, model, workers=workers, stop=stop, report=report):
                bar.set_postfix_str(f"{row.name}, batch {batch}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            if not stop.is_set():
                raise


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
    from gradinv.evaluation.plan import COLUMNS

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
    return table(header, cells, numbers=range(1, len(header)))


def gains_table(result: Mapping[str, Any]) -> str:
    """What each row gains over the one that it is compared with, paired by batch; empty where no row is."""
    from gradinv.evaluation.plan import COLUMNS
    from gradinv.evaluation.table import GAINS

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
    return table(("paired gain of", "by its", "in", "is", "over"), lines, numbers=[3])


def _cell(mean: float | None, error: float | None, digits: int) -> str:
    if mean is None or not math.isfinite(mean):
        return "–"
    return figure(mean, digits) + ("" if error is None else f" ± {figure(error, digits)}")
