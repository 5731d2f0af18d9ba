"""Image formats, detected from the bytes, because names and media types are not reliable. Pure."""

import struct
from collections.abc import Iterator
from typing import Final

import attrs

from nanobanana_async.saved import ImageInfo

_PADDING: Final = b"\0\r\n "
SNIFF_BYTES: Final = 12
"""Number of bytes that `sniff` needs."""


@attrs.frozen
class ImageFormat:
    """A supported image format."""

    name: str
    suffixes: tuple[str, ...]
    """File suffixes, the usual one first."""
    magic: bytes

    def is_complete(self, data: bytes) -> bool:
        """Return whether *data* has the end of an image. Hosts append padding, and cameras and encoders whole files."""
        if self is _PNG:
            return _PNG_END in data
        if self is _JPEG:
            return any(marker == _SOS and data.find(_EOI, at) >= 0 for marker, at in _jpeg_segments(data))
        if self is _GIF:
            return data.rstrip(_PADDING).endswith(b";")
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")  # the length that RIFF states

    def size(self, data: bytes) -> tuple[int, int] | None:
        """Return width and height in pixels, as the header states them; None if it is damaged."""
        try:
            if self is _PNG:
                return struct.unpack(">II", data[16:24])
            if self is _GIF:
                return struct.unpack("<HH", data[6:10])
            return _jpeg_size(data) if self is _JPEG else _webp_size(data)
        except (struct.error, IndexError):
            return None


_PNG: Final = ImageFormat("png", (".png",), b"\x89PNG\r\n\x1a\n")
_JPEG: Final = ImageFormat("jpeg", (".jpg", ".jpeg"), b"\xff\xd8\xff")
_GIF: Final = ImageFormat("gif", (".gif",), b"GIF8")
_WEBP: Final = ImageFormat("webp", (".webp",), b"RIFF")

_PNG_END: Final = b"IEND\xaeB`\x82"
_EOI: Final = b"\xff\xd9"
_SOS: Final = 0xDA
_MAX_SEGMENTS: Final = 10_000
"""Segments and fill bytes of a JPEG header that are read. A hostile one may have millions."""
_JPEG_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the JPEG header with the size (ITU T.81, table B.1)."""

SUFFIXES: Final = frozenset(suffix for one in (_PNG, _JPEG, _GIF, _WEBP) for suffix in one.suffixes)


def split_suffix(name: str) -> tuple[str, str]:
    """Return stem and image suffix of *name*; "" if it ends otherwise."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix) if stem and f".{suffix.lower()}" in SUFFIXES else (name, "")


def true_name(name: str, image_format: ImageFormat) -> str:
    """Return *name* with a suffix of its true format. An image suffix of another format is replaced."""
    stem, suffix = split_suffix(name)
    return name if suffix.lower() in image_format.suffixes else stem + image_format.suffixes[0]


def sniff(head: bytes) -> ImageFormat | None:
    """Return the format of a file that starts with *head*; None if it is not supported."""
    for image_format in (_PNG, _JPEG, _GIF):
        if head.startswith(image_format.magic):
            return image_format
    return _WEBP if head[:4] == _WEBP.magic and head[8:12] == b"WEBP" else None


def read_info(data: bytes) -> ImageInfo | None:
    """Return format and size of an encoded image; None if its format is not supported."""
    image_format = sniff(data[:SNIFF_BYTES])
    if image_format is None:
        return None
    width, height = image_format.size(data) or (None, None)
    return ImageInfo(format=image_format.name, width=width, height=height)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and offset of each segment up to the image data, which an embedded preview cannot contain."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if at + 4 > len(data) or data[at] != 0xFF:
            return
        marker = data[at + 1]
        yield marker, at
        if marker == _SOS:
            return
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    for marker, at in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Return the size in one of the three headers of WebP (RFC 9649)."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None
