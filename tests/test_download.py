"""Images are downloaded completely or not at all, from public hosts, without the key."""

import contextlib
import errno
import gzip
import hashlib
import os
import stat
from pathlib import Path

import anyio
import pytest

from nanobanana_async import GeneratedImage, ImageError, Limits, Phase, RetryPolicy, Timeouts, WireRequest, WireResponse
from nanobanana_async._concurrency.byte_budget import ByteBudget
from nanobanana_async._text import slugify
from nanobanana_async.images.download import Downloader
from nanobanana_async.images.files import FileImageStore
from tests.fakes import PNG, ScriptedTransport, Step, lost, response, script

pytestmark = pytest.mark.anyio

QUICK = RetryPolicy(initial_s=0.001, max_s=0.001)

FOX = GeneratedImage(url="https://files.example/fox.png?signature=s")
WEBP = b"RIFF\x10\0\0\0WEBPVP8 " + bytes(8)
WHOLE = response(200, body=PNG, content_length=str(len(PNG)))


def downloader(transport: ScriptedTransport, **limits: int) -> Downloader:
    """Return a downloader over *transport*."""

    async def public_only() -> bool:
        return True

    bounds = Limits(**limits)
    memory = ByteBudget(bounds.max_download_bytes)
    return Downloader(
        transport, limits=bounds, retry=QUICK, timeouts=Timeouts(), public_only=public_only, memory=memory
    )


async def test_an_image_is_downloaded_without_the_key() -> None:
    """The request has the package's user agent, no compression, and may reach public addresses only."""
    transport = script(WHOLE)
    assert await downloader(transport).download(FOX) == PNG
    (request,) = transport.requests
    assert set(request.headers) == {"User-Agent", "Accept", "Accept-Encoding"}
    assert request.headers["User-Agent"].startswith("nanobanana-async/")
    assert request.public_only


async def test_an_inline_image_needs_no_network() -> None:
    """The bytes are in the task."""
    transport = script(lost())
    assert await downloader(transport).download(GeneratedImage(data=PNG, media_type="image/png")) == PNG
    assert transport.requests == []


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(response(404, body=b"<html>"), id="404"),
        pytest.param(response(403, body=b"denied"), id="403"),
        pytest.param(response(503, body=b""), id="503"),
        pytest.param(lost(Phase.CONNECT), id="no-connection"),
        pytest.param(lost(Phase.RESPONSE), id="cut"),
        pytest.param(response(200, body=PNG[:-6]), id="cut-where-only-the-end-can-tell"),
    ],
)
async def test_an_image_that_is_not_there_yet_is_retried(step: Step) -> None:
    """A file host may need a moment after success, and each attempt starts from nothing."""
    assert await downloader(script(step, step, WHOLE)).download(FOX) == PNG


