"""The page Labels: which class each minimum of the final layer's gradient gives away."""

from __future__ import annotations

import streamlit as st

from gradinv.web.guard import guarded


def page() -> None:
    """Everything on the page."""
    with guarded():
        st.header("Which labels does a gradient give away?", anchor=False)
