"""Write files atomically, and `FileImageStore`, the default `ImageStore`."""

import errno
import hashlib
import os
import secrets
from pathlib import Path
from typing import Final

import anyio.to_thread

from nanobanana_async.models import SavedImage

_TOKEN_BYTES: Final = 8
"""Random bytes in the name of a partial file."""
_NO_FOLDER_FSYNC: Final = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""Errors of file systems that cannot sync a folder. SQLite ignores them, too. EIO remains an error."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write *data* to *path* durably, and replace an existing file. Missing folders are created. Blocking.

    Raises:
        OSError: The file could not be written. No partial file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(_TOKEN_BYTES)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(part, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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
    """Stores images as files of *folder*."""

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder

    async def put(self, name: str, data: bytes) -> SavedImage:
        """Write the file *name* atomically and durably. Cancelling waits for the write, which takes milliseconds."""
        return await anyio.to_thread.run_sync(self._put, self.folder / name, data)

    def _put(self, path: Path, data: bytes) -> SavedImage:
        digest = hashlib.sha256(data).hexdigest()
        write_atomic(path, data)
        return SavedImage(path=path, sha256=digest, size_bytes=len(data))
