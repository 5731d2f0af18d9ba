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
from nanobanana_async.images.formats import SNIFF_BYTES, ImageFormat, sniff
from nanobanana_async.models import GenerationRequest, ImageSource, SupportsSave
from nanobanana_async.wire.body import decode_data_uri

_TAIL_BYTES: Final = 65_536
"""Part of a file that is read to find its end. Cameras append more, and then the whole file is read."""


async def encode_images(
    request: GenerationRequest, reserve: Callable[[int], Awaitable[None]], *, max_bytes: int
) -> GenerationRequest:
    """Return *request* with its images as URLs and data URIs. Files are read and encoded in threads.

    *reserve* is awaited with their size as text before any of them is read.

    Raises:
        ImageError: A file cannot be read, is truncated, is not a PNG, JPEG, WebP or GIF, or exceeds *max_bytes*.
    """
    if not request.images:
        return request
    await reserve(await anyio.to_thread.run_sync(_text_bytes, request.images, max_bytes))
    images = tuple([await _encode_reference(image, max_bytes) for image in request.images])
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


async def _encode_reference(image: ImageSource, max_bytes: int) -> str:
    if not isinstance(image, str):
        return await anyio.to_thread.run_sync(_to_data_uri, image, max_bytes)
    if is_data_uri(image):
        await anyio.to_thread.run_sync(check_data_uri, image, max_bytes)
    return image


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
    image = decode_data_uri(uri)
    if image is None or image.data is None:
        raise ImageError(f"the data URI: expected base64 of an image, got {uri[:40]!r}")
    _check_image("the data URI", image.data)


def check_file(path: Path, max_bytes: int) -> None:
    """Check that *path* is a complete image. Reads its begin and its end. Blocking.

    Raises:
        ImageError: It is not, it cannot be read, or it exceeds *max_bytes*.
    """
    with _opened(path, max_bytes) as file:
        head = file.read(_TAIL_BYTES)
        image_format = _sniffed(str(path), head)
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(len(head), size_bytes - _TAIL_BYTES))
        if not image_format.is_complete(head + file.read(_TAIL_BYTES)):
            file.seek(0)
            _check_image(str(path), file.read(max_bytes))


def _to_data_uri(image: Path | bytes | SupportsSave, max_bytes: int) -> str:
    if isinstance(image, bytes):
        name, data = "the image", image
    elif isinstance(image, Path):
        name, data = str(image), _read(image, max_bytes)
    else:
        name, data = "the PIL image", _to_png(image)
    _check_size(name, len(data), max_bytes)
    image_format = _check_image(name, data)
    return f"data:image/{image_format.name};base64,{base64.b64encode(data).decode('ascii')}"


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
            f"{name}: expected at most {max_bytes / 2**20:.1f} MiB (Limits.max_reference_bytes), "
            f"got {size_bytes / 2**20:.1f} MiB. Scale the image down."
        )
