"""Pure functions on text for names and messages."""

import re
import unicodedata
from decimal import Decimal
from typing import Final

_EXCERPT_CHARS: Final = 200
_MAX_STEM_BYTES: Final = 180
_DEVICE_NAMES: Final = frozenset(
    ["CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))]
)


def slugify(text: str, *, limit: int = 80) -> str:
    """Return a file stem made from *text*: letters and digits of any script, `-`, `_` and `.`, in NFC.

    It has at most *limit* characters and 180 bytes, no leading dot or dash, and is no device name of Windows. Every
    file name of the package is made here, so that remote text never chooses a path.
    """
    composed = unicodedata.normalize("NFC", text)
    kept = "".join(character if _is_safe(character) else "-" for character in composed)
    stem = re.sub(r"[-.]{2,}", "-", kept).strip("-.")[:limit]
    stem = stem.encode()[:_MAX_STEM_BYTES].decode(errors="ignore").rstrip("-.")
    return f"{stem}-" if stem.partition(".")[0].upper() in _DEVICE_NAMES else stem or "image"


def _is_safe(character: str) -> bool:
    """Return whether it is a letter, a mark or a digit of any script, or one of `-_.`."""
    return unicodedata.category(character)[0] in "LMN" or character in "-_."


_INVISIBLE: Final = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))
"""Soft hyphen, zero-width blank, word joiner and byte order mark. Joiners and marks of direction have a meaning."""


def normalize(text: str) -> str:
    """Return *text* in NFC, with LF for line breaks, and without invisible characters and blanks at the ends of lines.

    Spreadsheets and editors differ in all of these, and text that looks the same should be the same.
    """
    text = text.strip()
    if text.isascii() and "\n" not in text and "\r" not in text:
        return text
    composed = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).translate(_INVISIBLE)
    return "\n".join(line.rstrip() for line in composed.split("\n")).strip()


def sanitize_line(text: str) -> str:
    """Return *text* as one line that is safe for a terminal: control characters and newlines become spaces."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def excerpt(body: bytes) -> str:
    """Return the start of a body as one safe line, without tags and control characters."""
    text = re.sub(r"<[^>]*>?", " ", body[:2000].decode("utf-8", "replace"))
    line = sanitize_line(text)
    return line if len(line) <= _EXCERPT_CHARS else f"{line[:_EXCERPT_CHARS]}..."


def format_credits(amount: Decimal) -> str:
    """Return *amount* in full and without trailing zeros: `0.5`, not `0.500000` or `5E-1`."""
    return f"{amount.normalize():f}"
