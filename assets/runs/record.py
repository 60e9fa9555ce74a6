"""Record the runs that the page Replay plays: each by the published command, then packed into one file.

    python assets/runs/record.py [NAME …]

Run it where gradinv is installed; without names it records all. A run that is packed already is left as it is, but for
what is told about it; one that was interrupted goes on where it stood. NAME.zip holds the recording as any run has it,
and about.json: title, story, the command, and whose pictures they are, since the frames show them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradinv.recording.replay import Recording
from gradinv.recording.stores import DirectoryStore, MemoryStore
from gradinv.sources import find, gallery

HERE = Path(__file__).resolve().parent
LIMIT = 4_000_000  # bytes of a packed run; clear pictures take more than blurred ones
FOUR = ("goldfish", "tabby", "lion", "coffee")
EIGHT = (*FOUR, "pizza", "penguin", "bee", "koala")
SIXTEEN = (*EIGHT, "chimpanzee", "bison", "camel", "dragonfly", "goose", "tree-frog", "triumphal-arch", "rocket")


@dataclass(frozen=True)
class Run:
    """A run to record: pictures of the gallery, and the options that differ from the demonstration's."""

    name: str
    title: str
    story: str
    pictures: tuple[str, ...] = FOUR
    options: tuple[str, ...] = ("--seeds", "1")
    model: str = "resnet18-tiny"

    @property
    def arguments(self) -> list[str]:
        return ["invert", *self.pictures, "--model", self.model, *self.options]


# All of the gallery whose classes the networks know, one of each class.
TWENTY_ONE = (*SIXTEEN, "alligator", "eft", "frying-pan", "mantis", "orangutan")

MATCHING = ("--preset", "matching")
GROUP = (*MATCHING, "--seeds", "8", "--iterations", "300", "--group", "1e-5", "--every", "5", "--registration")

# In the order of the page.
RUNS = (
    Run(
        "four",
        "Four pictures",
        "A client shares the mean gradient of four pictures; the server solves the layers from it, then finds pixels.",
        options=("--seeds", "2", "--image-size", "128", "--every", "6"),
    ),
    Run(
        "one",
        "One picture",
        "A single picture: every layer is solved, down to the first one's output.",
        FOUR[:1],
        ("--seeds", "2"),
    ),
    Run(
        "eight",
        "Eight pictures",
        "Eight pictures share one gradient, and all eight come back.",
        EIGHT,
        ("--seeds", "4", "--every", "6"),
    ),
    Run(
        "sixteen",
        "Sixteen pictures",
        "Sixteen pictures share one gradient. What lies below the second stage is no longer exact.",
        SIXTEEN,
        ("--seeds", "2", "--every", "6"),
    ),
    Run(
        "twenty-one",
        "Twenty-one pictures",
        "Twenty-one pictures share one gradient. It still gives away the second stage's output of each.",
        TWENTY_ONE,
        ("--seeds", "1", "--every", "6"),
    ),
    Run(
        "painted",
        "A learned prior",
        "The same twenty-one. A network that learned from public pictures fills in what the gradient leaves open.",
        TWENTY_ONE,
        ("--seeds", "1", "--every", "1", "--start", "decoder"),
    ),
    Run(
        "resnet50",
        "A deeper network",
        "The same four pictures through a ResNet-50 instead of a ResNet-18.",
        options=("--seeds", "4"),
        model="resnet50-tiny",
    ),
    Run(
        "noise",
        "Behind noise",
        "The client adds noise to its gradient before it shares it: the upper layers are still known, roughly.",
        options=("--seeds", "2", "--image-size", "128", "--every", "6", "--defence", "noise:1e-4"),
    ),
    Run(
        "matching",
        "Gradient matching alone",
        "What earlier attacks do: no layer is solved, the pixels are changed until their gradient is the shared one.",
        options=(*MATCHING, "--seeds", "2"),
    ),
    Run(
        "bn-exact",
        "BN statistics leaked",
        "Gradient matching, with the exact batch-normalisation statistics of the client's batch. Here they help no "
        "more than chance.",
        options=(*MATCHING, "--seeds", "1", "--bn", "exact"),
    ),
    Run(
        "bn-none",
        "No BN statistics",
        "Gradient matching without any batch-normalisation statistics.",
        options=(*MATCHING, "--seeds", "1", "--bn", "none"),
    ),
    Run(
        "gradient-off",
        "Without the gradient",
        "A control: only the labels are taken from the gradient; the rest comes from the network alone.",
        options=(*MATCHING, "--seeds", "1", "--gradient", "0", "--features", "0", "--boundary", "loss"),
    ),
    Run(
        "lazy",
        "Eight seeds, averaged",
        "Gradient matching from eight different noises, drawn towards their plain mean.",
        options=(*GROUP, "lazy"),
    ),
    Run(
        "registered",
        "Eight seeds, aligned",
        "The same eight attempts, aligned to each other before they are averaged; nothing lies far from its place.",
        options=(*GROUP, "affine"),
    ),
)


def about(run: Run) -> dict[str, Any]:
    """What the page tells of a run, with a credit for each of its pictures."""
    pictures = [find(gallery(), name) for name in run.pictures]
    return {
        "place": [item.name for item in RUNS].index(run.name),
        "title": run.title,
        "story": run.story,
        "command": " ".join(["gradinv", *run.arguments]),
        "pictures": [{"title": picture.title, **vars(picture.credit)} for picture in pictures if picture.credit],
    }


def record(run: Run, work: Path) -> None:
    """Make HERE/NAME.zip, by way of the folder work/NAME. Raises where the command fails."""
    target = HERE / f"{run.name}.zip"
    if target.exists():
        files = _files(MemoryStore.unpack(target))
        if json.loads(files["about.json"])["command"] != about(run)["command"]:
            sys.exit(f"{target} was made by another command; remove it to record it anew.")
    else:
        folder = work / run.name
        if not _done(folder):
            begun = (folder / "run.json").exists()
            arguments = ["invert", "--resume", str(folder)] if begun else [*run.arguments, "--out", str(folder)]
            if subprocess.run([sys.executable, "-m", "gradinv", *arguments]).returncode:
                sys.exit(f"{run.name} is not done; call this again to go on with it.")
        files = _files(DirectoryStore(folder))
    told = (json.dumps(about(run), indent=2, ensure_ascii=False) + "\n").encode()
    if files.get("about.json") != told:
        packed = MemoryStore({**files, "about.json": told}).zip()
        if len(packed) > LIMIT:
            sys.exit(f"{run.name} takes {len(packed):,} bytes, more than {LIMIT:,}; record fewer steps with --every.")
        target.write_bytes(packed)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    print(f"| `runs/{target.name}` | {digest} |", flush=True)  # as SOURCES.md lists it


def _done(folder: Path) -> bool:
    return (folder / "run.json").exists() and Recording.open(folder).run["status"] == "done"


def _files(store: DirectoryStore | MemoryStore) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.names()}


def main() -> None:
    by_name = {run.name: run for run in RUNS}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(by_name)} (default: all)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs"), help="where runs are recorded (default: %(default)s)"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(by_name):
        parser.error(f"there is no run {min(unknown)}")
    for name in options.names or by_name:
        record(by_name[name], options.work)


if __name__ == "__main__":
    main()
