"""Write files atomically, and `FileImageStore`, the default `ImageStore`."""

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO, Final

import anyio.to_thread

from nanobanana_async.saved import SavedImage

_TOKEN_BYTES: Final = 8
"""Random bytes in the name of a partial file."""
_NO_FOLDER_FSYNC: Final = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""Errors of file systems that cannot sync a folder. SQLite ignores them, too. EIO remains an error."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write *data* to *path* durably, and replace an existing file. Missing folders are created. Blocking.

    Raises:
        OSError: The file could not be written. No partial file remains.
    """
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path, *, is_durable: bool = True) -> Generator[BinaryIO]:
    """Yield a new file that replaces *path* when the block ends without an error. Blocking.

    *is_durable* false leaves the moment of writing to the system: an fsync of megabytes delays those of a ledger.

    Its name cannot be guessed, and links are not followed: in a shared folder, another user could point one at a file
    of ours.

    Raises:
        OSError: The file could not be written. No partial file remains.
    """
    with _partial_file(path) as (file, part):
        yield file
        _finish(file, is_durable=is_durable)
        part.replace(path)
    if is_durable:
        _sync_folder(path.parent)


def write_new(path: Path, data: bytes) -> Path:
    """Write *data* to *path* durably, and return it. A file of other contents is left alone, and another name returned.

    Missing folders are created. Blocking.

    Raises:
        OSError: The file could not be written. No partial file remains.
    """
    with _partial_file(path) as (file, part):
        file.write(data)
        _finish(file)
        number, target = 1, path
        while not _move_new(part, target):
            if _has_contents(target, data):
                part.unlink()
                break
            number += 1
            target = path.with_stem(f"{path.stem}-{number}")
    _sync_folder(path.parent)
    return target


@contextlib.contextmanager
def _partial_file(path: Path) -> Generator[tuple[BinaryIO, Path]]:
    """Yield a new file beside *path*, and its name. It is removed if the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(_TOKEN_BYTES)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(part, flags, 0o666), "wb") as file:
            yield file, part
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _finish(file: BinaryIO, *, is_durable: bool = True) -> None:
    file.flush()
    if is_durable:
        os.fsync(file.fileno())
    file.close()  # Windows does not rename an open file


def _move_new(part: Path, path: Path) -> bool:
    """Rename *part* to *path*. Return False if *path* exists."""
    try:
        path.hardlink_to(part)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists() or path.is_symlink():
            return False
        part.replace(path)
    else:
        part.unlink()
    return True


def _has_contents(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def _sync_folder(folder: Path) -> None:
    """Make a rename in *folder* durable, where the platform can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(descriptor)


def remove_partial_files(folder: Path) -> None:
    """Remove partial files of a killed process from *folder*. Blocking. Call it while no other writer is active."""
    for part in folder.glob(f".{'[0-9a-f]' * 2 * _TOKEN_BYTES}.part"):
        part.unlink(missing_ok=True)


class FileImageStore:
    """Stores images as files of *folder*.

    *replace* says whether a file that exists is replaced. Otherwise another name is taken.
    """

    def __init__(self, folder: Path, *, replace: bool = True) -> None:
        self.folder: Final = folder
        self._replace = replace

    async def put(self, name: str, data: bytes) -> SavedImage:
        """Write the file *name* atomically and durably. Cancelling waits for the write, which takes milliseconds."""
        return await anyio.to_thread.run_sync(self._put, self.folder / name, data)

    def _put(self, path: Path, data: bytes) -> SavedImage:
        digest = hashlib.sha256(data).hexdigest()
        if self._replace:
            write_atomic(path, data)
        else:
            path = write_new(path, data)
        return SavedImage(path=path, sha256=digest, size_bytes=len(data))
