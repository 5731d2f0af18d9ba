"""The gallery is one page that opens from disk."""

import os
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from nanobanana_async.batch.gallery import GalleryCard, frame, render, write
from nanobanana_async.batch.thumbnails import Thumbnails


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


def photo(path: Path, width: int = 2000) -> Path:
    """Write an image that is too large for a gallery."""
    Image.frombytes("RGB", (width, 300), random.Random(1).randbytes(3 * width * 300)).save(path)
    return path


def test_a_large_image_is_shown_as_a_thumbnail_and_linked_in_full(tmp_path: Path) -> None:
    """It is made once, and again if the image is a newer one."""
    image = photo(tmp_path / "fox.png")
    link = Thumbnails(tmp_path, 10).link(image)
    assert link == ".thumbnails/fox.png.webp"
    thumbnail = tmp_path / link
    assert thumbnail.stat().st_size < image.stat().st_size / 10
    with Image.open(thumbnail) as opened:
        assert opened.size == (640, 96)
    made = thumbnail.stat().st_mtime_ns
    assert Thumbnails(tmp_path, 10).link(image) == link
    assert thumbnail.stat().st_mtime_ns == made
    os.utime(image, ns=(made + 10**9, made + 10**9))
    Thumbnails(tmp_path, 10).link(image)
    assert thumbnail.stat().st_mtime_ns > made
    page = page_of("Run", [GalleryCard(prompt="a fox", status="succeeded", file="fox.png", thumbnail=link)])
    assert (tags(page, "img")[0]["src"], tags(page, "a")[0]["href"]) == (link, "fox.png")


@pytest.mark.parametrize("what", ["small", "late", "damaged", "missing", "link", "no space"])
def test_without_a_thumbnail_the_image_itself_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A small image needs none. Time, damage, a link in place of the folder, and a full disk do no harm."""
    image = photo(tmp_path / "fox.png", 20 if what == "small" else 2000)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    match what:
        case "damaged":
            image.write_bytes(image.read_bytes()[:250_000])
        case "missing":
            image.unlink()
        case "link":
            (tmp_path / ".thumbnails").symlink_to(elsewhere)
        case "no space":
            (tmp_path / ".thumbnails").write_text("a file of the user")
    assert Thumbnails(tmp_path, -1 if what == "late" else 10).link(image) == "fox.png"
    assert not list(elsewhere.iterdir())
