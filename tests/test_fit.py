"""Reference images are made to fit: upright, in sRGB, small enough. Or they are uploaded, or sent as they are."""

import base64
import io
import json
import random
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from PIL import Image, ImageCms

from nanobanana_async import (
    GenerationRequest,
    ImageError,
    ImageSource,
    InvalidBatchFile,
    InvalidRequest,
    JsonValue,
    NanoBananaClient,
    NotSent,
    ReferencePolicy,
    read_rows,
)
from nanobanana_async.simulator import FAST_POLLING, FAST_PROFILE, Simulator
from nanobanana_async.simulator.in_memory import tiny_png
from nanobanana_async.simulator.server import SimulatorServer
from tests.commands import nanobanana
from tests.fakes import PNG

pytestmark = pytest.mark.anyio

MIB = 2**20
SHRINK = ReferencePolicy(on_too_large="shrink")


def noise(width: int, height: int) -> Image.Image:
    """Return an image that compresses badly, like a photo at night; its left upper corner is red."""
    image = Image.frombytes("RGB", (width, height), random.Random(1).randbytes(3 * width * height))
    image.paste((255, 0, 0), (0, 0, width // 4, height // 4))
    return image


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:  # noqa: ANN401 - passed to Pillow
    """Return the encoded image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sideways(image: Image.Image, **options: Any) -> bytes:  # noqa: ANN401 - passed to Pillow
    """Return a JPEG as a phone stores it: turned, with the orientation in EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a phone"
    return encoded(image.transpose(Image.Transpose.ROTATE_90), exif=exif, **options)


async def sent(policy: ReferencePolicy, *images: ImageSource, **options: object) -> list[str]:
    """Return the images of a submit as the service receives them."""
    simulator, bodies = Simulator(), list[bytes]()
    handle = simulator.service.handle

    def record(method: str, url: str, headers: dict[str, str], body: bytes) -> object:
        bodies.append(body)
        return handle(method, url, headers, body)

    simulator.service.handle = record  # type: ignore[method-assign,assignment]
    async with NanoBananaClient("dk-test", transport=simulator, polling=FAST_POLLING, references=policy) as client:
        with suppress(InvalidRequest):  # the simulator keeps to the documented limit of four
            await client.submit(GenerationRequest("a fox", images=images, **options))  # type: ignore[arg-type]
    images_sent: list[str] = json.loads(bodies[0])["images"]
    return images_sent


def decoded(uri: str) -> Image.Image:
    """Return the image of a data URI."""
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    image.load()
    return image


async def test_a_large_photo_that_lies_on_its_side_is_sent_upright_and_small_enough(tmp_path: Path) -> None:
    """12 MB from a phone. The orientation is applied, and what EXIF says of the place is not sent."""
    path = tmp_path / "IMG_0001.jpg"
    path.write_bytes(sideways(noise(4000, 3000), quality=95))
    assert path.stat().st_size > 11 * MIB
    (uri,) = await sent(attrs.evolve(SHRINK, max_bytes=2 * MIB, max_side_px=2048), path)
    image = decoded(uri)
    assert len(uri) * 3 // 4 <= 2 * MIB
    assert image.format == "JPEG"
    assert max(image.size) <= 2048
    assert image.width / image.height == pytest.approx(4 / 3, rel=0.01)
    red, green, blue = image.convert("RGB").resize((4, 3), Image.Resampling.BOX).getpixel((0, 0))  # type: ignore[misc]
    assert (red > 150, green < 100, blue < 100) == (True, True, True)
    assert not image.getexif()


async def test_an_image_that_fits_is_sent_byte_for_byte() -> None:
    """Encoding it again would cost quality."""
    data = encoded(noise(64, 48))
    (uri,) = await sent(SHRINK, data)
    assert base64.b64decode(uri.partition(",")[2]) == data


async def test_without_shrinking_a_large_image_is_an_error_that_names_the_way_out() -> None:
    """Nothing is sent."""
    with pytest.raises(ImageError, match="--shrink-references"):
        await sent(ReferencePolicy(max_bytes=1000), PNG * 200)


async def test_transparent_parts_stay_transparent() -> None:
    """As WebP, for a PNG of photos is large."""
    image = noise(600, 600).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((600, 600)))
    (uri,) = await sent(attrs.evolve(SHRINK, max_side_px=300), encoded(image, "PNG"))
    found = decoded(uri)
    assert (found.format, found.mode, found.size) == ("WEBP", "RGBA", (300, 300))


async def test_other_colour_spaces_become_srgb() -> None:
    """A profile is converted, and CMYK, which the service may not read, is too."""
    wide = encoded(
        Image.new("RGB", (400, 400), (0, 255, 0)),
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    )
    cmyk = encoded(Image.new("CMYK", (400, 400), (0, 255, 255, 0)))
    for uri in await sent(attrs.evolve(SHRINK, max_side_px=100), wide, cmyk):
        found = decoded(uri)
        assert (found.mode, found.size) == ("RGB", (100, 100))
        assert "icc_profile" not in found.info


async def test_a_damaged_profile_is_ignored_and_16_bits_keep_their_brightness() -> None:
    """Neither is a reason to fail, or to send a white image."""
    damaged = encoded(noise(400, 400), icc_profile=b"no profile")
    grey = io.BytesIO()
    Image.frombytes("I;16", (400, 400), (20000).to_bytes(2, "little") * 160_000).save(grey, "PNG")
    first, second = await sent(attrs.evolve(SHRINK, max_side_px=100), damaged, grey.getvalue())
    assert decoded(first).size == (100, 100)
    assert decoded(second).convert("L").getpixel((50, 50)) == pytest.approx(78, abs=2)


async def test_an_image_wider_than_a_webp_can_be_is_shrunk() -> None:
    """Side by side panels with transparent parts."""
    wide = encoded(Image.new("RGBA", (20_000, 8), (255, 0, 0, 100)), "PNG")
    (uri,) = await sent(attrs.evolve(SHRINK, max_bytes=20_000), wide + bytes(30_000))
    assert decoded(uri).width <= 16383


async def test_heic_is_sent_as_jpeg(tmp_path: Path) -> None:
    """Phones store it. The service does not take it."""
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    path = tmp_path / "IMG_0002.HEIC"
    path.write_bytes(encoded(noise(320, 240), "HEIF"))
    (uri,) = await sent(SHRINK, path)
    assert (decoded(uri).format, decoded(uri).size) == ("JPEG", (320, 240))
    (tmp_path / "rows.csv").write_text(f"prompt,images\na fox,{path.name}\n")
    assert len(read_rows(tmp_path / "rows.csv", references=SHRINK)) == 1
    with pytest.raises(InvalidBatchFile):
        read_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize("policy", [ReferencePolicy(), SHRINK], ids=["error", "shrink"])
@pytest.mark.parametrize(
    "image",
    [
        pytest.param("data:,", id="empty data URI"),
        pytest.param("data:image/png;base64,", id="no data"),
        pytest.param("data:text/plain;base64,aGVsbG8=", id="text in a data URI"),
        pytest.param(b"hello, this is no image", id="text"),
        pytest.param(encoded(noise(64, 64))[:2000], id="truncated"),
        pytest.param(encoded(noise(64, 64), "PNG")[:2000], id="truncated PNG"),
        pytest.param(b"", id="nothing"),
    ],
)
async def test_what_is_no_whole_image_is_refused_before_it_costs_anything(
    policy: ReferencePolicy, image: ImageSource
) -> None:
    """Shrinking would fill the missing part with grey."""
    simulator = Simulator()
    async with NanoBananaClient("dk-test", transport=simulator, references=policy) as client:
        with pytest.raises((ImageError, ValueError)):
            await client.submit("a fox", images=[image])
    assert not simulator.charges


async def test_a_reference_is_sent_as_the_url_that_the_application_has_stored_it_under() -> None:
    """URLs are sent as they are."""
    stored: list[bytes] = []

    async def upload(data: bytes) -> str:
        stored.append(data)
        return f"https://cdn.example/{len(stored)}.png"

    images = await sent(ReferencePolicy(upload=upload), PNG, "https://a.example/x.png")
    assert images == ["https://cdn.example/1.png", "https://a.example/x.png"]
    assert stored == [PNG]


async def test_large_references_are_encoded_one_request_after_the_other() -> None:
    """Encoding takes three times their size."""
    at_once = most = 0

    async def upload(_: bytes) -> str:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await anyio.sleep(0.05)
        at_once -= 1
        return "https://cdn.example/1.png"

    policy = ReferencePolicy(upload=upload, max_bytes=64 * MIB)
    async with (
        NanoBananaClient("dk-test", transport=Simulator(), references=policy) as client,
        anyio.create_task_group() as group,
    ):
        for number in range(3):
            group.start_soon(partial(client.submit, f"fox {number}", images=[PNG + bytes(40 * MIB)]))
    assert most == 1


@pytest.mark.parametrize("answer", ["fox.png", OSError("bucket is gone"), None])
async def test_an_upload_that_fails_costs_nothing(answer: object) -> None:
    """Also if it returns no URL."""

    async def upload(_: bytes) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[return-value]

    simulator = Simulator()
    policy = ReferencePolicy(upload=upload)
    async with NanoBananaClient("dk-test", transport=simulator, references=policy) as client:
        with pytest.raises((ImageError, NotSent)):
            await client.submit("a fox", images=[PNG])
    assert not simulator.charges


async def test_more_than_four_images_can_be_sent_unchecked() -> None:
    """The service may allow more than it documents."""
    urls: list[JsonValue] = [f"https://a.example/{number}.png" for number in range(6)]
    assert await sent(ReferencePolicy(), extra={"images": urls}) == urls
    with pytest.raises(ValueError, match="images"):
        GenerationRequest("a fox", images=["https://a.example/0.png"], extra={"images": urls})


@pytest.mark.other_clients
def test_the_commands_shrink_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the option, the error names it."""
    (tmp_path / "photo.jpg").write_bytes(sideways(noise(4000, 3000), quality=95))
    (tmp_path / "rows.csv").write_text("prompt,images\na fox,photo.jpg\n")
    quick = ("--poll", "0.05")
    with SimulatorServer(FAST_PROFILE, render=tiny_png) as server:
        monkeypatch.setenv("DEFAPI_API_KEY", "dk-test")
        monkeypatch.setenv("DEFAPI_BASE_URL", server.url)
        image = ("--image", str(tmp_path / "photo.jpg"), "-o", str(tmp_path / "out"))
        refused = nanobanana("generate", "a fox", *image, *quick)
        assert (refused.code, len(server.charges)) == (1, 0)
        assert "--shrink-references" in refused.err
        assert nanobanana("generate", "a fox", *image, *quick, "--shrink-references").code == 0
        rows = (str(tmp_path / "rows.csv"), "--out", str(tmp_path / "run"))
        refused = nanobanana("batch", *rows, *quick)
        assert "--shrink-references" in refused.err
        assert nanobanana("batch", *rows, *quick, "--shrink-references").code == 0
        assert len(server.charges) == 2
