"""How the command speaks: text for people, one JSON object for a machine, tables, one sentence an error."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from gradinv.errors import GradinvError

if TYPE_CHECKING:
    from gradinv.types import SolvedNode

AS_GOOD_AS_EXACT = 1e-3
"""The estimated relative error up to which an image's activations are called exact."""


say = partial(print, flush=True)
"""Tell people: on the output, or aside where that is for a machine."""


def answer(args: argparse.Namespace, facts: object) -> bool:
    """Print the one object that a machine asked for with `--json`. → whether one did"""
    if args.json:
        print(json.dumps(facts, indent=2), file=args.output, flush=True)
    return bool(args.json)


def diagnosis(error: BaseException) -> tuple[str, int]:
    """One sentence and the exit code: 2 for what the user can mend, 1 for what nobody foresaw."""
    from gradinv.types import memory_exhausted  # which imports torch

    if isinstance(error, GradinvError):
        return str(error), 2
    if (exhausted := memory_exhausted(error)) is not None:
        return exhausted, 2
    reason = " ".join(str(error).split())
    return f"Unexpected {type(error).__name__}: {reason or 'no reason given'} (--debug shows where).", 1


def complain(sentence: str, code: int) -> int:
    print(f"gradinv: {sentence}", file=sys.stderr)
    return code


def figure(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float | int) else "–"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> str:
    """Aligned columns, those of `right` to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(aligned(row, widths, right) for row in cells)


def aligned(cells: Sequence[str], widths: Sequence[int], right: Sequence[int] = ()) -> str:
    """One row of a table: each cell as wide as its column, those of `right` to the right."""
    filled = (
        cell.rjust(width) if column in right else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(filled).rstrip()


def numbers(text: str, kind: type[int] | type[float] = float) -> tuple[Any, ...]:
    """The values of an option that takes several, separated by commas."""
    try:
        return tuple(kind(number) for number in text.split(",") if number.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers separated by commas are expected, not {text!r}") from error


def listed(words: Sequence[str], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def percent(share: float) -> str:
    """A share in [0, 1] as a reader wants it; what is next to nothing is said to be so."""
    value = 100 * share
    if 0 < value < 0.01:
        return "less than 0.01 %"
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"


def exact(errors: Sequence[float]) -> bool:
    """Whether a layer with these errors, one for each image, is called exact: where at least half of them are."""
    return statistics.median_low(errors) <= AS_GOOD_AS_EXACT


def known(errors: Sequence[float]) -> str:
    """How well a layer with these errors is known, as an adverb."""
    if not exact(errors):
        return f"to within {percent(statistics.median_low(errors))}"
    others = [error for error in errors if error > AS_GOOD_AS_EXACT]
    if not others:
        return "exactly"
    worst = f"to within {percent(max(others))}" if max(others) < 1 else "not at all"
    rest = "the other" if len(others) == 1 else "the others"
    return f"exactly for {len(errors) - len(others)} of {len(errors)} pictures, {rest} {worst}"


def solved_to(nodes: Sequence[SolvedNode]) -> str:
    """How deep the layers are solved, and how well: the lowest that is exact, and the lowest of all."""
    fine = [node for node in nodes if exact(node.error.tolist())]
    ends = dict.fromkeys((*fine[-1:], nodes[-1]))
    return f"down to {listed([f'{node.name} ({known(node.error.tolist())})' for node in ends], 'and')}"
