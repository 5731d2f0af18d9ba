"""The gallery: one HTML page with images, prompts, status, time and cost, a search and a filter."""

from collections.abc import Iterable, Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Final
from urllib.parse import quote

import attrs

_PAGE: Final = "gallery.html"


@attrs.frozen(kw_only=True)
class GalleryCard:
    """One card of the gallery."""

    prompt: str
    status: str
    """One word: `succeeded`, `failed` or `unknown`. The filter offers the ones that occur."""
    file: str | None = None
    """File of the image, relative to the page; None if there is none."""
    seconds: float | None = None
    """Time from submit to saved image; None if not measured."""
    cost: str = ""
    """Credits as text."""
    note: str = ""
    """Reason why there is no image."""


def render(title: str, cards: Iterable[GalleryCard]) -> Iterator[str]:
    """Yield the HTML of the page, one card at a time. All text is escaped."""
    page = files("nanobanana_async.batch").joinpath(_PAGE).read_text(encoding="utf-8")
    head, _, tail = page.partition("$cards")
    yield head.replace("$title", escape(title))
    for card in cards:
        yield f"{_card(card)}\n"
    yield tail


def write(page: Path, title: str, cards: Iterable[GalleryCard]) -> None:
    """Write the page. Blocking.

    Raises:
        OSError: The file could not be written.
    """
    with page.open("w", encoding="utf-8") as file:
        file.writelines(render(title, cards))


def _card(card: GalleryCard) -> str:
    prompt = escape(card.prompt)
    if card.file is None:
        image = f'<div class="none">{escape(card.note or card.status)}</div>'
    else:
        link = escape(quote(card.file))
        image = f'<a href="{link}"><img src="{link}" alt="{prompt}" loading="lazy"></a>'
    facts = [card.status]
    if card.seconds is not None:
        facts.append(f"{card.seconds:.1f} s")
    if card.cost:
        facts.append(f"{card.cost} credits")
    line = " &middot; ".join(map(escape, facts))
    return (
        f'<figure data-status="{escape(card.status)}" data-text="{escape(card.prompt.lower())}">{image}'
        f"<figcaption><p>{prompt}</p><small>{line}</small></figcaption></figure>"
    )
