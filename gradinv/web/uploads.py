"""Uploads stay in memory, also while they come in, and no longer than they are needed."""

from __future__ import annotations

import importlib

import streamlit as st
from streamlit import runtime
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.typing import UploadedFile


def keep_in_memory() -> None:
    """Let Streamlit's server hold what it receives in memory.

    Its form parser, Starlette's, would write a file of more than 1 MB to the temporary folder until all of it is there.
    """
    parser = importlib.import_module("starlette.formparsers").MultiPartParser  # comes with Streamlit
    parser.spool_max_size = (st.get_option("server.maxUploadSize") + 1) * 2**20


def held() -> int:
    """Bytes of all files that visitors have sent and no page has let go yet."""
    files = runtime.get_instance().uploaded_file_mgr
    if not isinstance(files, MemoryUploadedFileManager):
        return 0
    return sum(len(file.data) for own in list(files.file_storage.values()) for file in list(own.values()))


def let_go(file: UploadedFile) -> None:
    """Have the server forget a file that has been read: it would keep each one until its visitor leaves."""
    context = get_script_run_ctx()
    if context is not None and isinstance(context.uploaded_file_mgr, MemoryUploadedFileManager):
        context.uploaded_file_mgr.remove_file(context.session_id, file.file_id)
