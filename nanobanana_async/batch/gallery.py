"""The gallery: one HTML page with images, prompts, status, time and cost, a search and a filter."""

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Final
from urllib.parse import quote

import attrs

from nanobanana_async.images.files import replacing
from nanobanana_async.saved import Mismatch

_PAGE: Final = "gallery.html"


@attrs.frozen(kw_only=True)
class GalleryCard:
    """One card of the gallery."""

    prompt: str
    status: str
    """One word: `succeeded`, `failed` or `unknown`. The filter offers the ones that occur."""
    file: str | None = None
    """File of the image, relative to the page; None if there is none."""
    thumbnail: str | None = None
    """A smaller copy of the image, relative to the page; None shows the image itself."""
    seconds: float | None = None
    """Time from submit to saved image; None if not measured."""
    cost: str = ""
    """Credits as text."""
    note: str = ""
    """Reason why there is no image."""
    reason_kind: str | None = None
    """`ReasonKind` of the note; None if it has none."""
    mismatch: tuple[Mismatch, ...] = ()
    """In what the image is not as requested."""


def frame(title: str) -> tuple[str, str]:
    """Return the HTML before and after the cards. The title is escaped."""
    page = files("nanobanana_async.batch").joinpath(_PAGE).read_text(encoding="utf-8")
    head, _, tail = page.partition("$cards")
    return head.replace("$title", escape(title)), tail


def write(page: Path, title: str, cards: Iterable[GalleryCard]) -> None:
    """Write a page, and replace an earlier one. Blocking.

    Raises:
        OSError: The file could not be written.
    """
    head, tail = frame(title)
    with replacing(page) as file:
        file.writelines(text.encode() for text in (head, *map(render, cards), tail))


def render(card: GalleryCard) -> str:
    """Return the HTML of one card. All text is escaped."""
    prompt = escape(card.prompt)
    if card.file is None:
        image = f'<div class="none">{escape(card.note or card.status)}</div>'
    else:
        link, source = (escape(quote(name)) for name in (card.file, card.thumbnail or card.file))
        image = f'<a href="{link}"><img src="{source}" alt="{prompt}" loading="lazy"></a>'
    facts = [card.status if card.reason_kind is None else f"{card.status}: {card.reason_kind}"]
    if card.seconds is not None:
        facts.append(f"{card.seconds:.1f} s")
    if card.cost:
        facts.append(f"{card.cost} credits")
    line = " &middot; ".join(map(escape, facts))
    badges = "".join(f'<strong class="badge">{escape(one.message)}</strong>' for one in card.mismatch)
    flag = " data-mismatch" if card.mismatch else ""
    return (
        f'<figure data-status="{escape(card.status)}"{flag} data-text="{escape(card.prompt.lower())}">{image}'
        f"<figcaption><p>{prompt}</p>{badges}<small>{line}</small></figcaption></figure>"
    )
