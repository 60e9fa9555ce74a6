"""Where downloads and indexes are kept, and how a file is fetched that may have any size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder of that name under GRADINV_CACHE, or else under this platform's cache folder."""
    if chosen := os.environ.get("GRADINV_CACHE"):
        return Path(chosen).expanduser() / name
    import pooch  # slow to import

    return Path(pooch.os_cache("gradinv")) / name


def download(url: str, output: str, most: int, progress: Callable[[int, int | None], None] | None = None) -> int:
    """Fetch a file, and return how many bytes came. `progress` is told that after each part, and the size in all if the
    server states it.

    Raises requests.RequestException, OSError, and ValueError as soon as more than `most` bytes come: the server may
    send anything.
    """
    import requests  # slow to import

    received = 0
    with requests.get(url, stream=True, timeout=(10, 30)) as answer:
        answer.raise_for_status()
        stated = answer.headers.get("Content-Length", "")
        with open(output, "wb") as file:
            for part in answer.iter_content(1 << 18):
                received += len(part)
                if received > most:
                    raise ValueError(f"{url} has more than {most} bytes")
                file.write(part)
                if progress is not None:
                    progress(received, int(stated) if stated.isdecimal() else None)
    return received
