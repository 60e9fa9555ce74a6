"""What an address can ask of a page. What cannot be honoured is said, and taken out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import streamlit as st

from gradinv.config import RENAMED, AttackConfig
from gradinv.sources import gallery
from gradinv.web.pages import batch, layers
from gradinv.web.parts import lessons, pick, settings, uploads

NOTICES = "address_notices"  # in the session
SHOWN = 40  # letters of a value that are repeated


@dataclass(frozen=True)
class Rule:
    """What a parameter may be: `read` gives the value as the page's widget has it, None where it has none; `means` says
    in words what it takes."""

    read: Callable[[str], str | None]
    means: str


def one_of(options: Sequence[str]) -> Rule:
    """One of some words; a number may be written in another way, as 0.01 for 1e-2."""

    def read(given: str) -> str | None:
        if given in options:
            return given
        value = _number(given)
        return next((option for option in options if value is not None and _number(option) == value), None)

    return Rule(read, f"one of {', '.join(options)}")


def whole(least: int, most: int) -> Rule:
    """A whole number."""

    def read(given: str) -> str | None:
        value = _number(given)
        return f"{value:.0f}" if value is not None and value.is_integer() and least <= value <= most else None

    return Rule(read, f"a whole number from {least:,} to {most:,}")


def at_least(least: float) -> Rule:
    """A number."""

    def read(given: str) -> str | None:
        value = _number(given)
        return given if value is not None and value >= least else None

    return Rule(read, f"a number of at least {least:g}")


# Old addresses stay good.
_RENAMED = {f"set_{old}": f"set_{new}" for old, new in RENAMED.items()}
FLAG = one_of(("true", "false"))
_DEFENCES = {name: one_of((lessons.OFF, *strengths)) for name, (_, strengths) in lessons.STRENGTHS.items()}
_LESSON = {
    "network": one_of(lessons.NETWORKS),
    "batch_size": whole(1, lessons.MOST),  # not "size": that is the side of Live's pictures
    "repeats": whole(1, lessons.REPEATS),
    "draw": whole(0, lessons.DRAWS),
}


def _setting(item: dataclasses.Field[object]) -> Rule | None:
    told = item.metadata
    if told["choices"]:
        return one_of(told["choices"])
    if isinstance(item.default, bool):
        return FLAG
    if isinstance(item.default, int):
        return whole(int(told["least"]), 2**53)
    return at_least(told["least"]) if isinstance(item.default, float) else None


def rules(page: str) -> dict[str, Rule]:
    """By parameter what the page of that path takes; what it does not name it ignores, or checks itself."""
    if page == "live":
        fields = {f"set_{item.name}": _setting(item) for item in dataclasses.fields(AttackConfig)}
        return {
            **{name: rule for name, rule in fields.items() if rule is not None},
            **_DEFENCES,
            "model": one_of(settings.models()),
            "size": one_of([str(size) for size in settings.MORE_SIZES]),
            "preset": one_of(list(settings.PRESETS)),
            "bn": one_of(list(settings.BN)),
            "start_from": one_of(list(settings.START)),
            "seeds": whole(1, settings.MOST_SEEDS),
            "iterations": whole(1, settings.MOST_ITERATIONS),
            "source": one_of(list(pick.SOURCES)),
            "hide": FLAG,
        }
    return {
        "replay": {"mode": one_of(("watch", "guess"))},
        "labels": {**_LESSON, "truth": FLAG},
        "batch": {**_LESSON, **_DEFENCES, "reveal": FLAG, "prior": FLAG, "among": one_of(batch.AMONG)},
        "defences": {**_LESSON, **_DEFENCES, "truth": FLAG},
        "layers": {
            **_LESSON,
            "batch_size": whole(1, layers.MOST),
            "side": one_of(layers.SIDES),
            "noise": one_of(layers.NOISE),
        },
    }.get(page, {})


def honoured(page: str, given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """An address of a page as its widgets take it, and a sentence for each thing in it that cannot be."""
    given = {_RENAMED.get(name, name): value for name, value in given.items()}
    known, notices = rules(page), []
    if "batch_size" in known and "size" in given:  # its old name
        given = {"batch_size": given["size"], **{name: value for name, value in given.items() if name != "size"}}
    kept = dict(given)
    for name, value in given.items():
        if name in known:
            found = known[name].read(value)
            if found is None:
                notices.append(f"The address asks for {name}={_short(value)}, but {name} takes {known[name].means}.")
                del kept[name]
            else:
                kept[name] = found
        elif _infinite(value):  # on which Streamlit's number inputs fail
            notices.append(f"The address asks for {name}={_short(value)}, which no setting takes.")
            del kept[name]
    if page == "live" and (names := given.get("pictures")):
        keys = {picture.key for picture in gallery()}
        missing = [key for key in names.split(".") if key not in keys]
        if missing:
            notices.append(f"The gallery has no picture called {_short(', '.join(missing))}, which the address names.")
            kept["pictures"] = ".".join(key for key in names.split(".") if key in keys)
    return kept, notices


def honour(page: str) -> None:
    """Set the address right before the page of that path is drawn, and say what it asked for in vain."""
    given = st.query_params.to_dict()
    kept, notices = honoured(page, given)
    if kept != given:
        st.session_state[NOTICES] = notices
        st.query_params.from_dict(kept)
        st.rerun()  # this run's widgets would still be given the old address
    uploads.tell(st.session_state.pop(NOTICES, []))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _infinite(text: str) -> bool:
    try:
        return math.isinf(float(text))
    except ValueError:
        return False


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
