"""The table of an evaluation, and its figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gradinv import metrics
from gradinv.evaluation.plan import COLUMNS, EXPERIMENTS, TIMING, Plan, Row, Values, defences_of

GAINS = ("psnr", "ssim")
"""The metrics whose gains over another row are stated."""


def summarise(plan: Plan, values: Mapping[tuple[str, int], Values]) -> list[dict[str, Any]]:
    """The table: by row its name, the number of batches `n`, and by metric `mean` and `stderr` over them.

    `stderr` is the standard error of the mean, s/√n; None for a single batch. A mean is None where a batch has no
    number: what is left out of a mean would pass unnoticed. `gain` is the mean of the differences to another row,
    batch by batch, with their standard error, over the batches that both have.
    """
    rows = {row.name: row for row in plan.rows if row.name != TIMING}
    found = {
        name: {batch: values[name, batch] for batch in range(plan.batches) if (name, batch) in values} for name in rows
    }
    timed = [values[key] for key in sorted(values) if key[0] == TIMING]
    table = []
    for name, row in rows.items():
        columns: dict[str, list[float | None]] = {}
        for one in found[name].values():
            for metric, value in one.items():
                columns.setdefault(metric, []).append(value)
        if any(one.peer for one in plan.rows):
            columns["seconds_per_iteration"] = [one.get(name) for one in timed]
        entry: dict[str, Any] = {
            "name": name,
            "n": len(found[name]),
            "mean": {metric: metrics.mean(column) for metric, column in columns.items()},
            "stderr": {metric: standard_error(column) for metric, column in columns.items()},
            "batch_size": row.batch_size,
            "judged": row.judged,
            "defence": row.defence,
            "notes": [defence.note for defence in defences_of(row.defence)],
            "series": row.series,
        }
        if gains := {metric: gain for metric in GAINS if (gain := _gain(metric, row, rows, found))}:
            entry["gain"] = gains
        table.append(entry)
    return table


def _gain(
    metric: str, row: Row, rows: Mapping[str, Row], found: Mapping[str, Mapping[int, Values]]
) -> dict[str, Any] | None:
    """The paired gain of a row over the best of those it is compared with, or None where there is nothing to pair."""

    def judged(name: str) -> dict[int, float | None]:
        key = f"consensus_{metric}" if name in rows and rows[name].judged == "consensus" else metric
        return {batch: values.get(key) for batch, values in found.get(name, {}).items()}

    best: dict[str, Any] | None = None
    own = judged(row.name)
    for other in row.over:
        theirs = judged(other)
        pairs = [(own[batch], theirs[batch]) for batch in own if batch in theirs]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if not pairs or len(differences) < len(pairs):
            continue
        mean = metrics.mean(differences)
        if best is None or mean < best["mean"]:
            best = {"over": other, "n": len(pairs), "mean": mean, "stderr": standard_error(differences)}
    return best


def standard_error(values: Sequence[float | None]) -> float | None:
    """s/√n with the sample standard deviation s (n − 1); None for fewer than two values or where one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or len(known) < len(values):
        return None
    return statistics.stdev(known) / math.sqrt(len(known))


def figure(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The table as a Plotly figure with standard errors: lines over the batch size where rows have one, else bars.

    Raises ImportError without plotly.
    """
    from plotly.subplots import make_subplots

    from gradinv.figures import COLOURS

    experiment = EXPERIMENTS[plan.command]
    panels = [
        (title, [name for name in names if any(row["mean"].get(name) is not None for row in rows)])
        for title, names in experiment.panels
    ]
    panels = [(title, names) for title, names in panels if names]
    drawn = make_subplots(rows=max(1, len(panels)), cols=1, subplot_titles=[title for title, _ in panels])
    series = list(dict.fromkeys(row["series"] for row in rows))
    for place, (_, names) in enumerate(panels, 1):
        for index, (name, one) in enumerate((name, one) for one in series for name in names):
            chosen = [row for row in rows if row["series"] == one and row["mean"].get(name) is not None]
            label = " ".join(part for part in (COLUMNS[name].title, one) if part)
            error = {"type": "data", "array": [row["stderr"].get(name) or 0 for row in chosen]}
            common = {"name": label, "legendgroup": label, "error_y": error}
            colour = COLOURS[index % len(COLOURS)]
            y = [row["mean"][name] for row in chosen]
            if experiment.sizes:
                x = [row["batch_size"] for row in chosen]
                drawn.add_scatter(x=x, y=y, mode="lines+markers", line_color=colour, row=place, col=1, **common)
            else:
                x = [row["name"] for row in chosen]
                drawn.add_bar(x=x, y=y, marker_color=colour, row=place, col=1, **common)
    if experiment.sizes:
        drawn.update_xaxes(title_text="batch size", type="log", tickvals=sorted({row["batch_size"] for row in rows}))
    note = f"{plan.command}: mean ± standard error over {max((row['n'] for row in rows), default=0)} batches"
    return drawn.update_layout(
        title=note, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", height=120 + 320 * max(1, len(panels))
    )
