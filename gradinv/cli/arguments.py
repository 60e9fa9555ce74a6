"""What each command takes. Nothing here imports torch, which takes seconds: help and mistakes answer at once."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, NoReturn

from gradinv import __version__
from gradinv.cli.say import complain, numbers
from gradinv.cli.settings import add_settings

_Group = argparse._ArgumentGroup | argparse.ArgumentParser

NAMED_MODEL = "a name that `gradinv models` lists, or a weights file"


class Command(NamedTuple):
    """What `gradinv --help` says of a command, what its own help adds, and what it takes."""

    help: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage, which for some commands fills a screen."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"invalid int value: ('.*')", r"a whole number is expected, not \1", message)
        message = re.sub(r"invalid float value: ('.*')", r"a number is expected, not \1", message)
        sys.exit(complain(f"{message[0].upper()}{message[1:]}; {self.prog} --help tells more.", 2))


def parser() -> argparse.ArgumentParser:
    """The command line as a whole: `command` is then the one that was typed."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser("gradinv", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gradinv {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object and nothing else to the output")
    common.add_argument(
        "--debug",
        action="store_true",
        default=os.environ.get("GRADINV_DEBUG", "0") not in ("", "0"),
        help="show the traceback of an error (also: GRADINV_DEBUG=1)",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=command.examples,
            parents=[common],
            formatter_class=layout,
            allow_abbrev=False,
        )
        command.add_arguments(added)
    return parser


# --- what several commands take


def _add_model(group: _Group, default: str = "auto", help: str = f"{NAMED_MODEL} (default: %(default)s)") -> None:
    """The network, and where it runs."""
    group.add_argument("--model", default=default, help=help)
    _add_image_size(group)
    _add_device(group)
    _add_normalisation(group)


def _add_image_size(group: _Group) -> None:
    group.add_argument("--image-size", type=int, metavar="PX", help="side of the images (default: the model's own)")


def _add_device(group: _Group) -> None:
    group.add_argument("--device", default="auto", help="cpu, cuda, … (default: %(default)s)")


def _add_normalisation(group: _Group) -> None:
    """What the network's pixels are normalised by, where that is not as usual."""
    for name, none in (("mean", "0"), ("std", "1")):
        group.add_argument(
            f"--{name}",
            type=_moments,
            metavar="X[,X,X]",
            help=f"{name} that pixels are normalised by, of each channel or one for all; {none} for no normalisation "
            "(default: what the weights file or the observation states, else ImageNet's)",
        )


def _moments(text: str) -> list[float] | float:
    """For argparse, which says what a ValueError is about."""
    values = [float(part) for part in text.split(",")]
    return values[0] if len(values) == 1 else values


_moments.__name__ = "float"  # as argparse calls what is expected


def _add_preset(
    group: _Group, default: str | None, help: str = "paper, matching or demo (default: %(default)s)"
) -> None:
    group.add_argument("--preset", default=default, help=help)
    group.add_argument("--config", metavar="FILE", help="settings as JSON over those of the preset, or a run.json")


def _add_folder(group: _Group) -> None:
    group.add_argument("--imagenet", metavar="DIR", help="a folder in ImageNet layout (else: GRADINV_IMAGENET)")


