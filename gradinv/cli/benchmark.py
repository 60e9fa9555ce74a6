"""`gradinv benchmark`: how fast an iteration is on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import torch

from gradinv import benchmark
from gradinv.cli.progress import counted
from gradinv.cli.say import answer, figure, listed, say, table
from gradinv.cli.settings import config_from, settings_given
from gradinv.models import load_model
from gradinv.recording.stores import DirectoryStore
from gradinv.types import GradinvError


def run(args: argparse.Namespace) -> int:
    if args.threads is not None:
        if args.threads < 1:
            raise GradinvError(f"--threads takes a number of at least 1, not {args.threads}.")
        torch.set_num_threads(args.threads)
    # The settings of the attack are those of the preset; seeds, stepping and micro-batches are lists here.
    config = config_from(args.preset, "", settings_given(args))
    models = {name: load_model(name, device=args.device, image_size=args.image_size) for name in args.model}
    lists = args.batch_sizes, args.seeds, args.stepping, args.micro_batches, args.parallel_seeds
    planned = benchmark.variants(models, config, *lists)
    with counted(desc="Measuring") as progress:
        result = benchmark.measure(models, config, planned, args.rounds, args.iterations, progress)
    if args.out is not None:
        DirectoryStore(args.out).write("benchmark.json", json.dumps(result, indent=2).encode())
    if answer(args, result):
        return 0
    machine, rate = result["machine"], result["flops_per_second"]
    say(
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads; torch {machine['torch']}. A "
        f"float32 matrix product of {benchmark.PRODUCT} reaches {_in(1e9, rate)} GFLOP/s.\n"
    )
    say(rows_table(result))
    for sentence in remarks(result):
        say(sentence)
    if args.out is not None:
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
