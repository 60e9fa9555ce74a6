"""The folder of an evaluation: what has been measured, and the plan that it belongs to."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradinv.config import recorded
from gradinv.evaluation.plan import COLUMNS, Plan, Row, Values
from gradinv.evaluation.table import GAINS, figure, summarise
from gradinv.models import Model
from gradinv.recording.stores import DirectoryStore
from gradinv.types import GradinvError


class Ledger:
    """What has been measured so far, in the evaluation's folder; every finished task is kept at once."""

    def __init__(self, folder: str | Path, plan: Plan, model: Model) -> None:
        """Open the folder, which `begin` makes where it is not there.

        A torn last line, as a killed process leaves it, is dropped. Raises GradinvError where the folder holds
        something else, another evaluation, or damaged results.
        """
        self.folder = Path(folder).expanduser()
        self.plan = plan
        self.values: dict[tuple[str, int], Values] = {}
        self.errors: dict[tuple[str, int], str] = {}
        self._store = DirectoryStore(self.folder)
        self.model = model
        self._known: list[dict[str, Any]] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise GradinvError(f"{self.folder} is a file; name a folder with --out.")
        names = self._store.names() if self.folder.is_dir() else []
        if "plan.json" in names:
            self._check(plan.identity(model))
            if "results.jsonl" in names:
                self._read()
        elif names:
            raise GradinvError(f"{self.folder} is not empty and holds no evaluation; name another folder with --out.")

    def begin(self) -> None:
        """Write down what is measured, before the first task, beside the rows that were measured here before."""
        plan = self.plan.identity(self.model)
        names = {row["name"] for row in plan["rows"]}
        rows = [*(row for row in self._known if row["name"] not in names), *plan["rows"]]
        self._store.write("plan.json", json.dumps({**plan, "rows": rows}, indent=2).encode())

    def _check(self, identity: Mapping[str, Any]) -> None:
        try:
            # Older evaluations knew no other normalisation than the network's own.
            known = {"mean": None, "std": None, **json.loads(self._store.read("plan.json"))}
            for row in known["rows"]:
                # A setting that is newer than the evaluation has its default.
                row["config"] = row["config"] and recorded(row["config"])
            # Through JSON, so that both sides are what JSON can hold.
            mine = json.loads(json.dumps(identity))
            rows = {row["name"]: row for row in known["rows"]}
            same = all(rows.get(row["name"], row) == row for row in mine["rows"])
            other = [name for name in mine if known[name] != mine[name] and not (name == "rows" and same)]
        except (ValueError, KeyError, TypeError) as error:
            raise GradinvError(
                f"The plan in {self.folder} is damaged ({error!r}); remove that folder or name another with --out."
            ) from error
        self._known = known["rows"]
        if other:
            raise GradinvError(
                f"{self.folder} holds another evaluation ({_difference(known, mine, other[0])}); repeat its command or "
                "name another folder with --out."
            )

    def _read(self) -> None:
        data = self._store.read("results.jsonl")
        complete = data[: data.rfind(b"\n") + 1]
        if len(complete) < len(data):
            self._store.write("results.jsonl", complete)
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                entry = json.loads(line)
                key = (str(entry["row"]), int(entry["batch"]))
                if "error" in entry:
                    self.errors[key] = str(entry["error"])
                    continue
                self.values[key] = {
                    str(name): None if value is None else float(value) for name, value in entry["values"].items()
                }
                self.errors.pop(key, None)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise GradinvError(
                    f"Line {number} of {self.folder / 'results.jsonl'} is damaged; remove that line and go on."
                ) from error

    @property
    def missing(self) -> list[tuple[Row, int]]:
        """The plan's tasks that have no values yet, in order; those that failed before are among them."""
        return [task for task in self.plan.tasks if (task[0].name, task[1]) not in self.values]

    def add(self, row: Row, batch: int, outcome: Values | str) -> None:
        """Keep a finished task: its values, or the sentence that says why there are none."""
        key, entry = (row.name, batch), {"row": row.name, "batch": batch}
        if isinstance(outcome, str):
            self.errors[key] = outcome
            line = {**entry, "error": outcome}
        else:
            self.values[key] = outcome
            self.errors.pop(key, None)
            line = {**entry, "values": dict(outcome)}
        self._store.append("results.jsonl", json.dumps(line).encode() + b"\n")

    def write(self) -> dict[str, Any]:
        """Write results.json and results.csv of what there is; → the former's content."""
        self.begin()
        rows = summarise(self.plan, self.values)
        result = {"command": self.plan.command, "config": self._config(), "rows": rows}
        self._store.write("results.json", json.dumps(result, indent=2).encode())
        names = [name for name in COLUMNS if any(name in row["mean"] for row in rows)]
        text = io.StringIO()
        writer = csv.writer(text)
        gains = [name for name in GAINS if any(name in row.get("gain", {}) for row in rows)]
        writer.writerow(
            ["row", "n", *(title for name in names for title in (name, f"{name}_stderr"))]
            + [title for name in gains for title in (f"{name}_gain", f"{name}_gain_stderr")]
        )
        for row in rows:
            cells = [value for name in names for value in (row["mean"].get(name), row["stderr"].get(name))]
            for name in gains:
                gain = row.get("gain", {}).get(name, {})
                cells += [gain.get("mean"), gain.get("stderr")]
            writer.writerow([row["name"], row["n"], *cells])
        self._store.write("results.csv", text.getvalue().encode())
        return result

    def _config(self) -> dict[str, Any]:
        return {**self.plan.identity(self.model), "batches": self.plan.batches}

    def draw(self) -> str | None:
        """Write figure.html and figure.json of what there is; → why not, in a sentence, where plotly is missing."""
        try:
            drawn = figure(self.plan, summarise(self.plan, self.values))
        except ImportError:
            return "No figure was drawn, because plotly is not installed (pip install 'gradinv[app]')."
        self._store.write("figure.html", drawn.to_html(include_plotlyjs=True).encode())
        self._store.write("figure.json", drawn.to_json().encode())
        return None


def _difference(known: Mapping[str, Any], mine: Mapping[str, Any], name: str) -> str:
    """In words: the first thing in which two plans differ."""
    if name != "rows":
        here, there = ((item["name"] if name == "model" else item) for item in (mine[name], known[name]))
        return f"{name} {there}, not {here}" if here != there else f"another version of the {name} {here}"
    rows = {row["name"]: _flat(row) for row in known["rows"]}
    for row in mine["rows"]:
        here = _flat(row)
        there = rows.get(row["name"], here)
        if changed := [key for key in here if there.get(key) != here[key]]:
            return f"{changed[0]} {there.get(changed[0])}, not {here[changed[0]]}"
    return "other rows"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's facts and its settings as one mapping."""
    return {**{key: value for key, value in row.items() if key != "config"}, **(row["config"] or {})}
