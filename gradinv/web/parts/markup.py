"""HTML of the pages' own elements, as strings. No Streamlit.

Everything is on one line, since st.markdown takes it for Markdown after a line break, and every text is escaped here.
st.markdown patches its elements in place: a picture whose address changes is swapped without flicker.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gradinv.sources import Credit

KNOWN = (
    "the network with all its weights",
    "the gradient of the batch's mean loss",
    "the batch size",
    "the input size and how pictures are scaled and normalised",
)
UNKNOWN = (
    "the pictures",
    "their classes, until it reads them from the gradient",
    "which part of the gradient comes from which picture",
)

COLUMNS = 8  # tiles side by side at most


@dataclass(frozen=True)
class Tile:
    """A picture as a data URI (None: hidden) with its alternative text and what stands below it."""

    uri: str | None
    alt: str
    caption: str = ""
    note: str = ""
    mark: bool | None = None


@dataclass(frozen=True)
class Row:
    """A named row of tiles."""

    name: str
    tiles: Sequence[Tile]
    note: str = ""


def result(settings: Mapping[str, Any]) -> tuple[str, str]:
    """What the result of an attack with these settings is called, and what it is: one seed is its own consensus."""
    matched = any(settings[weight] for weight in ("gradient", "activations", "features"))
    if settings["seeds"] > 1:
        whole, note = "Consensus", "mean of the seeds"
        note += ", aligned to each other" if settings["registration"] != "lazy" else ""
    else:
        whole, note = "Rebuilt", "from the gradient" if matched else "from the labels alone"
    return whole, note + ("; a learned prior helped" if settings["start"] == "decoder" else "")


# To the top of the page, once for each name that is put in: the browser executes what is new to it.
TO_TOP = "<script>document.querySelector('[data-testid=stMain]').scrollTo(0, 0) // {}</script>"
# Where what had the focus is gone: once for each `{0}`, as soon as the button of the key `{1}` is there. Whoever has
# just opened the page had none.
FOCUS = """<script>(() => {{
  if (!navigator.userActivation?.hasBeenActive) return;
  let tries = 0;
  const timer = setInterval(() => {{
    const button = document.querySelector('.st-key-{1} button');
    if (!button && ++tries < 50) return;
    clearInterval(timer);
    if (document.activeElement === document.body) button?.focus({{preventScroll: true}});
  }}, 100);
}})() // {0}</script>"""


TERMS = {
    "PSNR": "Peak signal-to-noise ratio, in decibels: how near the pixels are to the original’s. 10 dB more is a tenth "
    "of the squared error. It rewards blur.",
    "SSIM": "Structural similarity: how alike edges and textures are, from 0 to 1 for the same picture.",
    "BN": "Batch normalisation: a network’s layers keep the mean and spread of what they saw in training.",
    "consensus": "The mean of what the seeds have come to, aligned first where that is set.",
    "seed": "One attempt, from its own random start. Several attempts agree on what is in the gradient.",
    "maxpool": "The network’s first layer, after which it keeps the largest of each few neighbours: the last to be "
    "solved before the picture itself.",
    "residual": "The share of the last layer’s gradient that the recovered features leave unexplained. Near 0, such as "
    "9e-7, they are right; behind noise it grows.",
    "constant colour": "One flat colour, the best for each picture: what shows nothing, as a measure for the PSNR.",
}
"""Words that are explained where a reader points at them."""

_TERM = re.compile(rf"\b({'|'.join(map(re.escape, TERMS))})\b", re.IGNORECASE)


def explained(text: str) -> str:
    """A text as HTML, the first word of it that `TERMS` has with its explanation."""

    def mark(found: re.Match[str]) -> str:
        meaning = next(told for name, told in TERMS.items() if name.lower() == found[0].lower())
        return f'<abbr class="gi-term" tabindex="0" title="{escape(meaning)}">{found[0]}</abbr>'

    return _TERM.sub(mark, escape(text), count=1)


def board(rows: Sequence[Row], judged: str = "restored") -> str:
    """Rows of pictures, one below the other in the same order; on a phone, and beyond 8 pictures, each row wraps.
    `judged` is what a mark says that a tile was, rightly or wrongly."""
    batch = len(rows[0].tiles)
    kind = f"gi-n{batch}" if batch <= COLUMNS else "gi-many"
    return f'<div class="gi-board {kind}">' + "".join(_row(row, judged) for row in rows) + "</div>"


