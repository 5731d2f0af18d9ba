"""The gallery is one page that opens from disk."""

from html.parser import HTMLParser
from pathlib import Path

from nanobanana_async.batch.gallery import GalleryCard, frame, render, write


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def tags(page: str, name: str) -> list[dict[str, str | None]]:
    """Return the attributes of each tag called *name*."""
    parser = _Tags()
    parser.feed(page)
    return [attributes for tag, attributes in parser.seen if tag == name]


def page_of(title: str, entries: list[GalleryCard]) -> str:
    """Return the whole page."""
    head, tail = frame(title)
    return "".join([head, *map(render, entries), tail])


def test_each_row_is_a_card_with_a_lazy_image() -> None:
    """A gallery of five thousand images does not load all at once."""
    page = page_of("Run", [GalleryCard(prompt=f"fox {n}", status="succeeded", file=f"{n}.png") for n in range(5)])
    images = tags(page, "img")
    assert [image["src"] for image in images] == [f"{n}.png" for n in range(5)]
    assert all(image["loading"] == "lazy" for image in images)


def test_no_prompt_can_break_out_of_the_page() -> None:
    """Tags, quotes, template signs and file names are escaped."""
    evil = "<script>alert(1)</script>\" onload='x' $title ${cards}"
    entry = GalleryCard(prompt=evil, status=evil, file='a"b #?.png', note=evil, cost=evil)
    page = page_of(evil, [entry])
    assert len(tags(page, "script")) == 1
    (image,) = tags(page, "img")
    assert image["alt"] == evil
    assert image["src"] == "a%22b%20%23%3F.png"
    assert "onload" not in image


def test_a_card_without_an_image_shows_the_reason() -> None:
    """A failed row is a card, too."""
    page = page_of("Run", [GalleryCard(prompt="fox", status="failed", note="the prompt was rejected")])
    assert "the prompt was rejected" in page
    assert tags(page, "img") == []


def test_status_time_and_cost_are_shown_below_the_prompt() -> None:
    """Facts that are not known are left out."""
    page = page_of("Run", [GalleryCard(prompt="fox", status="succeeded", file="1.png", seconds=12.34, cost="0.5")])
    assert "succeeded &middot; 12.3 s &middot; 0.5 credits" in page


def test_the_page_is_written_as_one_file(tmp_path: Path) -> None:
    """The page needs no other file than the images."""
    write(tmp_path / "index.html", "Run", [])
    assert tags((tmp_path / "index.html").read_text(), "link") == []
