"""The command `gradinv`: one module a command.

Exit codes: 0, 2 for bad use (nothing was run), 1 for a run that failed, 130 for Ctrl-C and 143 for SIGTERM with the run
kept. Results go to the standard output, progress, notes and errors to the standard error where `--json` is given.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from gradinv import __version__
from gradinv.cli import benchmark, evaluate, head, identify, invert, models, recover, replay
from gradinv.cli.say import complain, diagnosis

# Each module has HELP, EXAMPLES, `add_arguments(parser, chosen)` and `run(args)`. torch takes seconds to import: only
# the `chosen` command, the one that was typed, may need it for its arguments.
COMMANDS: dict[str, Any] = {
    "benchmark": benchmark,
    "evaluate": evaluate,
    "head": head,
    "identify": identify,
    "invert": invert,
    "models": models,
    "recover": recover,
    "replay": replay,
}

DESCRIPTION = """\
Turn the gradient that a client of federated learning shares back into the pictures behind it.
"""

EXAMPLES = """\
examples:
  gradinv invert goldfish tabby lion coffee --model resnet18-tiny --seeds 1
  gradinv identify --observation client.safetensors --imagenet val
  gradinv recover goldfish tabby --model resnet18-tiny
  gradinv replay runs/20250131-120000-resnet18-tiny --gif consensus.gif
  gradinv models

"gradinv invert --help" lists every setting of the attack.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. → its exit code; mistakes in the arguments themselves exit with 2, as argparse does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters is no reason to fail
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        # Within, because the settings of the attack import torch: seconds in which Ctrl-C may come.
        return _run(_parser(command).parse_args(argv))
    except KeyboardInterrupt:
        return complain("Interrupted; nothing was kept.", 130)


def _run(args: argparse.Namespace) -> int:
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has gone (as `head` does): nothing is left to say, also at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        return complain(*diagnosis(error))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage, which for some commands fills a screen."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"invalid int value: ('.*')", r"a whole number is expected, not \1", message)
        message = re.sub(r"invalid float value: ('.*')", r"a number is expected, not \1", message)
        sys.exit(complain(f"{message[0].upper()}{message[1:]}; {self.prog} --help tells more.", 2))


def _parser(chosen: str | None) -> argparse.ArgumentParser:
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
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=module.EXAMPLES,
            parents=[common],
            formatter_class=layout,
            allow_abbrev=False,
        )
        added.set_defaults(run=module.run, command=name)
        module.add_arguments(added, name == chosen)
    return parser
