"""Encode reference images as the URLs and data URIs that the service accepts."""

import base64
import io
import os
import re
import stat
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

import anyio.to_thread
import attrs

from nanobanana_async.errors import ImageError
from nanobanana_async.images.fit import check_readable, fit
from nanobanana_async.images.formats import SNIFF_BYTES, ImageFormat, sniff
from nanobanana_async.models import GenerationRequest, ImageSource, SupportsSave, url_problem
from nanobanana_async.policies import ReferencePolicy
from nanobanana_async.wire.body import decode_data_uri

MAX_SHRUNK_BYTES: Final = 256 * 2**20
"""Largest file that is read to be shrunk."""
_TAIL_BYTES: Final = 65_536
"""Part of a file that is read to find its end. Cameras append more, and then the whole file is read."""


async def encode_images(
    request: GenerationRequest, reserve: Callable[[int], Awaitable[None]], *, policy: ReferencePolicy
) -> GenerationRequest:
    """Return *request* with its images as URLs and data URIs. Files are read and encoded in threads.

    *reserve* is awaited with their size as text before any of them is read.

    Raises:
        ImageError: A file cannot be read, is truncated, is not a PNG, JPEG, WebP or GIF, exceeds the *policy*, or
            cannot be uploaded.
    """
    if not request.images:
        return request
    await reserve(await anyio.to_thread.run_sync(_text_bytes, request.images, policy.max_bytes))
    images = tuple([await _encode_reference(image, policy) for image in request.images])
    return request if images == request.images else attrs.evolve(request, images=images)


