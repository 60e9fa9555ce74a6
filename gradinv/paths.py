"""Where the files that come with the package lie."""

from __future__ import annotations

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
