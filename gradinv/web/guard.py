"""Nothing that goes wrong on a page is a traceback there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import streamlit as st

from gradinv.jobs import sentence


@contextmanager
def guarded() -> Iterator[None]:
    """Whatever goes wrong inside is one sentence on the page, and in the log with its traceback.

    A fragment that runs again by itself is outside of the page's guard, so each needs its own.
    """
    try:
        yield
    except Exception as error:
        st.error(sentence(error, "This page"))


def keep_finite() -> None:
    """Drop infinite numbers from the address, on which Streamlit's number inputs fail."""
    given = dict(st.query_params)
    kept = {name: value for name, value in given.items() if not _infinite(value)}
    if kept != given:
        st.query_params.from_dict(kept)
        st.rerun()  # this run's widgets would still be given the old address


def _infinite(value: str) -> bool:
    try:
        return math.isinf(float(value))
    except ValueError:
        return False
