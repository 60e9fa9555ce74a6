"""`gradinv benchmark`: how fast an iteration is on this machine, and what memory it takes."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradinv.cli.say import figure, listed, speaker, table

if TYPE_CHECKING:
    from gradinv.benchmark import Load

HELP = "measure how fast an iteration is on this machine, and what memory it takes"
EXAMPLES = """\
examples:
  gradinv benchmark                                        autograd and the fastest way, for 1, 4 and 8 pictures
  gradinv benchmark --model resnet18-tiny --batch-sizes 4,8,16,32,48 --threads 2 --out speed
  gradinv benchmark --batch-sizes 8 --breaching            beside other people's attacks (needs gradinv[compare])
  gradinv benchmark --batch-sizes 8 --micro-batches 0,4,2  what micro-batches cost in time and save in memory
  gradinv benchmark --seeds 2,4 --parallel-seeds 1,0       seeds one after the other and side by side
  gradinv benchmark --batch-sizes 8 --profile              what an iteration spends its time on
  gradinv benchmark --model resnet50 --random-weights --device cuda --stepping eager,traced,graph

In each round all variants do some iterations in turn, and a matrix product is timed with them: whatever else the
machine does meets them all. Given are medians and, in brackets, the lowest and highest of the rounds. The share is that
of the product's rate, counting only what a variant computes itself; "times eager" compares whole iterations. Memory
is the most that a run adds to the loaded network, in a process of its own, beside the estimate that a run starts with.

