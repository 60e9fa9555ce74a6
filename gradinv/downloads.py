"""Where downloads and indexes are kept, and how a published file gets there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from gradinv.paths import reason, replace_whole
from gradinv.types import GradinvError

Progress = Callable[[int, int | None], None]
"""Told how many bytes have come, and of how many in all where the server states it."""


def cache_folder(name: str) -> Path:
    """The folder of that name under GRADINV_CACHE, or else under this platform's cache folder."""
    import platformdirs

    return Path(os.environ.get("GRADINV_CACHE") or platformdirs.user_cache_dir("gradinv")).expanduser() / name


def address(variable: str, default: str) -> str:
    """The address that an environment variable names, or the default. Raises GradinvError for one not of the web."""
    url = os.environ.get(variable) or default
    if urlsplit(url).scheme not in ("http", "https"):
        raise GradinvError(f"The address in {variable} must begin with https:// or http://, not be {url!r}.")
    return url


def fetch(
    url: str,
    path: Path,
    digest: tuple[str, str],
    most: int,
    *,
    what: str,
    instead: str,
    progress: Progress | None = None,
) -> Path:
    """A published file in the cache, downloaded where it is not there or damaged: → its path.

    `digest` is a hash's name and the first digits of the file's, `most` the bytes that are taken, since a server may
    send anything; what does not fit is not kept. Raises GradinvError, which calls the file `what` and says what to do
    `instead`.
    """
    import requests  # slow to import

    def intact(file: Path) -> bool:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, digest[0]).hexdigest().startswith(digest[1])

    def receive(part: Path) -> None:
        received = 0
        with requests.get(url, stream=True, timeout=(10, 30)) as answer, part.open("wb") as file:
            answer.raise_for_status()
            stated = answer.headers.get("Content-Length", "")
            for chunk in answer.iter_content(1 << 18):
                received += len(chunk)
                if received > most:
                    raise ValueError("too large")
                file.write(chunk)
                if progress is not None:
                    progress(received, int(stated) if stated.isdecimal() else None)
        if not intact(part):
            raise ValueError("another file")

    host = urlsplit(url).netloc
    try:
        if not (path.is_file() and intact(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_whole(path, receive)
        return path
    except requests.HTTPError as error:
        raise GradinvError(f"{what} could not be downloaded ({error}); {instead}.") from error
    except requests.RequestException as error:
        raise GradinvError(f"{what} could not be downloaded from {host}: no connection; {instead}.") from error
    except OSError as error:
        kept = f"{what} could not be kept in {path.parent} ({reason(error)})"
        raise GradinvError(f"{kept}; make room there or set GRADINV_CACHE.") from error
    except ValueError as error:
        raise GradinvError(f"{what} arrived from {host} with other contents than published; {instead}.") from error
