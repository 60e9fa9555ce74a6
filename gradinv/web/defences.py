"""The page Defences: what a defence takes from the attacker, and what from the server."""

from __future__ import annotations

import streamlit as st

from gradinv.web.guard import guarded


def page() -> None:
    """Everything on the page."""
    with guarded():
        st.header("What does a defence cost, and what does it hide?", anchor=False)
