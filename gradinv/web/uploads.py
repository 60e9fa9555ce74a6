"""Uploads stay in memory, also while they come in."""

from __future__ import annotations

import importlib

import streamlit as st


def keep_in_memory() -> None:
    """Let Streamlit's server hold what it receives in memory.

    Its form parser, Starlette's, would write a file of more than 1 MB to the temporary folder until all of it is there.
    """
    parser = importlib.import_module("starlette.formparsers").MultiPartParser  # comes with Streamlit
    parser.spool_max_size = (st.get_option("server.maxUploadSize") + 1) * 2**20
