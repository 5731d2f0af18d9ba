"""Reference images are encoded as the service accepts them."""

import base64
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nanobanana_async import GenerationRequest, ImageError, ImageInfo
from nanobanana_async.images.formats import read_info, sniff
from nanobanana_async.images.references import encode_images
from nanobanana_async.models import ImageSource
from nanobanana_async.policies import ReferencePolicy
from tests.fakes import PNG

pytestmark = pytest.mark.anyio

MIB = 2**20
PNG_URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def encoded(kind: str) -> bytes:
    """Return an image in one of the formats."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(file, format=kind)
    return file.getvalue()


async def encoded_images(images: tuple[ImageSource, ...]) -> tuple[ImageSource, ...]:
    """Return the images of a request as they are sent."""
    return (
        await encode_images(GenerationRequest("a fox", images=images), _reserve, policy=ReferencePolicy(max_bytes=MIB))
    ).images


async def _reserve(_: int) -> None:
    """Have any amount of memory."""


async def test_urls_and_data_uris_are_sent_unchanged() -> None:
    """The service downloads or decodes them."""
    images: tuple[ImageSource, ...] = ("https://a.example/1.png", PNG_URI)
    assert await encoded_images(images) == images


async def test_files_and_bytes_become_data_uris(tmp_path: Path) -> None:
    """The order is kept."""
    path = tmp_path / "fox.txt"
    path.write_bytes(PNG)
    assert await encoded_images((path, PNG)) == (PNG_URI, PNG_URI)


async def test_a_pil_image_is_sent_as_png() -> None:
    """PNG is lossless for any source format."""
    (uri,) = await encoded_images((Image.new("RGB", (3, 2), "red"),))
    assert isinstance(uri, str)
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (3, 2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
async def test_the_type_is_detected_from_the_bytes(kind: str) -> None:
    """File names may be wrong."""
    (uri,) = await encoded_images((encoded(kind),))
    assert isinstance(uri, str)
    assert uri.startswith(f"data:image/{kind.lower()};base64,")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        pytest.param("none.png", None, "No such file", id="missing"),
        pytest.param(".", None, "cannot be read", id="a-folder"),
        pytest.param("page.png", b"<html>", "not a PNG, JPEG, WebP or GIF", id="html"),
        pytest.param("empty.png", b"", "is empty", id="empty"),
        pytest.param("big.png", PNG + bytes(MIB), "expected at most 1.0 MiB", id="too-big"),
    ],
)
async def test_an_unusable_file_is_named_in_the_error(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    """The error has the path and the reason, before anything is charged."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=says) as caught:
        await encoded_images((path,))
    assert str(path) in str(caught.value)


async def test_a_pipe_is_rejected_without_blocking(tmp_path: Path) -> None:
    """Opening a pipe would wait for a writer."""
    os.mkfifo(tmp_path / "fox.png")
    with pytest.raises(ImageError, match="expected a regular file"):
        await encoded_images((tmp_path / "fox.png",))


async def test_a_data_uri_has_the_same_limit() -> None:
    """The size limit applies to the decoded image."""
    with pytest.raises(ImageError, match="the data URI"):
        await encoded_images((PNG_URI + "A" * 2 * MIB,))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "lossy", "lossless", "animated"])
def test_the_size_of_an_image_is_read_from_its_header(kind: str) -> None:
    """Formats differ in order and place of width and height."""
    file, image = io.BytesIO(), Image.new("RGBA" if kind == "lossless" else "RGB", (300, 200), "red")
    if kind == "animated":
        image.save(file, format="WEBP", save_all=True, append_images=[Image.new("RGB", (300, 200), "blue")])
    else:
        options = {"lossless": True} if kind == "lossless" else {}
        image.save(file, format="WEBP" if kind in ("lossy", "lossless") else kind, **options)
    data = file.getvalue()
    name = "webp" if "WEBP" in repr(data[:12]) else kind.lower()
    assert read_info(data) == ImageInfo(format=name, width=300, height=200)
    found = sniff(data)
    assert found is not None
    assert [found.is_complete(data), found.is_complete(data + b"\0\0"), found.is_complete(data[:-9])] == [
        True,
        True,
        False,
    ]


@given(st.binary(max_size=80), st.sampled_from([PNG[:8], b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8X"]))
def test_any_header_has_a_size_or_none(rest: bytes, start: bytes) -> None:
    """Damaged files raise nothing."""
    info = read_info(start + rest)
    assert info is None or (info.width is None) == (info.height is None)