def _add_client(parser: argparse.ArgumentParser) -> _Group:
    """The client's pictures and what it shares of them. → the group of the latter, for more of its kind."""
    pictures = parser.add_argument_group("the client's pictures")
    pictures.add_argument("images", nargs="*", metavar="IMAGE", help="a picture file, or the name of a gallery picture")
    pictures.add_argument("--samples", type=int, metavar="N", help="draw N pictures from the gallery")
    _add_folder(pictures)
    pictures.add_argument("--random", type=int, metavar="N", help="draw N pictures from that folder")
    pictures.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="how many pictures to draw where none is named (from --imagenet, else the gallery); otherwise a check; of "
        "an observation that has it wrong, how many pictures it is of",
    )
    pictures.add_argument(
        "--class",
        action="append",
        default=[],
        dest="classes",
        metavar="CLASS",
        help="class name or WordNet id of the picture files: once for all, or once for each; by default that of the "
        "file's folder (n01443537), else what the network takes the picture for; beside --observation the labels, "
        "where they are known",
    )
    shared = parser.add_argument_group("what the client shares")
    shared.add_argument(
        "--mode",
        choices=("eval", "train"),
        help="the forward mode of the client's network; in train mode its running statistics after the step are shared "
        "too (default: eval, or train where a setting needs that)",
    )
    shared.add_argument(
        "--defence",
        action="append",
        default=[],
        dest="defences",
        metavar="D",
        help="what the client does to its gradient first, in the order given: none, clip:C (norm), noise:S (standard "
        "deviation), dp:C,E,D (clipped to C, with noise for (E, D)-privacy of the whole batch), prune:P (share), "
        "quantise:B (bits)",
    )
    shared.add_argument(
        "--observation",
        metavar="FILE",
        help="take what was saved by `gradinv invert --save-observation`, or by your own loop, without pictures",
    )
    _add_corrections(shared)
    return shared


def _add_corrections(group: _Group) -> None:
    """What an observation may not say of itself."""
    group.add_argument(
        "--update", action="store_true", help="the observation holds an update −η g, as federated averaging shares it"
    )
    group.add_argument(
        "--label-smoothing",
        type=float,
        metavar="E",
        help="the client's labels are (1 − E) y + E / N (of an observation it is solved for where it is not given)",
    )


# --- benchmark

GONE = {
    "--breaching": "gradinv evaluate compare times other people's attacks beside ours",
    "--memory": "gradinv invert --json prints the peak_memory_mb of a run",
    "--profile": "torch.profiler shows what an iteration spends its time on",
    "--random-weights": "speed does not depend on the weights, so name any weights file with --model",
}
"""Options that went, and what replaced each."""


class _Gone(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        flag = self.option_strings[0]
        parser.error(f"{flag} is gone: {GONE[flag]}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _benchmark(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("what is measured")
    options.add_argument(
        "--model",
        nargs="+",
        default=["resnet18-tiny"],
        metavar="NAME",
        help="one or more names that `gradinv models` lists, or weights files (default: resnet18-tiny)",
    )
    _add_image_size(options)
    _add_device(options)
    for flag, default, help in (
        ("--batch-sizes", (1, 4, 8), "pictures a batch (default: 1,4,8)"),
        ("--seeds", (1,), "seeds (default: 1)"),
        ("--micro-batches", (0,), "images at a time, 0: all (default: 0)"),
        ("--parallel-seeds", (0,), "seeds at a time, 0: as many as a run takes (default: 0)"),
    ):
        options.add_argument(flag, type=partial(numbers, kind=int), default=default, metavar="N,N,…", help=help)
    options.add_argument(
        "--stepping",
        type=_words,
        default=("eager", "auto"),
        metavar="S,S,…",
        help="how a step is executed: eager, traced, graph, or auto for what is fastest (default: eager,auto)",
    )
    _add_preset(options, "matching")
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


# --- evaluate

EVALUATIONS = ("labels", "ablation", "matching", "identify", "ingredients", "batch-size", "defences", "compare")
DEFENCES = (
    *("none", "clip:1", "noise:1e-3", "noise:1e-2", "dp:1,8,1e-5"),
    *("prune:0.9", "prune:0.99", "quantise:8", "quantise:4", "quantise:1"),
)
BATCH_SIZE = 4


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("evaluation", metavar="EVALUATION", choices=EVALUATIONS, help=", ".join(EVALUATIONS))
    options = parser.add_argument_group("what is measured")
    _add_folder(options)
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
    _add_model(running)
    running.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share the CPU (default: %(default)s)"
    )
    _add_preset(
        running, None, "paper, matching or demo (default: demo; matching for the ablation and matching evaluations)"
    )
    running.add_argument("--out", metavar="DIR", help="folder of the results (default: evaluations/<name>-<model>)")
    add_settings(parser)


# --- head


def _head(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    _add_model(
        parser,
        "resnet50-moco",
        f"{NAMED_MODEL} with or without a final layer, also a checkpoint of MoCo (default: %(default)s, downloaded on "
        "first use)",
    )
    tested = parser.add_mutually_exclusive_group()
    tested.add_argument("--val", metavar="DIR", help="a second folder, whose pictures only measure the accuracy")
    tested.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of each class's pictures that only measures the accuracy (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=int, default=100, metavar="N", help="passes over the features, about (default: %(default)s)"
    )
    parser.add_argument(
        "--decay",
        type=float,
        default=100,
        metavar="X",
        help="weight of half the squared norm of the weights against the summed cross-entropy (default: %(default)g)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the held-out share (default: %(default)s)")
    parser.add_argument(
        "--out", metavar="FILE", help="the network, a .safetensors file (default: where --model resnet50-moco finds it)"
    )


# --- identify


def _identify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--observation", metavar="FILE", required=True, help="what the client shared, as Observation.save writes it"
    )
    _add_corrections(parser)
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="how many pictures the observation is of, where it has that wrong"
    )
    parser.add_argument(
        "--imagenet",
        metavar="DIR",
        help="the pictures to search: a folder in ImageNet layout or any other, with the folders in it "
        "(else: GRADINV_IMAGENET, else the bundled pictures)",
    )
    parser.add_argument("--model", default="auto", help=f"{NAMED_MODEL} (default: the one of the observation)")
    _add_device(parser)
    _add_normalisation(parser)
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="how many pictures to name for each (default: %(default)s)"
    )


