"""The page Who was in the batch?: the features recovered from the gradient, looked up among many pictures."""

from __future__ import annotations

import streamlit as st

from gradinv.web.guard import guarded


def page() -> None:
    """Everything on the page."""
    with guarded():
        st.header("Who was in the batch?", anchor=False)