def _text_bytes(images: Iterable[ImageSource], max_bytes: int) -> int:
    """Return the size of *images* as text, at most. Blocking."""
    return sum(len(image) if isinstance(image, str) else _size_bytes(image, max_bytes) * 4 // 3 for image in images)


def _size_bytes(image: Path | bytes | SupportsSave, max_bytes: int) -> int:
    if isinstance(image, bytes):
        return len(image)
    if isinstance(image, Path):
        with suppress(OSError):  # it is reported when it is read
            return min(image.stat().st_size, max_bytes)
        return 0
    return max_bytes


async def _encode_reference(image: ImageSource, policy: ReferencePolicy) -> str:
    if isinstance(image, str) and not is_data_uri(image):
        return image
    if isinstance(image, str) and policy.upload is None and policy.on_too_large == "error":
        await anyio.to_thread.run_sync(check_data_uri, image, policy.max_bytes)
        return image
    data = await anyio.to_thread.run_sync(_load, image, policy)
    if policy.upload is None:
        return await anyio.to_thread.run_sync(_to_data_uri, data)
    return await _upload(policy.upload, data)


async def _upload(upload: Callable[[bytes], Awaitable[str]], data: bytes) -> str:
    try:
        url = str(await upload(data))
    except Exception as exc:
        raise ImageError(f"the reference image cannot be uploaded: {type(exc).__name__}: {exc}") from exc
    if (problem := url_problem(url)) is not None:
        raise ImageError(f"the URL of an uploaded reference image {problem} Got {url!r:.80}.")
    return url


def parse_reference(text: str, folder: Path) -> str | Path:
    """Return the reference image that a person means by *text*: a URL, a data URI, or a path relative to *folder*.

    Raises:
        ValueError: It is a URL of another kind.
    """
    scheme = (re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", text) or [""])[0].lower()
    if scheme in ("http:", "https:", "data:"):
        return scheme + text[len(scheme) :]
    if scheme == "file:":
        return Path(url2pathname(urlsplit(text).path))
    if scheme and text[len(scheme) :].startswith("//"):
        raise ValueError(f"expected a path, a data URI or an http(s) URL, got {text!r:.80}")
    return folder / text


def is_data_uri(text: str) -> bool:
    """Return whether *text* is a data URI. Schemes are case-insensitive (RFC 3986)."""
    return text[:5].lower() == "data:"


def check_data_uri(uri: str, max_bytes: int) -> None:
    """Check that *uri* is that of a complete image. Blocking: it takes milliseconds per MiB.

    Raises:
        ImageError: It is not, or it exceeds *max_bytes*.
    """
    _check_size("the data URI", len(uri) * 3 // 4, max_bytes)
    _check_image("the data URI", _decoded(uri))


def _decoded(uri: str) -> bytes:
    image = decode_data_uri(uri)
    if image is None or image.data is None:
        raise ImageError(f"the data URI: expected base64 of an image, got {uri[:40]!r}")
    return image.data


def check_file(path: Path, policy: ReferencePolicy) -> None:
    """Check that *path* is a complete image. Reads its begin and its end. Blocking.

    Raises:
        ImageError: It is not, it cannot be read, or it exceeds the *policy*.
    """
    is_shrunk = policy.on_too_large == "shrink"
    max_bytes = MAX_SHRUNK_BYTES if is_shrunk else policy.max_bytes
    with _opened(path, max_bytes) as file:
        head = file.read(_TAIL_BYTES)
        if is_shrunk and head and sniff(head[:SNIFF_BYTES]) is None:
            check_readable(str(path), head + file.read())
            return
        image_format = _sniffed(str(path), head)
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(len(head), size_bytes - _TAIL_BYTES))
        if not image_format.is_complete(head + file.read(_TAIL_BYTES)):
            file.seek(0)
            _check_image(str(path), file.read(max_bytes))


def _load(image: ImageSource, policy: ReferencePolicy) -> bytes:
    """Return the image that is sent: complete, and within the policy. Blocking."""
    is_shrunk = policy.on_too_large == "shrink"
    max_bytes = MAX_SHRUNK_BYTES if is_shrunk else policy.max_bytes
    if isinstance(image, str):
        _check_size("the data URI", len(image) * 3 // 4, max_bytes)
        name, data = "the data URI", _decoded(image)
    elif isinstance(image, bytes):
        name, data = "the image", image
    elif isinstance(image, Path):
        name, data = str(image), _read(image, max_bytes)
    else:
        name, data = "the PIL image", _to_png(image)
    _check_size(name, len(data), max_bytes)
    if is_shrunk and data:
        if sniff(data[:SNIFF_BYTES]) is not None:
            _check_image(name, data)  # Pillow fills the missing part with grey
        data = fit(name, data, max_side_px=policy.max_side_px, max_bytes=policy.max_bytes)
    _check_image(name, data)
    return data


def _to_data_uri(data: bytes) -> str:
    kind = _sniffed("the image", data).name
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _sniffed(name: str, data: bytes) -> ImageFormat:
    image_format = sniff(data[:SNIFF_BYTES])
    if not data:
        raise ImageError(f"{name}: is empty")
    if image_format is None:
        raise ImageError(f"{name}: not a PNG, JPEG, WebP or GIF (it starts with {data[:SNIFF_BYTES]!r})")
    return image_format


def _check_image(name: str, data: bytes) -> ImageFormat:
    image_format = _sniffed(name, data)
    if not image_format.is_complete(data):
        raise ImageError(f"{name}: the image is truncated. Copy the file again.")
    return image_format


def _read(path: Path, max_bytes: int) -> bytes:
    with _opened(path, max_bytes) as file:
        return file.read(max_bytes + 1)


@contextmanager
def _opened(path: Path, max_bytes: int) -> Generator[BinaryIO]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe could block forever
            raise ImageError(f"{path}: cannot be read: expected a regular file")
        with path.open("rb") as file:
            # Checked before reading, because the file may be very large.
            _check_size(str(path), os.fstat(file.fileno()).st_size, max_bytes)
            yield file
    except OSError as exc:
        raise ImageError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def _to_png(image: SupportsSave) -> bytes:
    file = io.BytesIO()
    try:
        image.save(file, format="PNG")
    except (OSError, ValueError) as exc:
        raise ImageError(f"the PIL image cannot be written as PNG: {exc}") from exc
    return file.getvalue()


def _check_size(name: str, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise ImageError(
            f"{name}: expected at most {max_bytes / 2**20:.1f} MiB, got {size_bytes / 2**20:.1f} MiB. Scale the image "
            "down, or let it be shrunk: ReferencePolicy(on_too_large='shrink'), --shrink-references."
        )
