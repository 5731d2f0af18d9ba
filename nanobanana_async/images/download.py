"""Pictures from wherever the service put them: whole, checked, and without ever showing the key to anybody."""

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
"""On top of `RetryPolicy.attempts`: right after success a file may answer 404 or 403 for a moment."""
_WRITE_BUFFER_BYTES: Final = 2**18
"""Pieces are gathered to this size before a thread writes them."""


_TOKEN_BYTES: Final = 8
"""Of chance in the name of a file that is not whole."""


class _Target(Protocol):
    """Where the bytes of one try go."""

    async def write(self, chunk: bytes) -> None:
        """Take the next piece."""
        ...

    def discard(self) -> None:
        """Forget what came. Quick enough for the loop, and nothing that could be cancelled half way."""
        ...


T = TypeVar("T")
WriterT = TypeVar("WriterT", bound=_Target)


class _ValidatingWriter:
    """Passes pieces on, refuses what is no picture as soon as that shows, and remembers how it ended."""

    def __init__(self, target: _Target) -> None:
        self._target = target
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
        """Return the format; refuse an empty body, and one that was cut where nothing but its own end could tell."""
        if self.format is None:
            raise _DownloadError(f"not a picture, only {len(self._head)} bytes")
        framed = "content-length" in response.headers or "chunked" in response.headers.get("transfer-encoding", "")
        if not framed and not self._tail.endswith(self.format.trailer):
            raise _DownloadError("the picture was cut off", passing=True)
        return self.format

    def _sniffed(self) -> ImageFormat:
        image_format = sniff(self._head)
        if image_format is None:
            raise _DownloadError("not a PNG, JPEG, WebP or GIF")
        return image_format


class _DownloadError(Exception):
    """Why one try brought no picture; *passing* when another try may."""

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.transient = passing


class _BytesWriter:
    def __init__(self) -> None:
        self.data = bytearray()

    async def write(self, chunk: bytes) -> None:
        self.data += chunk

    def discard(self) -> None:
        self.data.clear()


class _PartFile:
    """A file that gets its name only when it is whole. Disk work happens in threads, never on the loop."""

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
        """Do a step of disk work, in a thread, unless it is all over.

        asyncio's own `task.cancel()` leaves a thread to itself: it may still be writing when `discard` is called.
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
        """Put the whole file in its place, durably."""
        await self._flush()
        await anyio.to_thread.run_sync(self._locked, self._publish, path)
        return SavedImage(path=path, sha256=self._digest.hexdigest(), size_bytes=self._size_bytes)

    def _publish(self, path: Path) -> None:
        os.fsync(self._descriptor)
        self._close()
        self._path.replace(path)
        if os.name == "posix":  # the name itself is durable only when the folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        self._discarded = True
        if self._lock.acquire(blocking=False):  # else the thread that has it comes here when it is done
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
    """Remove what a process that was killed has left half written in *folder*. Blocking; only where nobody writes."""
    for part in folder.glob(f".{'[0-9a-f]' * 2 * _TOKEN_BYTES}.part"):
        part.unlink(missing_ok=True)


class Downloader:
    """Fetches pictures, a bounded number at a time.

    *public_only* tells whether only public addresses may be reached: a URL in an answer must not make us fetch from
    the networks we happen to live in.
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
        """Return the encoded picture.

        Raises:
            ImageError: It could not be fetched within `Timeouts.download_s`, or is no picture we take.
        """
        target, _ = await self._download_with_retries(image, _BytesWriter)
        return bytes(target.data)

    async def save(self, image: GeneratedImage, stem: Path, *, keep_suffix: bool = False) -> SavedImage:
        """Write the picture to *stem* plus the suffix of its true type, or to *stem* itself if *exact*.

        The name appears only when the file is whole; a file that had it is replaced. Missing folders are made.

        Raises:
            ImageError: As `read`, or the disk would not take it.
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
        self, image: GeneratedImage, new_target: Callable[[], WriterT]
    ) -> tuple[WriterT, ImageFormat]:
        async with self._slots if image.data is None else nullcontext():
            deadline_s = anyio.current_time() + self._timeouts.download_s
            attempts = 0
            while True:
                attempts += 1
                try:
                    return await _try_once(new_target, partial(self._stream_into, image, deadline_s=deadline_s))
                except _DownloadError as exc:
                    backoff_s = self._retry.backoff_s(attempts, self._rng)
                    spent = attempts >= self._retry.attempts + _EXTRA_ATTEMPTS
                    if spent or not exc.transient or anyio.current_time() + backoff_s >= deadline_s:
                        raise ImageError(
                            f"{_describe(image)}: {exc}" + f" (tries: {attempts})" * exc.transient
                        ) from None
                await anyio.sleep(backoff_s)

    async def _stream_into(self, image: GeneratedImage, sink: ChunkSink, *, deadline_s: float) -> WireResponse:
        if image.data is None:
            return await self._get_following_redirects(image.url or "", sink, deadline_s)
        await sink(image.data)
        return WireResponse(status=200, headers={"content-length": str(len(image.data))})

    async def _get_following_redirects(self, url: str, sink: ChunkSink, deadline_s: float) -> WireResponse:
        """Get *url*, walking up to three redirects by hand so that each hop is judged like the first."""
        for _ in range(_MAX_REDIRECTS + 1):
            response = await self._get(url, sink, deadline_s)
            if response.status == 200:
                return response
            location = response.headers.get("location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                passing = response.status in (403, 404, 408, 425, 429) or response.status >= 500
                raise _DownloadError(f"the file host answered HTTP {response.status}", passing=passing)
            try:
                target = urljoin(url, location)
            except ValueError:
                raise _DownloadError("the file host redirects to what is no URL") from None
            if url.lower().startswith("https:") and not target.lower().startswith("https:"):
                raise _DownloadError("the file host redirects from https to something less")
            url = target
        raise _DownloadError(f"the file host redirects more than {_MAX_REDIRECTS} times")

    async def _get(self, url: str, sink: ChunkSink, deadline_s: float) -> WireResponse:
        if problem := url_problem(url):
            raise _DownloadError(f"the picture's URL {problem}")
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
                raise _DownloadError("the file host compressed what it was asked to send as it is")
            return response
        raise _DownloadError(failure.reason, passing=not failure.permanent)


async def _try_once(
    new_target: Callable[[], WriterT], deliver: Callable[[ChunkSink], Awaitable[WireResponse]]
) -> tuple[WriterT, ImageFormat]:
    """Return a fresh target, filled and judged; whatever goes wrong, nothing of it stays behind."""
    target = new_target()
    judged = _ValidatingWriter(target)
    try:
        response = await deliver(judged.write)
        return target, judged.finish(response)
    except BaseException:
        target.discard()
        raise


def _describe(image: GeneratedImage) -> str:
    """Name a picture in messages: without the query, which may hold a signature."""
    if image.url is None:
        return "the inline picture"
    return image.url.partition("?")[0][:200]
