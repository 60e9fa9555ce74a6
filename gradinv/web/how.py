"""How it works: the method in pictures that the code itself makes, each equation beside what it does."""

from __future__ import annotations

import streamlit as st

from gradinv.web.guard import guarded


def page() -> None:
    """The whole page."""
    with guarded():
        st.title("How it works")
