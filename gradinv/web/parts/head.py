"""What a page begins with. In plain Markdown, which is drawn at once: what draws HTML is loaded later."""

from __future__ import annotations

import streamlit as st


def lead(title: str, words: str) -> None:
    """A page's title and what it is about."""
    with st.container(key="lead"):
        st.title(title, anchor=False)
        st.markdown(words)
