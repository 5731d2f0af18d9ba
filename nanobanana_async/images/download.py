"""Download images: complete, checked, and without sending the key."""

import hashlib
import os
import secrets
import threading
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from random import Random
from typing import Final, Protocol, TypeVar
from urllib.parse import urljoin

import anyio
import anyio.to_thread

from nanobanana_async.errors import ImageError
from nanobanana_async.images.formats import SNIFF_BYTES, ImageFormat, sniff
from nanobanana_async.models import GeneratedImage, SavedImage, url_problem
from nanobanana_async.policies import Limits, RetryPolicy, Timeouts
from nanobanana_async.protocols import ChunkSink, ExchangeError, RequestKind, Transport, WireRequest, WireResponse
from nanobanana_async.transport.checked import send_checked
from nanobanana_async.wire.endpoint import USER_AGENT

_HEADERS: Final = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
_MAX_REDIRECTS: Final = 3
_EXTRA_ATTEMPTS: Final = 2
"""Attempts beyond `RetryPolicy.attempts`, because a new file may return 404 or 403 for a moment."""
_WRITE_BUFFER_BYTES: Final = 2**18
"""Size to which chunks are collected before a thread writes them."""


_TOKEN_BYTES: Final = 8
"""Random bytes in the name of a partial file."""


class _Target(Protocol):
    """A writer for the bytes of one attempt."""

    async def write(self, chunk: bytes) -> None:
        """Write the next chunk."""
        ...

    def discard(self) -> None:
        """Discard the bytes. Fast and without a checkpoint, so that it cannot be cancelled."""
        ...


T = TypeVar("T")
WriterT = TypeVar("WriterT", bound=_Target)


class _ValidatingWriter:
    """Passes chunks on, rejects a file that is not an image, and checks that it is complete."""

    def __init__(self, writer: _Target) -> None:
        self._target = writer
        self._head = b""
        self._tail = b""
        self.format: ImageFormat | None = None

    async def write(self, chunk: bytes) -> None:
        if self.format is None:
            self._head += chunk
            if len(self._head) < SNIFF_BYTES:
                return
            chunk, self.format = self._head, self._sniffed()
        self._tail = (self._tail + chunk[-SNIFF_BYTES:])[-SNIFF_BYTES:]
        await self._target.write(chunk)

    def finish(self, response: WireResponse) -> ImageFormat:
        """Return the format. Raise if the body is empty, or is truncated.

        Without a declared length, the trailer of the format is the only sign of a complete file.
        """
        if self.format is None:
            raise _DownloadError(f"not an image, only {len(self._head)} bytes")
        framed = "content-length" in response.headers or "chunked" in response.headers.get("transfer-encoding", "")
        if not framed and not self._tail.endswith(self.format.trailer):
            raise _DownloadError("the image is truncated", transient=True)
        return self.format

    def _sniffed(self) -> ImageFormat:
        image_format = sniff(self._head)
        if image_format is None:
            raise _DownloadError("not a PNG, JPEG, WebP or GIF")
        return image_format


class _DownloadError(Exception):
    """The reason why one attempt failed. *transient* means that another attempt may succeed."""

    def __init__(self, reason: str, *, transient: bool = False) -> None:
        super().__init__(reason)
        self.transient = transient


class _BytesWriter:
    def __init__(self) -> None:
        self.data = bytearray()

    async def write(self, chunk: bytes) -> None:
        self.data += chunk

    def discard(self) -> None:
        self.data.clear()


class _PartFile:
    """A file that is renamed to its name once it is complete. Disk access happens in threads."""

    def __init__(self, stem: Path) -> None:
        self._stem = stem
        self._path = stem.with_name(f".{secrets.token_hex(_TOKEN_BYTES)}.part")
        self._buffer = bytearray()
        self._descriptor = -1
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        self._lock = threading.Lock()
        self._discarded = False

    async def write(self, chunk: bytes) -> None:
        self._buffer += chunk
        if len(self._buffer) >= _WRITE_BUFFER_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        await anyio.to_thread.run_sync(self._locked, self._write, data)

    def _locked(self, work: Callable[[T], None], argument: T) -> None:
        """Run one disk operation in a thread, unless the file was discarded.

        On asyncio, `task.cancel()` does not wait for a thread, which may still write when `discard` is called.
        """
        with self._lock:
            if not self._discarded:
                work(argument)
        if self._discarded:
            self.discard()

    def _write(self, data: bytes) -> None:
        if self._descriptor < 0:
            self._stem.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._digest.update(data)
        self._size_bytes += len(data)
        while data:
            data = data[os.write(self._descriptor, data) :]

    async def commit(self, path: Path) -> SavedImage:
        """Rename the complete file to *path*, durably."""
        await self._flush()
        await anyio.to_thread.run_sync(self._locked, self._publish, path)
        return SavedImage(path=path, sha256=self._digest.hexdigest(), size_bytes=self._size_bytes)

    def _publish(self, path: Path) -> None:
        os.fsync(self._descriptor)
        self._close()
        self._path.replace(path)
        if os.name == "posix":  # the rename is durable once the folder is synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        self._discarded = True
        if self._lock.acquire(blocking=False):  # else the thread that holds it calls this when it is done
            try:
                self._close()
                self._path.unlink(missing_ok=True)
            finally:
                self._lock.release()

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def remove_partial_files(folder: Path) -> None:
    """Remove partial files of a killed process from *folder*. Blocking. Call it while no other writer is active."""
    for part in folder.glob(f".{'[0-9a-f]' * 2 * _TOKEN_BYTES}.part"):
        part.unlink(missing_ok=True)


