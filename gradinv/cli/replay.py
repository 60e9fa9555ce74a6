"""`gradinv replay`: what a recorded run found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from gradinv import metrics
from gradinv.animation import gif
from gradinv.cli.say import answer, figure, listed, say, table
from gradinv.prior import FEATURES
from gradinv.recording.replay import Recording
from gradinv.recording.stores import DirectoryStore
from gradinv.types import GradinvError


def run(args: argparse.Namespace) -> int:
    recording = Recording.open(args.directory)
    if args.gif is not None:
        target = Path(args.gif).expanduser()
        if target.suffix.lower() != ".gif":
            raise GradinvError(f"The animation is a GIF; name a file that ends in .gif, not {args.gif}.")
        DirectoryStore(target.parent).write(target.name, gif(recording))
        say(f"The animation is in {target}.")
    run = recording.run
    if answer(args, run):
        return 0
    environment = run["environment"]
    say(f"{run['model']['name']} on {environment['device']}, gradinv {environment['gradinv']}: {run['status']}")
    if "error" in run:
        say(run["error"])
    report(recording)
    return 0


def report(recording: Recording) -> None:
    """Images, terms and costs of a recorded run. A PSNR never stands without that of a constant colour."""
    run = recording.run
    if not recording.steps:
        say("Nothing was recorded of this run yet.")
        return
    say(f"\n{_image_table(recording)}\n")
    if terms := _term_table(recording):
        say(f"{terms}\n")
    if prior := run.get("prior"):
        say(f"{_prior(prior)}\n")
    each = run["seconds_per_iteration"]
    memory = run["peak_memory_mb"]
    say(
        f"{run['iterations']['done']} of {run['iterations']['total']} iterations in {run['seconds']:.1f} s"
        + ("" if each is None else f", {each:.3f} s each")
        + ("" if memory is None else f", at most {memory / 1000:.2f} GB of memory")
        + f"; the pictures of {len(recording.steps)} steps are kept"
    )


def _prior(prior: dict[str, Any]) -> str:
    """What the learned prior painted alone, beside what was found from there."""
    source = "the features" if prior["node"] == FEATURES else f"the activations of {prior['node']}"
    parts = [f"A learned prior painted the first picture from {source} (images/prior_….png)"]
    if prior["metrics"] is not None:
        quality = (metrics.mean(prior["metrics"][name]) for name in ("psnr", "ssim"))
        parts.append("alone it has a PSNR of {} dB and an SSIM of {}".format(*map(figure, quality, (2, 3))))
    parts.append(f"what was found agrees with it to {figure(prior['agreement_psnr'], 2)} dB")
    painted, found = prior["misfit"]["painted"], prior["misfit"]["found"]
    parts += [f"misfit ({name}): {figure(painted[name], 4)} painted, {figure(found[name], 4)} found" for name in found]
    return "; ".join(parts) + "."


def _image_table(recording: Recording) -> str:
    run = recording.run
    true, restored = run["labels"]["true"], run["labels"]["restored"]
    if true is None:
        return table(("#", "restored"), [(i, recording.class_name(label)) for i, label in enumerate(restored)])
    measured, note = run["metrics"], ""
    if measured is None:
        measured, note = _measured_on_frames(recording), "\n(measured on the last recorded frame, which is lossy)"
    # Runs of earlier versions were recorded without them.
    extra = [name for name in ("fft2d", "lpips") if name in measured["consensus"]]
    lpips_absent = "lpips" in extra and not any(isinstance(value, float) for value in measured["consensus"]["lpips"])
    if lpips_absent:
        extra.remove("lpips")
    columns = metrics.columns(measured) + [measured["consensus"][name] for name in extra]
    rows: list[tuple[object, ...]] = []
    for index, (label, place) in enumerate(zip(true, recording.order(), strict=True)):
        name = recording.class_name(restored[place])
        found = name if restored[place] == label else f"{name} (wrong)"
        rows.append((index, recording.class_name(label), found, *(c[index] for c in columns)))
    if len(rows) > 1:
        rows.append(("", "mean", "", *(metrics.mean(column) for column in columns)))
    formatted = [
        (*row[:3], *(figure(value, 2 if place < 3 else 3) for place, value in enumerate(row[3:]))) for row in rows
    ]
    header = ["#", "class", "restored"]
    header += [f"{name} {of}" for name in ("PSNR", "SSIM") for of in ("seeds", "consensus", "constant")]
    header += [name.upper() for name in extra]
    footer = "PSNR in dB; seeds: mean over the seeds; constant: each picture's mean colour, the baseline"
    if extra:
        footer += f"\n{listed([name.upper() for name in extra], 'and')}: distances of the consensus, smaller is nearer"
    if lpips_absent:
        footer += f"\n{metrics.lpips_absent(run['model']['image_size'])}"
    return table(header, formatted, right=range(3, len(header))) + "\n" + footer + note


def _measured_on_frames(recording: Recording) -> dict[str, Any]:
    """The metrics of a run that never ended, as run.json would have them."""
    last, originals = recording.snapshot(recording.steps[-1]), recording.originals()
    if originals is None:
        raise GradinvError(f"{recording.store} lacks its originals; record the run again.")
    true = recording.run["labels"]["true"]

    def measured(images: Tensor) -> dict[str, list[float | None]]:
        return metrics.measure(images[metrics.pair(images, last.labels, originals, true)], originals)

    return {
        "seeds": [measured(pixels) for pixels in last.seeds],
        "consensus": measured(last.consensus),
        "baseline": metrics.measure(metrics.constant_colour(originals), originals),
    }


def _term_table(recording: Recording) -> str:
    """Each term's weighted value and the matching distance, mean over the seeds, at the first and the last record."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for row in recording.curves:
        if any(value is not None for name, value in row.items() if name.endswith(".weighted")):
            rows.setdefault(row["step"], []).append(row)
    if not rows:
        return ""
    ends = sorted({min(rows), max(rows)})
    told = [name for name, value in rows[ends[0]][0].items() if value is not None]  # a distance of matched gradients
    names = [name for name in told if name == "distance" or name.endswith(".weighted")]
    values = [
        (
            name.removesuffix(".weighted"),
            *(figure(metrics.mean([row[name] for row in rows[step]]), 4) for step in ends),
        )
        for name in names
    ]
    header = ("loss term, weighted", *(f"step {step}" for step in ends))
    return table(header, values, right=range(1, 1 + len(ends)))