def _row(row: Row, judged: str) -> str:
    note = f"<span>{escape(row.note)}</span>" if row.note else ""
    return f'<div class="gi-label"><b>{explained(row.name)}</b>{note}</div>' + "".join(
        _tile(tile, judged) for tile in row.tiles
    )


def _tile(tile: Tile, judged: str) -> str:
    if tile.uri is None:
        picture = f'<div class="gi-hidden" role="img" aria-label="{escape(tile.alt)}">?</div>'
    else:
        picture = f'<img src="{tile.uri}" alt="{escape(tile.alt)}" width="128" height="128">'
    caption = ""
    if tile.caption or tile.note:
        note = f"<small>{escape(tile.note)}</small>" if tile.note else ""
        marked = "" if tile.mark is None else mark(tile.mark, f"{judged} correctly:", f"{judged} wrongly:")
        caption = f"<figcaption>{marked}{escape(tile.caption)}{note}</figcaption>"
    return f'<figure class="gi-tile">{picture}{caption}</figure>'


def mark(right: bool, yes: str = "restored correctly:", no: str = "restored wrongly:") -> str:
    """A check or a cross, with the words that say which to those who hear it."""
    sign, word, kind = ("✓", yes, "right") if right else ("✗", no, "wrong")
    return f'<span class="gi-{kind}" role="img" aria-label="{word}">{sign}</span> '


def card(uri: str, alt: str, caption: str, credit: Credit | None, origin: str) -> str:
    """A picture of the batch with its class and who made it, or its origin where that is all that is known."""
    author = f"<small>{credit_line(credit) if credit is not None else escape(origin)}</small>"
    return (
        f'<figure class="gi-card"><img src="{uri}" alt="{escape(alt)}" width="128" height="128">'
        f"<figcaption>{escape(caption)}{author}</figcaption></figure>"
    )


def credit_line(credit: Credit) -> str:
    """Author, licence with its link, and whether the picture was cropped."""
    return _credited(credit, _link)


def credit_words(credit: Credit) -> str:
    """As `credit_line`, in Markdown."""
    return _credited(credit, _words)


def _credited(credit: Credit, link: Callable[[str | None, str], str]) -> str:
    changed = ", cropped" if "crop" in credit.changes else ""
    return f"{link(credit.source, credit.author)}, {link(credit.licence_url, credit.licence)}{changed}"


def _link(address: str | None, text: str) -> str:
    if address is None or not address.startswith("https://"):
        return escape(text)
    return f'<a href="{escape(address)}" target="_blank" rel="noopener">{escape(text)}</a>'


def _words(address: str | None, text: str) -> str:
    if address is None or not address.startswith("https://"):
        return plain(text)
    return f"[{plain(text)}](<{address}>)"


def plain(text: str) -> str:
    """A text as Markdown shows it letter by letter."""
    return re.sub(r"([\\`*_\[\]<>$~|&]|:(?=\w)|^[#+-])", r"\\\1", text)


def credits(pictures: Iterable[tuple[str, Credit]]) -> str:
    """A list of all authors and licences."""
    lines = "".join(f"<li>{escape(title)}: {credit_line(credit)}</li>" for title, credit in pictures)
    return f'<ul class="gi-credits">{lines}</ul>'


