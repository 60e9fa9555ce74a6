"""What an address can ask of a page. What cannot be honoured is said, and taken out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
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
    """What a parameter may be: one of some `options`, else a number, `whole` or not."""

    options: Sequence[str] = ()
    least: float = -math.inf
    most: float = math.inf
    whole: bool = False

    def read(self, given: str) -> str | None:
        """The value as the page's widget has it, None where it has none; a number may be written in another way, as
        0.01 for 1e-2."""
        if given in self.options:
            return given
        value = _number(given)
        if value is None or not math.isfinite(value):
            return None
        if self.options:
            return next((option for option in self.options if _number(option) == value), None)
        if not self.least <= value <= self.most or (self.whole and not value.is_integer()):
            return None
        return f"{value:.0f}" if self.whole else given

    @property
    def means(self) -> str:
        """In words what it takes."""
        if self.options:
            return f"one of {', '.join(self.options)}"
        if self.whole:
            return f"a whole number from {self.least:,} to {self.most:,}"
        return f"a number of at least {self.least:g}"


def whole(least: int, most: int) -> Rule:
    """A whole number."""
    return Rule((), least, most, True)


# Old addresses stay good.
_RENAMED = {f"set_{old}": f"set_{new}" for old, new in RENAMED.items()}
FLAG = Rule(("true", "false"))
_DEFENCES = {name: Rule((lessons.OFF, *strengths)) for name, (_, strengths) in lessons.STRENGTHS.items()}
_LESSON = {
    "network": Rule(lessons.NETWORKS),
    "batch_size": whole(1, lessons.MOST),  # not "size": that is the side of Live's pictures
    "repeats": whole(1, lessons.REPEATS),
    "draw": whole(0, lessons.DRAWS),
}


def _setting(item: dataclasses.Field[object]) -> Rule | None:
    told = item.metadata
    if told["choices"]:
        return Rule(told["choices"])
    if isinstance(item.default, bool):
        return FLAG
    if isinstance(item.default, int):
        return whole(int(told["least"]), 2**53)
    return Rule(least=told["least"]) if isinstance(item.default, float) else None


def rules(page: str) -> dict[str, Rule]:
    """By parameter what the page of that path takes; what it does not name it ignores, or checks itself."""
    if page == "live":
        fields = {f"set_{item.name}": _setting(item) for item in dataclasses.fields(AttackConfig)}
        return {
            **{name: rule for name, rule in fields.items() if rule is not None},
            **_DEFENCES,
            "model": Rule(settings.models()),
            "size": Rule([str(size) for size in settings.MORE_SIZES]),
            "preset": Rule(list(settings.PRESETS)),
            "bn": Rule(list(settings.BN)),
            "start_from": Rule(list(settings.START)),
            "seeds": whole(1, settings.MOST_SEEDS),
            "iterations": whole(1, settings.MOST_ITERATIONS),
            "source": Rule(list(pick.SOURCES)),
            "hide": FLAG,
        }
    layer = {"batch_size": whole(1, layers.MOST), "side": Rule(layers.SIDES), "noise": Rule(layers.NOISE)}
    return {
        "replay": {"mode": Rule(("watch", "guess"))},
        "labels": {**_LESSON, "truth": FLAG},
        "batch": {**_LESSON, **_DEFENCES, "reveal": FLAG, "prior": FLAG, "among": Rule(batch.AMONG)},
        "defences": {**_LESSON, **_DEFENCES, "truth": FLAG},
        "layers": {**_LESSON, **layer},
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
        elif math.isinf(_number(value) or 0):  # on which Streamlit's number inputs fail
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
        return float(text)
    except ValueError:
        return None


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