@pytest.mark.parametrize(
    ("step", "says", "requests"),
    [
        pytest.param(response(404, body=b""), r"HTTP 404 \(attempts: 5\)", 5, id="never-there"),
        pytest.param(response(410, body=b""), "HTTP 410", 1, id="gone"),
        pytest.param(response(200, body=b"<html>sorry, no image</html>"), "not a PNG, JPEG, WebP or GIF", 1, id="html"),
        pytest.param(response(200, body=b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not a PNG", 1, id="svg"),
        pytest.param(response(200, body=b""), "only 0 bytes", 1, id="empty"),
        pytest.param(
            response(200, body=gzip.compress(PNG), content_encoding="gzip"), "compressed the file", 1, id="compressed"
        ),
        pytest.param(lost(Phase.CONNECT, permanent=True), "gone", 1, id="refused-address"),
        pytest.param(response(302, body=b"", location="/again"), "redirects more than 3 times", 4, id="redirect-loop"),
        pytest.param(
            response(302, body=b"", location="http://["), "redirects to an invalid URL", 1, id="broken-redirect"
        ),
        pytest.param(response(302, body=b"", location="http://files.example/"), "from https to", 1, id="downgrade"),
        pytest.param(response(302, body=b"", location="https://u:p@b.example/"), "user name", 1, id="credentials"),
        pytest.param(response(302, body=b"", location="file:///etc/passwd"), "from https to", 1, id="file-url"),
    ],
)
async def test_a_failed_download_names_the_image(step: Step, says: str, requests: int) -> None:
    """The URL is shown without its query, which may contain a signature."""
    transport = script(step)
    with pytest.raises(ImageError, match=says) as caught:
        await downloader(transport).download(FOX)
    assert str(caught.value).startswith("https://files.example/fox.png: ")
    assert "signature" not in str(caught.value)
    assert len(transport.requests) == requests


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://a.example/1.png", "data:image/png;base64,###", "", "//a/b"]
)
async def test_only_http_urls_are_downloaded(url: str) -> None:
    """Other schemes in a result are rejected."""
    transport = script(WHOLE)
    with pytest.raises(ImageError):
        await downloader(transport).download(GeneratedImage(url=url))
    assert transport.requests == []


async def test_the_scheme_is_compared_without_case() -> None:
    """A downgrade from HTTPS is rejected in any spelling."""
    transport = script(response(302, body=b"", location="http://files.example/"))
    with pytest.raises(ImageError, match="from https to"):
        await downloader(transport).download(GeneratedImage(url="HTTPS://files.example/fox.png"))


async def test_each_redirect_is_checked_like_the_first_request() -> None:
    """Relative redirects are checked, too."""
    transport = script(
        response(302, body=b"", location="../b/fox.png"), response(307, body=b"", location="//c.example/f"), WHOLE
    )
    await downloader(transport).download(FOX)
    assert [request.url for request in transport.requests[1:]] == [
        "https://files.example/b/fox.png",
        "https://c.example/f",
    ]
    assert all(request.public_only for request in transport.requests)


async def test_downloads_in_flight_are_bounded() -> None:
    """The number of downloads in flight never exceeds the limit."""

    async def slow(_: WireRequest) -> WireResponse:
        await anyio.sleep(0.01)
        return WHOLE

    transport = script(slow)
    images = downloader(transport, max_downloads=3)
    async with anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(images.download, FOX)
    assert transport.most_in_flight == 3


async def test_images_in_memory_are_bounded_together() -> None:
    """A download waits for memory once its length is known. A larger one than all of it is downloaded alone."""
    held, most, events = 0, 0, []

    async def large(request: WireRequest) -> WireResponse:
        nonlocal held, most
        assert request.before_body is not None
        await request.before_body(WHOLE)
        held += 1
        most = max(most, held)
        events.append(held)
        await anyio.sleep(0.01)
        held -= 1
        return WHOLE

    images = downloader(script(large), max_downloads=8, max_download_bytes=2 * len(PNG) + 1)
    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(images.download, FOX)
    assert (most, len(events)) == (2, 8)
    with anyio.fail_after(5):
        assert await downloader(script(large), max_download_bytes=1).download(FOX) == PNG


@pytest.mark.parametrize(
    ("content", "suffix"),
    [(PNG, ".png"), (WEBP, ".webp"), (b"\xff\xd8\xff" + bytes(9), ".jpg"), (b"GIF89a" + bytes(9), ".gif")],
)
async def test_a_file_is_named_after_its_true_type(tmp_path: Path, content: bytes, suffix: str) -> None:
    """The suffix follows from the bytes, not from the URL."""
    whole = response(200, body=content, content_length=str(len(content)))
    saved = await downloader(script(whole)).store(FOX, FileImageStore(tmp_path), "fox")
    assert (saved.path, saved.path.read_bytes()) == (tmp_path / f"fox{suffix}", content)
    assert (saved.sha256, saved.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))


async def test_a_dot_in_a_name_is_not_taken_for_a_suffix(tmp_path: Path) -> None:
    """`v1.5` becomes `v1.5.png`."""
    assert (await downloader(script(WHOLE)).store(FOX, FileImageStore(tmp_path), "v1.5")).path == tmp_path / "v1.5.png"


async def test_an_existing_file_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    """A failed download leaves the old file and no partial one."""
    (tmp_path / "fox.png").write_bytes(b"old")
    with pytest.raises(ImageError):
        await downloader(script(response(200, body=PNG[:40]))).store(FOX, FileImageStore(tmp_path), "fox")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("fox.png", b"old")]
    await downloader(script(WHOLE)).store(FOX, FileImageStore(tmp_path), "fox")
    assert (tmp_path / "fox.png").read_bytes() == PNG


async def test_a_cancelled_download_leaves_no_partial_file(tmp_path: Path) -> None:
    """A cancelled download removes its partial file."""

    async def stuck(_: WireRequest) -> WireResponse:
        await anyio.sleep_forever()
        return WHOLE

    with anyio.move_on_after(0.05):
        await downloader(script(stuck)).store(FOX, FileImageStore(tmp_path), "fox")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fdopen", "fsync", "open"])