# --- invert

RECORDS = 100  # at most so many steps of a run are recorded, unless --every says otherwise


def _invert(parser: argparse.ArgumentParser) -> None:
    _add_client(parser).add_argument(
        "--save-observation", metavar="FILE", help="write what the server receives to FILE and end there"
    )
    options = parser.add_argument_group("the run")
    _add_model(options)
    _add_preset(options, "demo")
    options.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/<time>-<model>)")
    options.add_argument(
        "--every", type=int, metavar="N", help=f"record every N steps (default: at most {RECORDS} records)"
    )
    options.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, with its own settings")
    add_settings(parser)


# --- recover


def _recover(parser: argparse.ArgumentParser) -> None:
    _add_client(parser)
    options = parser.add_argument_group("the layers")
    _add_model(options)
    options.add_argument(
        "--boundary",
        default="auto",
        metavar="NODE",
        help="down to where: auto (as far as the gradient determines), a node such as layer2 or layer3.0.conv1, or "
        "logits (the labels and the final layer only) (default: %(default)s)",
    )
    options.add_argument(
        "--labels",
        default="auto",
        metavar="METHOD",
        help="how labels are restored: the methods of `gradinv invert` (default: %(default)s)",
    )
    options.add_argument(
        "--seed", type=int, default=0, metavar="N", help="where all randomness comes from (default: %(default)s)"
    )
    options.add_argument("--out", metavar="FILE", help="write what was solved to a safetensors file")


# --- replay


def _replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="the folder of the run")
    parser.add_argument(
        "--gif", metavar="FILE", help="write the originals and the consensus over the steps as an animated GIF"
    )


# --- what help says

DESCRIPTION = "Turn the gradient that a client of federated learning shares back into the pictures behind it.\n"

EXAMPLES = """\
examples:
  gradinv invert goldfish tabby lion coffee --model resnet18-tiny --seeds 1
  gradinv identify --observation client.safetensors --imagenet val
  gradinv recover goldfish tabby --model resnet18-tiny
  gradinv replay runs/20250131-120000-resnet18-tiny --gif consensus.gif
  gradinv models

"gradinv invert --help" lists every setting of the attack.
"""

BENCHMARK = """\
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

EVALUATE = """\
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