class Downloader:
    """Downloads images, a bounded number at a time.

    *public_only* returns whether only public addresses may be contacted, so that a URL in a response cannot reach
    private networks.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        limits: Limits,
        retry: RetryPolicy,
        timeouts: Timeouts,
        public_only: Callable[[], Awaitable[bool]],
    ) -> None:
        self._transport = transport
        self._limits = limits
        self._retry = retry
        self._timeouts = timeouts
        self._public_only = public_only
        self._slots = anyio.Semaphore(limits.max_downloads)
        self._rng = Random()

    async def download(self, image: GeneratedImage) -> bytes:
        """Return the encoded image.

        Raises:
            ImageError: The download did not succeed within `Timeouts.download_s`, or the file is not an image.
        """
        writer, _ = await self._download_with_retries(image, _BytesWriter)
        return bytes(writer.data)

    async def save(self, image: GeneratedImage, stem: Path, *, keep_suffix: bool = False) -> SavedImage:
        """Write the image to *stem* plus the suffix of its true type, or to *stem* itself with *keep_suffix*.

        The file is written atomically and replaces an existing one. Missing folders are created.

        Raises:
            ImageError: The download failed as in `download`, or the file could not be written.
        """
        try:
            file, image_format = await self._download_with_retries(image, partial(_PartFile, stem))
            try:
                path = stem if keep_suffix else stem.with_name(stem.name + image_format.suffix)
                return await file.commit(path)
            finally:
                file.discard()
        except OSError as exc:
            raise ImageError(f"{exc.filename or stem}: cannot be written: {exc.strerror or exc}") from exc

    async def _download_with_retries(
        self, image: GeneratedImage, new_writer: Callable[[], WriterT]
    ) -> tuple[WriterT, ImageFormat]:
        async with self._slots if image.data is None else nullcontext():
            deadline_s = anyio.current_time() + self._timeouts.download_s
            attempts = 0
            while True:
                attempts += 1
                try:
                    return await _try_once(new_writer, partial(self._stream_into, image, deadline_s=deadline_s))
                except _DownloadError as exc:
                    backoff_s = self._retry.backoff_s(attempts, self._rng)
                    spent = attempts >= self._retry.attempts + _EXTRA_ATTEMPTS
                    if spent or not exc.transient or anyio.current_time() + backoff_s >= deadline_s:
                        raise ImageError(
                            f"{_describe(image)}: {exc}" + f" (attempts: {attempts})" * exc.transient
                        ) from None
                await anyio.sleep(backoff_s)

    async def _stream_into(self, image: GeneratedImage, sink: ChunkSink, *, deadline_s: float) -> WireResponse:
        if image.data is None:
            return await self._get_following_redirects(image.url or "", sink, deadline_s)
        await sink(image.data)
        return WireResponse(status=200, headers={"content-length": str(len(image.data))})

    async def _get_following_redirects(self, url: str, sink: ChunkSink, deadline_s: float) -> WireResponse:
        """Get *url* and follow up to three redirects, checking each URL like the first."""
        for _ in range(_MAX_REDIRECTS + 1):
            response = await self._get(url, sink, deadline_s)
            if response.status == 200:
                return response
            location = response.headers.get("location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                transient = response.status in (403, 404, 408, 425, 429) or response.status >= 500
                raise _DownloadError(f"the file host returned HTTP {response.status}", transient=transient)
            try:
                target = urljoin(url, location)
            except ValueError:
                raise _DownloadError("the file host redirects to an invalid URL") from None
            if url.lower().startswith("https:") and not target.lower().startswith("https:"):
                raise _DownloadError("the file host redirects from https to another scheme")
            url = target
        raise _DownloadError(f"the file host redirects more than {_MAX_REDIRECTS} times")

    async def _get(self, url: str, sink: ChunkSink, deadline_s: float) -> WireResponse:
        if problem := url_problem(url):
            raise _DownloadError(f"the image URL {problem}")
        request = WireRequest(
            kind=RequestKind.DOWNLOAD,
            method="GET",
            url=url,
            headers=_HEADERS,
            max_bytes=self._limits.max_image_bytes,
            public_only=await self._public_only(),
        )
        try:
            response = await send_checked(
                self._transport, request, timeout_s=deadline_s - anyio.current_time(), sink=sink
            )
        except ExchangeError as exc:
            failure = exc
        else:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise _DownloadError("the file host compressed the file although identity was requested")
            return response
        raise _DownloadError(failure.reason, transient=not failure.permanent)


async def _try_once(
    new_writer: Callable[[], WriterT], deliver: Callable[[ChunkSink], Awaitable[WireResponse]]
) -> tuple[WriterT, ImageFormat]:
    """Return a new writer that is filled and checked. After an error, discard it."""
    writer = new_writer()
    judged = _ValidatingWriter(writer)
    try:
        response = await deliver(judged.write)
        return writer, judged.finish(response)
    except BaseException:
        writer.discard()
        raise


def _describe(image: GeneratedImage) -> str:
    """Return the name of an image for messages: its URL without the query, which may contain a signature."""
    if image.url is None:
        return "the inline image"
    return image.url.partition("?")[0][:200]
