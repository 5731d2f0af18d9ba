"""The text of a file of rows, which can be read several times, as lines."""

import codecs
import contextlib
import io
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class FileError(Exception):
    """The file as a whole cannot be read as its type."""


class RowSource:
    """The bytes of a file, which can be read several times. Standard input and pipes are copied to a temporary file."""

    def __init__(self, path: Path, stream: BinaryIO | None) -> None:
        self.path: Final = path
        self.folder: Final = path.parent
        self._copy: BinaryIO | None = None
        if stream is not None:
            self._copy_from(stream)
        elif not stat.S_ISREG(path.stat().st_mode):
            with path.open("rb") as pipe:
                self._copy_from(pipe)
        self._checked = self._version()

    def _copy_from(self, stream: BinaryIO) -> None:
        self._copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        weakref.finalize(self, self._copy.close)
        shutil.copyfileobj(stream, self._copy)

    def open(self) -> BinaryIO:
        """Return the file at its begin, for one reader at a time."""
        if self._copy is None:
            return self.path.open("rb")
        self._copy.seek(0)
        return open(self._copy.fileno(), "rb", closefd=False)

    def is_unchanged(self) -> bool:
        """Return whether the file is the one that was checked. It takes a microsecond."""
        return self._version() == self._checked

    def _version(self) -> tuple[int, int, int] | None:
        if self._copy is not None:
            return None
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


def read_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    """Yield the lines of a text in UTF-8, or in UTF-16 with a byte order mark, as PowerShell writes it. They end in LF.

    Raises:
        FileError: A line has another encoding, or contains control characters.
    """
    is_utf16 = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # type: ignore[attr-defined]  # buffered
    text = io.TextIOWrapper(file, "utf-16" if is_utf16 else "utf-8-sig")
    number = 0
    try:
        for number, line in enumerate(text, start=1):
            if found := _CONTROL.search(line):
                raise FileError(
                    f"line {number} contains the control character {found.group()!r}. The file may have two encodings, "
                    "or UTF-16 without a mark. Save it as UTF-8."
                )
            yield line
    except UnicodeDecodeError:
        raise FileError(_encoding_error(file, path)) from None
    finally:
        with contextlib.suppress(ValueError):  # the file was closed first
            text.detach()


def _encoding_error(file: BinaryIO, path: Path) -> str:
    file.seek(0)
    for number, line in enumerate(file, start=1):
        try:
            line.decode()
        except UnicodeDecodeError as exc:
            return f"line {number} is not UTF-8, got byte {line[exc.start]:#x}. Save the file as UTF-8."
    return f"{path} is not UTF-8. Save the file as UTF-8."
