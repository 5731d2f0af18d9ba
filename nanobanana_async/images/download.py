"""Download images: complete, checked, bounded in memory, and without sending the key."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from random import SystemRandom
from typing import Final, TypeAlias
from urllib.parse import urljoin

import anyio
import attrs

from nanobanana_async._concurrency.byte_budget import ByteBudget, ByteLease
from nanobanana_async.errors import ImageError, NanoBananaError
from nanobanana_async.images.formats import ImageFormat, read_info, sniff, true_name
from nanobanana_async.models import GeneratedImage, percent_encoded, url_problem
from nanobanana_async.policies import Limits, RetryPolicy, Timeouts
from nanobanana_async.protocols import ExchangeError, ImageStore, RequestKind, Transport, WireRequest, WireResponse
from nanobanana_async.saved import ImageInfo, Mismatch, SavedImage
from nanobanana_async.wire.endpoint import USER_AGENT

_HEADERS: Final = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
_MAX_REDIRECTS: Final = 3
_EXTRA_ATTEMPTS: Final = 2
"""Attempts beyond `RetryPolicy.attempts`, because a new file may return 404 or 403 for a moment."""


Comparison: TypeAlias = Callable[[bytes, ImageInfo, str], Awaitable[tuple[Mismatch, ...]]]
"""Returns in what an encoded image, with its header and the hash of its file, is not as requested."""


class _DownloadError(Exception):
    """The reason why one attempt failed. *transient* means that another attempt may succeed."""

    def __init__(self, reason: str, *, transient: bool = False) -> None:
        super().__init__(reason)
        self.transient = transient


class Downloader:
    """Downloads images, a bounded number and a bounded number of bytes at a time.

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
        memory: ByteBudget,
    ) -> None:
        self._transport = transport
        self._max_image_bytes = limits.max_image_bytes
        self._retry = retry
        self._timeouts = timeouts
        self._public_only = public_only
        self._slots = anyio.Semaphore(limits.max_downloads)
        self._memory = memory
        self._rng = SystemRandom()

    async def download(self, image: GeneratedImage) -> bytes:
        """Return the encoded image.

        Raises:
            ImageError: The download did not succeed within `Timeouts.download_s`, or the file is not an image.
        """
        async with self._opened(image) as (data, _):
            return data

    async def store(
        self, image: GeneratedImage, store: ImageStore, name: str, compare: Comparison | None = None
    ) -> SavedImage:
        """Put the image into *store* as *name*, with the suffix of its true format, and *compare* it.

        Raises:
            ImageError: The download failed as in `download`, or the store did. `__cause__` is its OSError, if any.
        """
        async with self._opened(image) as (data, image_format):
            try:
                saved = await store.put(true_name(name, image_format), data)
            except OSError as exc:
                raise ImageError(f"{exc.filename or name}: cannot be written: {exc.strerror or exc}") from exc
            except NanoBananaError:
                raise
            except Exception as exc:  # a user's store may raise anything
                raise ImageError(f"{name}: the image store failed: {type(exc).__name__}: {exc}") from exc
            info = read_info(data)
            mismatch = () if compare is None or info is None else await compare(data, info, saved.sha256)
            return attrs.evolve(saved, info=info, mismatch=mismatch)

    @asynccontextmanager
    async def _opened(self, image: GeneratedImage) -> AsyncGenerator[tuple[bytes, ImageFormat]]:
        """Yield the encoded image and its format. Its slot and its bytes are held until the block ends."""
        if image.data is not None:
            try:
                image_format = _check(image.data, {"content-length": ""})
            except _DownloadError as exc:
                raise ImageError(f"the inline image: {exc}") from None
            yield image.data, image_format
            return
        async with self._slots:
            with self._memory.lease() as lease:
                yield await self._download_with_retries(image.url or "", lease)

    async def _download_with_retries(self, url: str, lease: ByteLease) -> tuple[bytes, ImageFormat]:
        deadline_s = anyio.current_time() + self._timeouts.download_s
        attempts = 0
        while True:
            attempts += 1
            try:
                response = await self._get_following_redirects(url, lease, deadline_s)
                return response.body, _check(response.body, response.headers)
            except _DownloadError as exc:
                backoff_s = self._retry.backoff_s(attempts, self._rng)
                spent = attempts >= self._retry.attempts + _EXTRA_ATTEMPTS
                if spent or not exc.transient or anyio.current_time() + backoff_s >= deadline_s:
                    # Without the query, which may contain a signature.
                    tries = f" (attempts: {attempts})" if exc.transient else ""
                    raise ImageError(f"{url.partition('?')[0][:200]}: {exc}{tries}") from None
            await anyio.sleep(backoff_s)

    async def _get_following_redirects(self, url: str, lease: ByteLease, deadline_s: float) -> WireResponse:
        """Get *url* and follow up to three redirects, checking each URL like the first."""
        for _ in range(_MAX_REDIRECTS + 1):
            response = await self._get(url, lease, deadline_s)
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

    async def _get(self, url: str, lease: ByteLease, deadline_s: float) -> WireResponse:
        url = percent_encoded(url)
        if problem := url_problem(url):
            raise _DownloadError(f"the image URL {problem}")
        request = WireRequest(
            kind=RequestKind.DOWNLOAD,
            method="GET",
            url=url,
            headers=_HEADERS,
            max_bytes=self._max_image_bytes,
            public_only=await self._public_only(),
            before_body=partial(self._reserve_memory, lease),
        )
        try:
            response = await self._transport.send(request, timeout_s=deadline_s - anyio.current_time())
        except ExchangeError as exc:
            failure = exc
        else:
            return response
        raise _DownloadError(failure.reason, transient=not failure.permanent)

    async def _reserve_memory(self, lease: ByteLease, head: WireResponse) -> None:
        length = head.headers.get("content-length", "")
        known = length.isascii() and length.isdigit() and len(length) < 19
        await lease.resize(min(int(length), self._max_image_bytes) if known else self._max_image_bytes)


_COMPRESSIONS: Final = frozenset({"gzip", "x-gzip", "deflate", "br", "zstd", "compress"})


def _check(data: bytes, headers: Mapping[str, str]) -> ImageFormat:
    """Return the format of *data*. Raise if it is not an image, or is truncated.

    Without a declared length, the trailer of the format is the only sign of a complete file.
    """
    if not data:
        raise _DownloadError("not an image, only 0 bytes")
    image_format = sniff(data)
    if image_format is None:
        # Object stores state encodings that they did not apply, so the header alone says nothing.
        if headers.get("content-encoding", "").strip().lower() in _COMPRESSIONS:
            raise _DownloadError("the file host compressed the file although identity was requested")
        raise _DownloadError("not a PNG, JPEG, WebP or GIF")
    is_framed = "content-length" in headers or "chunked" in headers.get("transfer-encoding", "")
    if not is_framed and not image_format.is_complete(data):
        raise _DownloadError("the image is truncated", transient=True)
    return image_format