exit codes: 0; 2 bad use; 130 stopped by Ctrl-C, with nothing kept
"""


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
    options.add_argument("--random-weights", action="store_true", help="need no weights file: draw the weights")
    options.add_argument("--image-size", type=int, metavar="PX", help="side of the images (default: the model's own)")
    options.add_argument("--device", default="auto", help="cpu, cuda, … (default: %(default)s)")
    options.add_argument(
        "--batch-sizes", type=_numbers, default=(1, 4, 8), metavar="K,K,…", help="pictures a batch (default: 1,4,8)"
    )
    options.add_argument("--seeds", type=_numbers, default=(1,), metavar="N,N,…", help="seeds (default: 1)")
    options.add_argument(
        "--stepping",
        type=_words,
        default=("eager", "auto"),
        metavar="S,S,…",
        help="how a step is executed: eager, traced, graph, or auto for what is fastest (default: eager,auto)",
    )
    options.add_argument(
        "--micro-batches", type=_numbers, default=(0,), metavar="N,N,…", help="images at a time, 0: all (default: 0)"
    )
    options.add_argument(
        "--parallel-seeds",
        type=_numbers,
        default=(0,),
        metavar="N,N,…",
        help="seeds at a time, 0: as many as a run takes (default: 0)",
    )
    options.add_argument("--breaching", action="store_true", help="also the attacks of breaching on the same gradient")
    options.add_argument("--preset", default="matching", help="paper, matching or demo (default: %(default)s)")
    options.add_argument("--config", metavar="FILE", help="settings as JSON over those of the preset, or a run.json")
    running = parser.add_argument_group("the measurement")
    running.add_argument("--rounds", type=int, default=5, metavar="N", help="repeats of all (default: %(default)s)")
    running.add_argument(
        "--iterations", type=int, default=4, metavar="N", help="iterations of each in a round (default: %(default)s)"
    )
    running.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: its own choice)")
    running.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="also measure the peak memory"
    )
    running.add_argument("--profile", action="store_true", help="also what an iteration spends its time on")
    running.add_argument("--out", metavar="DIR", help="also write benchmark.json and benchmark.csv to DIR")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers separated by commas are expected, not {text!r}") from error


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def run(args: argparse.Namespace) -> int:
    import torch

    from gradinv import benchmark
    from gradinv.cli.settings import config_from, settings_given
    from gradinv.peers import BREACHING
    from gradinv.recording import DirectoryStore
    from gradinv.types import GradinvError

    if args.threads is not None:
        if args.threads < 1:
            raise GradinvError(f"--threads takes a number of at least 1, not {args.threads}.")
        torch.set_num_threads(args.threads)
    # The settings of the attack are those of the preset; seeds, stepping and micro-batches are lists here.
    settings = settings_given(argparse.Namespace(config=args.config))
    store = DirectoryStore(args.out) if args.out is not None else None
    with contextlib.ExitStack() as open_until_done:
        plan = benchmark.Plan(
            loads=tuple(_loads(args, open_until_done)),
            config=config_from(args.preset, "", settings),
            batch_sizes=args.batch_sizes,
            seeds=args.seeds,
            stepping=args.stepping,
            micro_batches=args.micro_batches,
            parallel_seeds=args.parallel_seeds,
            peers=BREACHING if args.breaching else (),
            rounds=args.rounds,
            iterations=args.iterations,
            memory=args.memory,
            profile=args.profile,
        )
        result = _measured(plan)
    if store is not None:
        store.write("benchmark.json", json.dumps(result, indent=2).encode())
        store.write("benchmark.csv", benchmark.as_csv(result).encode())
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    say = speaker(args)
    say(machine_line(result))
    say("")
    say(rows_table(result))
    for sentence in remarks(result):
        say(sentence)
    for row in result["rows"]:
        if "profile" in row:
            say("")
            say(f"{row['model']}, {row['batch_size']} pictures, {row['stepping']}:")
            say(profile_table(row["profile"]))
    if store is not None:
        say(f"The results are kept in {args.out}.")
    return 0


def _loads(args: argparse.Namespace, stack: contextlib.ExitStack) -> list[Load]:
    from gradinv.benchmark import random_weights
    from gradinv.models import load_model

    names = args.model
    if args.random_weights:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = [str(random_weights(name, folder)) for name in names]
    return [partial(load_model, name, device=args.device, image_size=args.image_size) for name in names]


def _measured(plan: Any) -> dict[str, Any]:
    """How far it is goes to the standard error, and only where that is a terminal."""
    from tqdm import tqdm

    from gradinv.benchmark import measure

    with tqdm(desc="Measuring", dynamic_ncols=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return measure(plan, progress)


def machine_line(result: Mapping[str, Any]) -> str:
    """What was measured on, and what a matrix product reaches there."""
    machine, matmul = result["machine"], result["matmul"]
    where = f"{machine['cpu']}, {machine['logical_cores']} cores, {machine['threads']} threads"
    if machine["device"] != "cpu":
        where = f"{machine['device']}, {where}"
    rate = matmul["flops_per_second"]
    return (
        f"{where}; torch {machine['torch']}. A {matmul['precision']} matrix product of {matmul['size']} reaches "
        f"{_in(1e9, rate)} GFLOP/s."
    )


def rows_table(result: Mapping[str, Any]) -> str:
    """One line a variant."""
    rows = result["rows"]
    several = len({row["model"] for row in rows}) > 1
    micro = any(row["micro_batch"] for row in rows)
    others = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    parallel = any(row["parallel_seeds"] > 1 for row in rows)
    header = [*(["model"] if several else []), "K", "seeds", *(["at a time"] if parallel else []), "stepping"]
    header += ["micro"] if micro else []
    header += ["ms an iteration", "GFLOP", "GFLOP/s", "share in %", *(f"× {name}" for name in others)]
    header += ["MB", "estimated"]
    lines = []
    for row in rows:
        cells = [*([row["model"]] if several else []), row["batch_size"], row["seeds"]]
        cells += [*([row["parallel_seeds"]] if parallel else []), row["stepping"]]
        cells += [row["micro_batch"] or "all"] if micro else []
        cells += [_in(1e-3, row["seconds"]), figure(row["flops"] / 1e9, 1) if "flops" in row else "–"]
        cells += [_in(1e9, row.get("flops_per_second")), _in(1e-2, row.get("share"))]
        cells += [_in(1, row["ratios"].get(name), 2) for name in others]
        cells += [figure(row["peak_memory_mb"], 0), figure(row.get("estimated_memory_mb"), 0)]
        lines.append(cells)
    words = {"model", "stepping"}
    return table(header, lines, [place for place, name in enumerate(header) if name not in words])


def profile_table(profile: Sequence[Mapping[str, Any]]) -> str:
    """The kinds of operation that take a hundredth of the time or more, and all others in one line."""
    total = sum(entry["seconds"] for entry in profile)
    long = [entry for entry in profile if entry["seconds"] >= 0.01 * total]
    rest = {name: sum(entry[name] for entry in profile if entry not in long) for name in ("calls", "seconds", "flops")}
    lines = []
    for entry in [*long, {"operation": "all others", **rest, "share": None}]:
        share = "–" if entry["share"] is None else figure(100 * entry["share"], 0)
        spent = figure(1e3 * entry["seconds"], 1), figure(100 * entry["seconds"] / total, 0)
        lines.append([entry["operation"], entry["calls"], *spent, figure(entry["flops"] / 1e9, 1), share])
    header = ["operation", "calls", "ms", "% of the time", "GFLOP", "share in %"]
    return table(header, lines, [1, 2, 3, 4, 5])


def _in(unit: float, values: Mapping[str, float] | None, digits: int = 0) -> str:
    """A median and in brackets the lowest and the highest, in that unit."""
    if values is None:
        return "–"
    median, low, high = (figure(values[name] / unit, digits) for name in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def remarks(result: Mapping[str, Any]) -> list[str]:
    """The fits, and what did not go as asked."""
    sentences = [
        f"{fit['model']}, {fit['stepping']}"
        + (f", {fit['seeds']} seeds" if fit["seeds"] > 1 else "")
        + (f", {fit['parallel_seeds']} at a time" if fit["parallel_seeds"] > 1 else "")
        + (f", micro-batches of {fit['micro_batch']}" if fit["micro_batch"] else "")
        + f": {1e3 * fit['a']:.0f} ms + {1e3 * fit['b']:.1f} ms × K, off by up to "
        f"{100 * fit['largest_deviation']:.0f} %."
        for fit in result["fits"]
    ]
    fallen = [f"{row['stepping']} for {row['batch_size']} images" for row in result["rows"] if row.get("fell_back")]
    if fallen:
        sentences.append(f"Autograd had to run {listed(fallen, 'and')}: the figures there are eager's.")
    return sentences