HEAD = """\
examples:
  gradinv head --imagenet imagenet/train --val imagenet/val    MoCo v2; --model resnet50-moco works from then on
  gradinv head --imagenet imagenet/val                         the same with 45,000 pictures, tested on the other 5,000
  gradinv head --imagenet tiny --model backbone.pth --image-size 64 --out mine.safetensors

Each picture's pooled features are computed once and kept: to fit again, with another --decay, takes little time.
Multinomial logistic regression is fitted to them by L-BFGS.
"""

IDENTIFY = """\
examples:
  gradinv identify --observation client.safetensors                 among the bundled pictures, offline
  gradinv identify --observation client.safetensors --imagenet val
  gradinv identify --observation client.safetensors --imagenet photos --top 1 --json

No picture is reconstructed: the final layer's gradient is solved for what the network sees in each picture of the batch
(its pooled features), and all pictures of the folder are ranked by how similar the network finds them. The first call
looks at every picture once and keeps what the network sees, in the folder of GRADINV_CACHE or else in this platform's
cache folder; the next one takes seconds. "gradinv invert IMAGE … --save-observation FILE" makes an observation.

exit codes: 0; 2 bad use; 130 stopped by Ctrl-C, with the index so far kept
"""

INVERT = """\
examples:
  gradinv invert goldfish tabby lion coffee            pictures of the bundled gallery, by name
  gradinv invert holiday.jpg --class "sports car"      a picture of your own and its class
  gradinv invert --samples 4 --seed 7                  four of the gallery, drawn at random
  gradinv invert --imagenet val --random 8             eight of a folder in ImageNet layout (<wnid>/*.JPEG)
  gradinv invert lion --preset paper --iterations 500  the constants of the paper, but fewer steps
  gradinv invert lion --gradient 0 --json              the control without the gradient, for a script
  gradinv invert lion --config runs/old/run.json       the settings of an earlier run
  gradinv invert lion --defence clip:1 --defence quantise:4
                                                       what the client does to its gradient before it shares it
  gradinv invert --observation mine.safetensors        a gradient of your own training loop, nothing else known
  gradinv invert --resume runs/old                     go on with a run that was stopped or killed
  torchrun --nproc-per-node=4 -m gradinv invert lion   the seeds shared out over four processes, each with a GPU if any

exit codes: 0; 2 bad use; 1 the run failed; 130 stopped by Ctrl-C and 143 by SIGTERM, with what was
recorded kept
"""

RECOVER = """\
examples:
  gradinv recover goldfish tabby --model resnet18-tiny
  gradinv recover --samples 8 --boundary layer3.0.conv1 --out layers.safetensors
  gradinv recover lion --defence noise:1e-4 --json
  gradinv recover --observation mine.safetensors

No picture is searched for. The final layer's gradient is solved for the labels and for what the network sees in each
picture, then each layer below it for its input, as long as there are as many equations as unknowns. Columns:
  equations, unknowns   of each channel of the node, which is an activation behind a ReLU
  residual              the share of the equations' right side that is left unexplained
  error, worst          the estimated relative error, the median over the pictures and the largest
  mended                the share of entries of the mask above that were wrong at first and were set right by the
                        residual
  true error            measured on the pictures, where they are known (median): the solver never sees them

exit codes: 0; 2 bad use; 130 stopped by Ctrl-C, with the layers so far kept
"""

COMMANDS = {
    "benchmark": Command("measure how fast an iteration is on this machine", BENCHMARK, _benchmark),
    "evaluate": Command(
        "measure the attack on many batches: the paper's tables, defences, other people's attacks", EVALUATE, _evaluate
    ),
    "head": Command("fit a final layer to a network that has none, on a folder of labelled pictures", HEAD, _head),
    "identify": Command("find the pictures of a batch among many, from its gradient alone", IDENTIFY, _identify),
    "invert": Command("reconstruct pictures from the gradient of their batch", INVERT, _invert),
    "models": Command("list the networks that can be attacked", "", lambda parser: None),
    "recover": Command("solve the layers that a gradient determines, without a search", RECOVER, _recover),
    "replay": Command("show what a recorded run found, or make an animation of it", "", _replay),
}
