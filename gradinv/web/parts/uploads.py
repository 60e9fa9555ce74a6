"""Uploads stay in memory, also while they come in, and no longer than they are needed."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import streamlit as st
from PIL import Image
from streamlit import runtime
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.typing import UploadedFile

from gradinv.sources import Picture, from_upload
from gradinv.types import GradinvError
from gradinv.web.parts import markup

LARGEST = 20  # MB of a picture
KINDS = "JPEG, PNG, WebP, BMP, GIF or TIFF"
KEPT_SIDE = 288  # pixels of an upload's shorter side
PRIVACY = (
    "Your pictures stay in this server’s memory for as long as the page and its runs are kept, and are never written "
    "to its disk. Their metadata is dropped."
)


@dataclass(frozen=True)
class Upload:
    """A picture that a visitor has sent, and a name for it that no other has."""

    id: str
    picture: Picture


def pictures(key: str) -> tuple[list[Upload], list[str]] | None:
    """An uploader of pictures; → what has just been sent, and a sentence for each that cannot be used or was changed;
    None where nothing was. The next run of the page has a new uploader, which does not show the files any more."""
    keep_in_memory()
    turn = st.session_state.setdefault(f"{key}_turn", 0)
    files = st.file_uploader(
        f"Pictures ({KINDS}, at most {LARGEST} MB each)",
        accept_multiple_files=True,
        key=f"{key}_{turn}",
        max_upload_size=LARGEST,
    )
    if not files:
        return None
    found: list[Upload] = []
    notices: list[str] = []
    for file in files:
        let_go(file)
        try:
            if file.size > LARGEST * 2**20:
                raise GradinvError(f"{file.name} is larger than {LARGEST} MB; scale the picture down first.")
            picture = from_upload(file.getvalue(), file.name)
            image, notes = picture.load()
            notices += notes
            kept = replace(picture, load=partial(_kept, _shrunk(image)))
            found.append(Upload(secrets.token_hex(8), kept))
        except GradinvError as error:
            notices.append(str(error))
    st.session_state[f"{key}_turn"] = turn + 1
    return found, notices


def tell(notices: Sequence[str]) -> None:
    """Say what came of a choice; several sentences are a list."""
    if len(notices) == 1:
        st.warning(markup.plain(notices[0]))
    elif notices:
        st.warning("\n".join(f"- {markup.plain(notice)}" for notice in notices))


def _shrunk(image: Image.Image) -> Image.Image:
    """As large as the gallery's pictures, which is enough for every network here: sessions share one memory."""
    factor = KEPT_SIDE / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    return image if factor >= 1 else image.resize(size, Image.Resampling.LANCZOS)


def _kept(image: Image.Image) -> tuple[Image.Image, list[str]]:
    return image, []


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
