"""Pure functions on text for names and messages."""

import re
import unicodedata
from decimal import Decimal
from typing import Final

_EXCERPT_CHARS: Final = 200


def slugify(text: str, *, limit: int = 80) -> str:
    """Return a file stem of `[A-Za-z0-9_-]{1,80}` made from *text*. Letters lose their accents.

    Every file name of the package is made here, so that remote text never chooses a path.
    """
    text = unicodedata.normalize("NFKD", text.replace("ß", "ss")).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[:limit].rstrip("-") or "image"


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
