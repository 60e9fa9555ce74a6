"""What every page is made of: its title, HTML, charts; and nothing that goes wrong there is a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import plotly.graph_objects as go
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


def lead(title: str, words: str) -> None:
    """A page's title and what it is about. In plain Markdown, which is drawn at once: what draws HTML is loaded
    later."""
    with st.container(key="lead"):
        st.title(title, anchor=False)
        st.markdown(words)


def html(text: str) -> None:
    """HTML of `markup`."""
    st.markdown(text, unsafe_allow_html=True)


def chart(figure: go.Figure, key: str, alt: str) -> None:
    """A figure without Plotly's own buttons."""
    st.plotly_chart(figure, key=key, config={"displayModeBar": False}, alt=alt)
