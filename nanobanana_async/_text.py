"""File names of our own making. Pure."""

import re
import unicodedata


def slugify(text: str, *, limit: int = 80) -> str:
    """Return a stem of `[A-Za-z0-9_-]{1,80}` made from *text*: nothing remote picks a path.

    Letters lose their accents.
    """
    text = unicodedata.normalize("NFKD", text.replace("ß", "ss")).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[:limit].rstrip("-") or "image"
