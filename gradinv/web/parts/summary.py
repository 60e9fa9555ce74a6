"""A run on paper: one HTML file with its pictures, numbers, settings and credits. No Streamlit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gradinv.sources import Credit
from gradinv.web.parts import markup
from gradinv.web.parts.markup import Row

_STYLE = """
@page { margin: 1.5cm 1.6cm; }
body { font: 11pt/1.45 Georgia, serif; color: #1b2426; max-width: 18cm; margin: 1.2cm auto; padding: 0 0.6cm; }
h1 { font-size: 18pt; margin: 0 0 0.3em; } h2 { font-size: 13pt; margin: 1.3em 0 0.4em; break-after: avoid; }
.gi-board { display: grid; gap: 2mm; grid-template-columns: 2.4cm repeat(var(--n), minmax(0, 3.4cm)); }
.gi-many { grid-template-columns: repeat(8, 1fr); } .gi-many .gi-label { grid-column: 1 / -1; }
.gi-board + .gi-board { margin-top: 2mm; }
.gi-label b, .gi-label span, small { display: block; } .gi-label span, small { font-size: 8.5pt; }
.gi-tile { margin: 0; break-inside: avoid; font-size: 9pt; overflow-wrap: anywhere; }
.gi-tile img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 9.5pt; } tr { break-inside: avoid; }
tfoot { display: table-row-group; } /* once, not on each page */
th, td { text-align: left; padding: 1mm 2mm 1mm 0; border-bottom: 1px solid #b9c4c1; }
.settings { columns: 3; font-size: 9pt; break-inside: avoid; } .settings div { break-inside: avoid; }
.settings dd { margin: 0; } .settings dt { float: left; clear: left; margin-right: 0.5em; font-weight: bold; }
a { color: inherit; } .gi-credits { font-size: 9pt; padding-left: 1.2em; } .gi-credits li { break-inside: avoid; }
@media print {
  body { max-width: none; margin: 0; padding: 0; }
  .gi-credits a::after { content: " (" attr(href) ")"; font-size: 8pt; overflow-wrap: anywhere; }
}
"""
_STYLE += "".join(f".gi-n{count} {{ --n: {count}; }}\n" for count in range(1, markup.COLUMNS + 1))


def document(
    title: str,
    facts: Sequence[tuple[str, str]],
    story: str,
    board: Sequence[Row],
    table: str,
    run: Mapping[str, Any],
    credits: Sequence[tuple[str, Credit]],
) -> bytes:
    """The file's bytes. `story` says what was solved, empty where nothing was; `table` is HTML, empty where nothing was
    measured, everything else is escaped here; `run` is the content of run.json."""
    model, made = run["model"], run["environment"]
    numbers = " · ".join(f"{name}: {value}" for name, value in facts)
    settings = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in run["config"].items())
    measured = (
        f"<h2>Numbers</h2>{table}<p>PSNR rewards blur, so the best constant colour stands beside it.</p>"
        if table
        else ""
    )
    credited = f"<h2>Pictures</h2>{markup.credits(credits)}" if credits else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><p>{escape(numbers)}</p>"
        f"{f'<p>{escape(story)}</p>' if story else ''}{markup.board(board)}{measured}"
        f'<h2>Settings</h2><dl class="settings">{settings}</dl>'
        f"<p>{escape(model['name'])}, weights {escape(str(model['sha256'])[:16])}…; gradinv {escape(made['gradinv'])}, "
        f"torch {escape(made['torch'])}, {escape(made['device'])}.</p>{credited}"
        f"<p>The attack saw {_seen(run['config'])}, never an original. Made to show a risk, with openly licensed "
        "pictures or the maker’s own.</p></body></html>"
    ).encode()


def _seen(config: Mapping[str, Any]) -> str:
    """All that the attack had, in words."""
    parts = ["the gradient", "the weights"]
    if config["bn"] in ("exact", "inferred"):
        parts.append("the batch’s own BN statistics")
    if config["start"] == "decoder":
        parts.append("a first guess learned from public pictures")
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