async def test_a_disk_error_is_an_image_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The task remains charged and can be saved again."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"nanobanana_async.images.files.os.{call}", full)
    with pytest.raises(ImageError, match="cannot be written: No space left on device"):
        await downloader(script(WHOLE)).store(FOX, FileImageStore(tmp_path), "fox")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "is_saved"),
    [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EBADF, True), (errno.EACCES, True), (errno.EIO, False)],
)
async def test_a_folder_that_cannot_be_synced_is_no_error_unless_the_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, *, is_saved: bool
) -> None:
    """A5: some network file systems cannot sync a folder, as SQLite knows, too."""
    sync = os.fsync

    def fails_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr("nanobanana_async.images.files.os.fsync", fails_for_folders)
    with contextlib.nullcontext() if is_saved else pytest.raises(ImageError):
        await downloader(script(WHOLE)).store(FOX, FileImageStore(tmp_path), "fox")
    assert (tmp_path / "fox.png").read_bytes() == PNG


@pytest.mark.parametrize(
    "hostile",
    [
        "../../etc/passwd",
        "C:\\x",
        "a:b",
        "nul\0",
        "x" * 300,
        "\u202egnp.exe",
        ".",
        "..",
        "",
        "-rf",
        "ta-1",
        ".a",
        "a/.b",
    ],
)
def test_remote_text_never_chooses_a_path(hostile: str) -> None:
    """A name has letters, digits, dashes, underscores and dots inside, at most eighty."""
    name = slugify(hostile)
    assert 1 <= len(name) <= 80
    assert all(character.isalnum() or character in "-_." for character in name)
    assert not name.startswith(("-", "."))
    assert name == Path(name).name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("夏の海", "夏の海"),
        ("青花瓷", "青花瓷"),
        ("plakat_zażółć", "plakat_zażółć"),
        ("cafe\u0301", "caf\u00e9"),
        ("हिन्दी", "हिन्दी"),
        ("CON", "CON-"),
        ("lpt1.draft", "lpt1.draft-"),
        ("a  b/c", "a-b-c"),
        ("v1.2", "v1.2"),
        ("🦊", "image"),
        ("海" * 100, "海" * 60),
    ],
)
def test_d2_letters_of_any_script_stay_in_a_name(text: str, name: str) -> None:
    """In one normal form, within 180 bytes, and never as a device name of Windows."""
    assert slugify(text) == name


@pytest.mark.parametrize(
    ("name", "saved"),
    [("f.jpg", "f.png"), ("f.PNG", "f.PNG"), ("f", "f.png"), ("f.v2", "f.v2.png"), (".png", ".png.png")],
)
async def test_d3_an_image_has_the_suffix_of_its_true_format(tmp_path: Path, name: str, saved: str) -> None:
    """Whatever suffix was asked for."""
    stored = await downloader(script(WHOLE)).store(FOX, FileImageStore(tmp_path), name)
    assert stored.path == tmp_path / saved


@pytest.mark.parametrize("encoding", ["", "Identity", "none", "utf-8", "aws-chunked", "gzip"])
async def test_t1_an_image_is_taken_whatever_encoding_is_stated(encoding: str) -> None:
    """Object stores state encodings that they did not apply. The bytes decide."""
    whole = response(200, body=PNG, content_length=str(len(PNG)), content_encoding=encoding)
    assert await downloader(script(whole)).download(FOX) == PNG


@pytest.mark.parametrize("url", ["https://files.example/a fox.png", "https://files.example/füchse/1.png?name=fuchs ä"])
async def test_t1_a_url_is_encoded_as_browsers_do(url: str) -> None:
    """A charged image is not lost for a blank in its name."""
    transport = script(WHOLE)
    assert await downloader(transport).download(GeneratedImage(url=url)) == PNG
    (request,) = transport.requests
    assert request.url.isascii()
    assert " " not in request.url


@pytest.mark.parametrize("extra", [b"\n", b"\0\0\0", b"<!-- served by cdn -->"])
async def test_t1_bytes_after_the_end_of_an_image_do_not_make_it_truncated(extra: bytes) -> None:
    """Without a length, the trailer may be followed by padding."""
    assert await downloader(script(response(200, body=PNG + extra))).download(FOX) == PNG + extra
