"""Where the files that come with the package lie, and how a file is written."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
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


def replace_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Replace a file as a whole by what is saved under another name first: a reader sees the old or the new content.
    Raises what `save` does, and OSError, and leaves no part then."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        save(part)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def reason(error: Exception) -> str:
    """What the system says is wrong, without number and path."""
    return getattr(error, "strerror", None) or str(error)
