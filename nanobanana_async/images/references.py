"""Encode reference images as the URLs and data URIs that the service accepts."""

import base64
import io
import os
import stat
from pathlib import Path

import anyio.to_thread
import attrs

from nanobanana_async.errors import ImageError
from nanobanana_async.images.formats import SNIFF_BYTES, sniff
from nanobanana_async.models import GenerationRequest, ImageSource, SupportsSave


async def encode_images(request: GenerationRequest, *, max_bytes: int) -> GenerationRequest:
    """Return *request* with its images as URLs and data URIs. Files are read and encoded in threads.

    Raises:
        ImageError: A file cannot be read, is not a PNG, JPEG, WebP or GIF, or exceeds *max_bytes*.
    """
    images = tuple([await _encode_reference(image, max_bytes) for image in request.images])
    return request if images == request.images else attrs.evolve(request, images=images)


async def _encode_reference(image: ImageSource, max_bytes: int) -> str:
    if not isinstance(image, str):
        return await anyio.to_thread.run_sync(_to_data_uri, image, max_bytes)
    if image.startswith("data:"):
        _check_size("the data URI", len(image) * 3 // 4, max_bytes)
    return image


def _to_data_uri(image: Path | bytes | SupportsSave, max_bytes: int) -> str:
    if isinstance(image, bytes):
        name, data = "the image", image
    elif isinstance(image, Path):
        name, data = str(image), _read(image, max_bytes)
    else:
        name, data = "the PIL image", _to_png(image)
    _check_size(name, len(data), max_bytes)
    image_format = sniff(data[:SNIFF_BYTES])
    if image_format is None:
        raise ImageError(f"{name}: not a PNG, JPEG, WebP or GIF (it starts with {data[:SNIFF_BYTES]!r})")
    return f"data:{image_format.media_type};base64,{base64.b64encode(data).decode('ascii')}"


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe could block forever
            raise ImageError(f"{path}: cannot be read: expected a regular file")
        with path.open("rb") as file:
            # Checked before reading, because the file may be very large.
            _check_size(str(path), os.fstat(file.fileno()).st_size, max_bytes)
            return file.read(max_bytes + 1)
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