def table(
    head: str | Sequence[str], rows: Iterable[Sequence[str]], kind: str = "", foot: Sequence[str] = (), label: str = ""
) -> str:
    """A table whose cells are HTML. `head` are its columns' names, or its rows as HTML; the `label` names one that
    scrolls for those who hear it."""

    def row(cells: Iterable[str], tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    top = head if isinstance(head, str) else row(map(explained, head), "th")
    body = "".join(map(row, rows))
    region = f' tabindex="0" role="region" aria-label="{label}"' if label else ""
    return (
        f'<div class="gi-scroll"{region}><table class="gi-table{kind and f" {kind}"}"><thead>{top}</thead>'
        f"<tbody>{body}</tbody>{f'<tfoot>{row(foot)}</tfoot>' if foot else ''}</table></div>"
    )


def labels(
    true: Sequence[str] | None, restored: Sequence[str], method: str, confidence: float, *, predicted: bool = False
) -> str:
    """Each true class beside what was restored, wrong ones last: the pairing that restoration itself allows.

    Below them what read the labels, and what share of certainty in [0, 1] it claims. `predicted`: whether some classes
    are only what the network took a picture for. Where nobody knows the true ones, the restored ones alone.
    """
    read = "read from the gradient alone, before any picture is rebuilt. "
    read += f"Read by {escape(method)}, which is {100 * confidence:.0f} % sure of them."
    if true is None:
        numbered = [(str(place), escape(name)) for place, name in enumerate(restored, 1)]
        return f"{table(('Picture', 'Restored'), numbered)}<p>{count(len(restored), 'label')} {read}</p>"
    left, missed, rows = list(restored), [], []
    for name in true:
        if name in left:
            left.remove(name)
            rows.append((escape(name), mark(True) + escape(name)))
        else:
            missed.append(name)
    found = len(rows)
    rows += [(escape(name), mark(False) + escape(wrong)) for name, wrong in zip(missed, left, strict=True)]
    head = ("Label given" if predicted else "True class", "Restored")
    return f"{table(head, rows)}<p>{found} of {len(true)} labels {read}</p>"


def knowledge(more: Iterable[str] = ()) -> str:
    """Two lists: what an attacker knows, with what it knows of this run, and what it does not."""

    def points(title: str, items: Sequence[str], kind: str) -> str:
        lines = "".join(f"<li>{escape(item)}</li>" for item in items)
        return f'<div class="gi-{kind}"><b>{title}</b><ul>{lines}</ul></div>'

    return (
        '<div class="gi-knowledge">'
        + points("An attacker on the server knows", [*KNOWN, *more], "known")
        + points("It does not know", UNKNOWN, "unknown")
        + "</div>"
    )


def results(rows: Sequence[Sequence[str]], mean: Sequence[str], kinds: Sequence[str]) -> str:
    """The final table: per picture class, restored label, PSNR and SSIM of each of the `kinds` and of the baseline."""
    under = "".join(f"<th>{explained(kind)}</th>" for kind in (*kinds, "constant colour"))
    wide = "".join(f'<th colspan="{len(kinds) + 1}">{explained(name)}</th>' for name in ("PSNR in dB", "SSIM"))
    head = f'<tr><th rowspan="2">Class</th><th rowspan="2">Restored label</th>{wide}</tr><tr>{under}{under}</tr>'
    escaped = [[escape(cell) for cell in row] for row in rows]
    return table(head, escaped, "gi-numbers", [escape(cell) for cell in mean], "Final numbers")


def number(value: float, digits: int = 2) -> str:
    """A number of any size in so many significant digits: 0.86, 9.1e-7."""
    return re.sub(r"e([+-])0*", lambda found: f"e{found[1].strip('+')}", f"{value:.{digits}g}")


def facts(items: Sequence[tuple[str, str]]) -> str:
    """Small labelled numbers side by side."""
    return (
        '<dl class="gi-facts">'
        + "".join(f"<div><dt>{explained(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items)
        + "</dl>"
    )


def progress(share: float, left: str, right: str) -> str:
    """A bar that is filled to a share in [0, 1], with a text at each of its ends."""
    percent = round(100 * min(1.0, max(0.0, share)), 1)
    return (
        f'<div class="gi-when"><b>{escape(left)}</b><span>{escape(right)}</span></div>'
        f'<div class="gi-progress" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}" '
        f'aria-label="{escape(left)}"><div style="width:{percent}%"></div></div>'
    )


def acts(parts: Sequence[str]) -> str:
    """Parts of a whole side by side, each as `progress` makes it."""
    return f'<div class="gi-acts">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def duration(seconds: float | None) -> str:
    """Seconds as a reader says them."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def about(seconds: float) -> str:
    """An estimate of seconds, as exact as it can be meant."""
    if seconds < 10:
        return "some seconds"
    if seconds < 55:
        return f"about {5 * round(seconds / 5)} s"
    if seconds < 3570:
        return f"about {max(1, round(seconds / 60))} min"
    return f"about {seconds / 3600:.1f} h"


BASELINE = "PSNR; in brackets the best constant colour"


def beside(value: float | None, baseline: float | None) -> str:
    """A picture's PSNR beside its baseline; a narrow tile breaks between the two."""
    constant = decibel(baseline).removesuffix(" dB")
    return f"{decibel(value)} (constant {constant})".replace(" ", "\u00a0").replace("\u00a0(", " (")


def decibel(value: float | None) -> str:
    """PSNR as a reader wants it."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1f} dB"
