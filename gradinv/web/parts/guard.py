"""Nothing that goes wrong on a page is a traceback there."""

from __future__ import annotations

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
