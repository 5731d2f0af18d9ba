"""Pure functions on text for names and messages."""

import re
import unicodedata


def slugify(text: str, *, limit: int = 80) -> str:
    """Return a file stem of `[A-Za-z0-9_-]{1,80}` made from *text*. Letters lose their accents.

    Every file name of the package is made here, so that remote text never chooses a path.
    """
    text = unicodedata.normalize("NFKD", text.replace("ß", "ss")).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[:limit].rstrip("-") or "image"
