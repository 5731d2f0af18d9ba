"""A run as one web page that opens from disk: pictures, prompts, status, time and cost, with search and filter."""

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
    """One card of the page."""

    prompt: str
    status: str
    """One word: `done`, `failed`, `unknown`. The filter offers those that occur."""
    file: str | None = None
    """The picture, relative to the page; None when there is none."""
    seconds: float | None = None
    """From submit to picture; None when not measured."""
    cost: str = ""
    """Credits, as text."""
    note: str = ""
    """What went wrong."""


def render(title: str, cards: Iterable[GalleryCard]) -> Iterator[str]:
    """Yield the page as HTML, a card at a time. Every text is escaped: prompts may hold anything."""
    page = files(__package__).joinpath(_PAGE).read_text(encoding="utf-8")
    head, _, tail = page.partition("$cards")
    yield head.replace("$title", escape(title))
    for card in cards:
        yield f"{_card(card)}\n"
    yield tail


def write(page: Path, title: str, cards: Iterable[GalleryCard]) -> None:
    """Write the page. Blocking.

    Raises:
        OSError: The disk would not take it.
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
