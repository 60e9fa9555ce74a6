"""Where a run's files lie: a folder, or memory."""

from __future__ import annotations

import contextlib
import errno
import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from gradinv.paths import reason, replace_whole
from gradinv.types import GradinvError

ZIP_LIMIT = 1_000_000_000  # bytes unpacked


class Store(Protocol):
    """Where a run's files lie. Names are relative with forward slashes; every failure is a GradinvError."""

    def write(self, name: str, data: bytes) -> None:
        """Replace the file as a whole: a reader sees the old or the new content."""

    def append(self, name: str, data: bytes) -> None:
        """Add to the end of the file, which is made where it is not there."""

    def read(self, name: str) -> bytes:
        """The file's content."""

    def remove(self, name: str) -> None:
        """Delete the file, if it is there."""

    def names(self) -> list[str]:
        """All files, sorted."""


class DirectoryStore:
    """A folder. It is made with the first write, so that looking into a folder that is not there leaves no trace."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def __str__(self) -> str:
        return str(self.path)

    def write(self, name: str, data: bytes) -> None:
        with self._writing(name) as target:
            replace_whole(target, lambda part: part.write_bytes(data))

    def append(self, name: str, data: bytes) -> None:
        with self._writing(name) as target, target.open("ab") as file:
            file.write(data)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise GradinvError(f"{self.path / name} cannot be read: {reason(error).lower()}.") from error

    def remove(self, name: str) -> None:
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise GradinvError(f"{self.path / name} cannot be removed: {reason(error).lower()}.") from error

    def names(self) -> list[str]:
        files = (path for path in self.path.rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(path.relative_to(self.path).as_posix() for path in files)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """The path of a file in a folder that is there; while open, what goes wrong is said in one sentence."""
        try:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            yield self.path / name
        except OSError as error:
            said = f"Nothing can be written to {self.path} ({reason(error).lower()}); choose another folder."
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                said = f"The disk of {self.path} is full; free some space or choose another folder."
            raise GradinvError(said) from error


class MemoryStore:
    """A run that lives in memory only. One thread may write while others read."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self._files: dict[str, bytes] = dict(files or {})

    def __str__(self) -> str:
        return "The run in memory"

    def write(self, name: str, data: bytes) -> None:
        self._files[name] = bytes(data)

    def append(self, name: str, data: bytes) -> None:
        self._files[name] = self._files.get(name, b"") + data

    def read(self, name: str) -> bytes:
        try:
            return self._files[name]
        except KeyError as error:
            raise GradinvError(f"{self} holds no {name}.") from error

    def remove(self, name: str) -> None:
        self._files.pop(name, None)

    def names(self) -> list[str]:
        return sorted(self._files.copy())

    def copy(self) -> MemoryStore:
        """All files as they are now, in another store."""
        return MemoryStore(self._files.copy())

    def zip(self) -> bytes:
        """All files as a zip archive; pictures are compressed already, so they are stored as they are."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, data in sorted(self._files.copy().items()):
                compressed = not name.endswith((".webp", ".png"))
                archive.writestr(name, data, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
        return packed.getvalue()

    @classmethod
    def unpack(cls, path: str | Path) -> MemoryStore:
        """The inverse of `zip`, from a file. Raises GradinvError for what is none, or unpacks to more than a run."""
        try:
            with zipfile.ZipFile(Path(path).expanduser()) as archive:
                if sum(item.file_size for item in archive.infolist()) > ZIP_LIMIT:
                    raise GradinvError(f"{path} unpacks to more than {ZIP_LIMIT / 1e6:.0f} MB; unpack it yourself.")
                return cls({item.filename: archive.read(item) for item in archive.infolist() if not item.is_dir()})
        except OSError as error:
            raise GradinvError(f"{path} cannot be read: {reason(error).lower()}.") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise GradinvError(f"The recorded run {path} is not a complete zip file ({error}).") from error
