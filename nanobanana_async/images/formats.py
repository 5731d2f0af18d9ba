"""Image formats, detected from the bytes, because names and media types are not reliable. Pure."""

from typing import Final

import attrs

_PADDING: Final = b"\0\r\n "
SNIFF_BYTES: Final = 12
"""Number of bytes that `sniff` needs."""


@attrs.frozen
class ImageFormat:
    """A supported image format."""

    media_type: str
    suffixes: tuple[str, ...]
    """File suffixes, the usual one first."""
    magic: bytes
    trailer: bytes
    """Last bytes of a complete file; empty if the format has none."""

    def is_complete(self, data: bytes) -> bool:
        """Return whether *data* has the trailer. Hosts append padding, and some encoders bytes after a PNG."""
        return data.rstrip(_PADDING).endswith(self.trailer) or (len(self.trailer) > 2 and self.trailer in data)


_PNG: Final = ImageFormat("image/png", (".png",), b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")
_JPEG: Final = ImageFormat("image/jpeg", (".jpg", ".jpeg"), b"\xff\xd8\xff", b"\xff\xd9")
_GIF: Final = ImageFormat("image/gif", (".gif",), b"GIF8", b";")
_WEBP: Final = ImageFormat("image/webp", (".webp",), b"RIFF", b"")

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
