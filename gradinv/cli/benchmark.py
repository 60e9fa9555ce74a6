"""`gradinv benchmark`: how fast an iteration is on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from gradinv.cli.say import figure, listed, numbers, speaker, table

HELP = "measure how fast an iteration is on this machine"
EXAMPLES = """\
examples:
  gradinv benchmark                                        autograd and the fastest way, for 1, 4 and 8 pictures
  gradinv benchmark --batch-sizes 4,8,16,32,48 --threads 2 --out speed
  gradinv benchmark --batch-sizes 8 --micro-batches 0,4,2  what micro-batches cost in time
  gradinv benchmark --seeds 2,4 --parallel-seeds 1,0       seeds one after the other and side by side

In each round all variants do some iterations in turn, and a matrix product is timed with them: whatever else the
machine does meets them all. Given are medians and, in brackets, the lowest and highest of the rounds. The share is that
of the product's rate, counting only what a variant computes itself.

exit codes: 0; 2 bad use; 130 stopped by Ctrl-C, with nothing kept
"""
GONE = {
    "--breaching": "gradinv evaluate compare times other people's attacks beside ours",
    "--memory": "gradinv invert --json prints the peak_memory_mb of a run",
    "--profile": "torch.profiler shows what an iteration spends its time on",
    "--random-weights": "speed does not depend on the weights, so name any weights file with --model",
}
"""Options that went, and what replaced each."""


def add_arguments(parser: argparse.ArgumentParser, chosen: bool) -> None:
    """What is measured, and how long."""
    options = parser.add_argument_group("what is measured")
    options.add_argument(
        "--model",
        nargs="+",
        default=["resnet18-tiny"],
        metavar="NAME",
        help="one or more names that `gradinv models` lists, or weights files (default: resnet18-tiny)",
    )
    options.add_argument("--image-size", type=int, metavar="PX", help="side of the images (default: the model's own)")
    options.add_argument("--device", default="auto", help="cpu, cuda, … (default: %(default)s)")
    lists: tuple[tuple[str, Any, str], ...] = (
        ("--batch-sizes", (1, 4, 8), "pictures a batch (default: 1,4,8)"),
        ("--seeds", (1,), "seeds (default: 1)"),
        ("--micro-batches", (0,), "images at a time, 0: all (default: 0)"),
        ("--parallel-seeds", (0,), "seeds at a time, 0: as many as a run takes (default: 0)"),
    )
    for flag, default, help in lists:
        options.add_argument(flag, type=partial(numbers, kind=int), default=default, metavar="N,N,…", help=help)
    options.add_argument(
        "--stepping",
        type=lambda text: tuple(word.strip() for word in text.split(",") if word.strip()),
        default=("eager", "auto"),
        metavar="S,S,…",
        help="how a step is executed: eager, traced, graph, or auto for what is fastest (default: eager,auto)",
    )
    options.add_argument("--preset", default="matching", help="paper, matching or demo (default: %(default)s)")
    options.add_argument("--config", metavar="FILE", help="settings as JSON over those of the preset, or a run.json")
    running = parser.add_argument_group("the measurement")
    running.add_argument("--rounds", type=int, default=5, metavar="N", help="repeats of all (default: %(default)s)")
    running.add_argument(
        "--iterations", type=int, default=4, metavar="N", help="iterations of each in a round (default: %(default)s)"
    )
    running.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: its own choice)")
    running.add_argument("--out", metavar="DIR", help="also write benchmark.json to DIR")
    parser.add_argument("--no-memory", action="store_true", help=argparse.SUPPRESS)  # as it always is now
    for flag in GONE:
        parser.add_argument(flag, action=_Gone, nargs=0, help=argparse.SUPPRESS)


class _Gone(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        flag = self.option_strings[0]
        parser.error(f"{flag} is gone: {GONE[flag]}")


def run(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from gradinv import benchmark
    from gradinv.cli.settings import config_from, settings_given
    from gradinv.models import load_model
    from gradinv.recording.stores import DirectoryStore
    from gradinv.types import GradinvError

    if args.threads is not None:
        if args.threads < 1:
            raise GradinvError(f"--threads takes a number of at least 1, not {args.threads}.")
        torch.set_num_threads(args.threads)
    # The settings of the attack are those of the preset; seeds, stepping and micro-batches are lists here.
    config = config_from(args.preset, "", settings_given(argparse.Namespace(config=args.config)))
    store = DirectoryStore(args.out) if args.out is not None else None
    models = {name: load_model(name, device=args.device, image_size=args.image_size) for name in args.model}
    lists = args.batch_sizes, args.seeds, args.stepping, args.micro_batches, args.parallel_seeds
    planned = benchmark.variants(models, config, *lists)
    with tqdm(desc="Measuring", dynamic_ncols=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = benchmark.measure(models, config, planned, args.rounds, args.iterations, progress)
    if store is not None:
        store.write("benchmark.json", json.dumps(result, indent=2).encode())
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    say = speaker(args)
    machine, rate = result["machine"], result["flops_per_second"]
    say(
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads; torch {machine['torch']}. A "
        f"float32 matrix product of {benchmark.PRODUCT} reaches {_in(1e9, rate)} GFLOP/s.\n"
    )
    say(rows_table(result))
    for sentence in remarks(result):
        say(sentence)
    if store is not None:
        say(f"The results are kept in {args.out}.")
    return 0


def rows_table(result: Mapping[str, Any]) -> str:
    """One line a variant."""
    others = list(dict.fromkeys(name for row in result["rows"] for name in row["ratios"]))
    header = ["model", "stepping", "K", "seeds", "at a time", "micro", "ms an iteration", "GFLOP", "share in %"]
    lines = [
        [
            *(row[name] for name in ("model", "stepping", "batch_size", "seeds", "parallel_seeds")),
            row["micro_batch"] or "all",
            _in(1e-3, row["seconds"]),
            figure(row["flops"] / 1e9, 1),
            _in(1e-2, row["share"]),
            *(_in(1, row["ratios"].get(name), 2) for name in others),
        ]
        for row in result["rows"]
    ]
    header += [f"× {name}" for name in others]
    return table(header, lines, range(2, len(header)))


def _in(unit: float, values: Mapping[str, float] | None, digits: int = 0) -> str:
    """A median and in brackets the lowest and the highest, in that unit."""
    if values is None:
        return "–"
    median, low, high = (figure(values[name] / unit, digits) for name in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def remarks(result: Mapping[str, Any]) -> list[str]:
    """The fits, and what did not go as asked."""
    sentences = []
    for fit in result["fits"]:
        micro = f", micro-batches of {fit['micro_batch']}" if fit["micro_batch"] else ""
        sentences.append(
            f"{fit['model']}, {fit['stepping']}, seeds: {fit['seeds']}, {fit['parallel_seeds']} at a time{micro}: "
            f"{1e3 * fit['a']:.0f} ms + {1e3 * fit['b']:.1f} ms × K, off by up to "
            f"{100 * fit['largest_deviation']:.0f} %."
        )
    fallen = [f"{row['stepping']} for {row['batch_size']} images" for row in result["rows"] if row["fell_back"]]
    if fallen:
        sentences.append(f"Autograd had to run {listed(fallen, 'and')}: the figures there are eager's.")
    return sentences
