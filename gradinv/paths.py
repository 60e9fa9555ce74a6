"""Where the files that come with the package lie, and how a file is written."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def _assets() -> Path:
    if chosen := os.environ.get("GRADINV_ASSETS"):
        return Path(chosen).expanduser()
    package = Path(__file__).resolve().parent
    # A wheel carries the assets inside the package; a checkout (and an editable install of it) has them beside it.
    installed = package / "assets"
    return installed if installed.is_dir() else package.parent / "assets"


ASSETS: Path = _assets()
"""Models, sample pictures and class lists: the folder of GRADINV_ASSETS, else the package's, else the checkout's."""


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file as a whole: a reader sees the old or the new content. Raises OSError, and leaves no part then."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
