"""The page Replay: recorded runs, played in the browser."""

from __future__ import annotations

import streamlit as st


def page() -> None:
    """The whole page."""
    st.title("Replay")
