"""Picture formats, told by their bytes: names and content types from the network are not believed. Pure."""

from typing import Final

import attrs

SNIFF_BYTES: Final = 12
"""How much of a file `sniff` needs."""


@attrs.frozen
class ImageFormat:
    """One of the formats that are accepted."""

    media_type: str
    suffix: str
    magic: bytes
    trailer: bytes
    """What a whole file ends with; empty when the format does not say."""


_PNG: Final = ImageFormat("image/png", ".png", b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")
_JPEG: Final = ImageFormat("image/jpeg", ".jpg", b"\xff\xd8\xff", b"\xff\xd9")
_GIF: Final = ImageFormat("image/gif", ".gif", b"GIF8", b";")
_WEBP: Final = ImageFormat("image/webp", ".webp", b"RIFF", b"")

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp"})


def sniff(head: bytes) -> ImageFormat | None:
    """Return the format of a file that starts with *head*; None when it is no picture we take."""
    for image_format in (_PNG, _JPEG, _GIF):
        if head.startswith(image_format.magic):
            return image_format
    return _WEBP if head[:4] == _WEBP.magic and head[8:12] == b"WEBP" else None
