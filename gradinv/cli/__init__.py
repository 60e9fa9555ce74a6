"""The command `gradinv`: `arguments` says what it takes, and a module for each command does the work.

Exit codes: 0, 2 for bad use (nothing was run), 1 for a run that failed, 130 for Ctrl-C and 143 for SIGTERM with the run
kept. Results go to the standard output, progress, notes and errors to the standard error where `--json` is given.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from gradinv.cli.arguments import parser
from gradinv.cli.say import complain, diagnosis


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. → its exit code; mistakes in the arguments themselves exit with 2, as argparse does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters is no reason to fail
    args = parser().parse_args(argv)
    args.output = sys.stdout
    try:
        # What a command says is for people: aside, where the output is for a machine.
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            # Only now is torch imported, in seconds in which Ctrl-C may come.
            code: int = import_module(f"gradinv.cli.{args.command}").run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has gone (as `head` does): nothing is left to say, also at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stopped:
        return complain(str(stopped) or "Interrupted; nothing was kept.", 130)  # whoever kept something says so
    except Exception as error:
        if args.debug:
            raise
        return complain(*diagnosis(error))
