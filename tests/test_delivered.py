"""Images that are not as requested are found, and no others."""

import base64
import csv
import io
import json
import random
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nanobanana_async import (
    Batch,
    BatchRow,
    GenerationRequest,
    ImageInfo,
    MismatchKind,
    NanoBananaClient,
    SavedImage,
    Succeeded,
)
from nanobanana_async.images.delivered import RequestedImage, compare
from nanobanana_async.images.formats import read_info, sniff
from nanobanana_async.simulator import FAST_POLLING, FAST_PROFILE, Simulator, SimulatorProfile
from nanobanana_async.simulator.in_memory import tiny_png
from nanobanana_async.simulator.render import render_png
from nanobanana_async.simulator.server import SimulatorServer
from nanobanana_async.simulator.specs import ImageSpec
from tests.commands import nanobanana

pytestmark = pytest.mark.anyio


# --- headers ----------------------------------------------------------------------------------------------------------

_MODES = {
    "PNG": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
}
_OPTIONS: dict[str, tuple[dict[str, object], ...]] = {
    "PNG": ({}, {"optimize": True}, {"dpi": (300, 300)}),
    "JPEG": (
        {},
        {"progressive": True},
        {"optimize": True, "quality": 30},
        {"dpi": (72, 72), "comment": b"\xff\xd8\xff\xc0"},
    ),
    "WEBP": ({}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}, {"quality": 5}),
    "GIF": ({}, {"save_all": True}, {"interlace": 0}),
}
_SIZES = ((1, 1), (3, 5), (64, 48), (257, 129), (1344, 768), (17, 4000), (1024, 1024))


def test_headers_agree_with_pillow_in_all_formats_and_modes() -> None:
    """Over 300 images: modes, options, sizes."""
    wrong, count = [], 0
    for kind, modes in _MODES.items():
        for mode in modes:
            for options in _OPTIONS[kind]:
                for size in _SIZES:
                    file = io.BytesIO()
                    Image.new(mode, size).save(file, format=kind, **options)
                    count += 1
                    if read_info(file.getvalue()) != ImageInfo(format=kind.lower(), width=size[0], height=size[1]):
                        wrong.append((kind, mode, options, size))
    assert wrong == []
    assert count > 300


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]), st.data())
def test_a_damaged_header_gives_a_size_or_none(kind: str, data: st.DataObject) -> None:
    """Bytes are changed, and the file is cut."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, format=kind)
    damaged = bytearray(file.getvalue())
    for at in data.draw(st.lists(st.integers(4, len(damaged) - 1), max_size=8)):
        damaged[at] = data.draw(st.integers(0, 255))
    info = read_info(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    assert info is None or (info.width is None) == (info.height is None)


# --- size and ratio ---------------------------------------------------------------------------------------------------


def kinds_of(image_size: str | None, aspect_ratio: str | None, width: int, height: int) -> list[str]:
    """Return the kinds of mismatch of a PNG."""
    info = ImageInfo(format="png", width=width, height=height)
    return [one.kind.value for one in compare(RequestedImage(image_size, aspect_ratio), info)]


@pytest.mark.parametrize(
    ("image_size", "aspect_ratio", "width", "height"),
    [
        ("1k", "1:1", 1024, 1024), ("1k", "16:9", 1344, 768), ("1k", "21:9", 1584, 672), ("1k", "4:5", 896, 1152),
        ("2k", "16:9", 2752, 1536), ("2k", "1:1", 2048, 2048), ("4k", "16:9", 5504, 3072), ("4k", "16:9", 3840, 2160),
        ("4k", None, 4096, 4096), (None, "2:3", 832, 1248), (None, None, 1, 1), ("1k", "auto", 768, 1344),
        ("8k", None, 1024, 1024), ("1024x1024", None, 64, 64),
    ],
)  # fmt: skip
def test_sizes_of_the_models_are_as_requested(
    image_size: str | None, aspect_ratio: str | None, width: int, height: int
) -> None:
    """Sides are rounded to multiples of 16 or 32, and a size that is not known is not compared."""
    assert kinds_of(image_size, aspect_ratio, width, height) == []


@pytest.mark.parametrize(
    ("image_size", "aspect_ratio", "width", "height", "message"),
    [
        ("4k", None, 1536, 1536, "requested 4k, delivered 2k (1536 x 1536)"),
        ("4k", None, 1024, 1024, "requested 4k, delivered 1k (1024 x 1024)"),
        ("2k", None, 1024, 1024, "requested 2k, delivered 1k (1024 x 1024)"),
        ("1k", None, 2048, 2048, "requested 1k, delivered 2k (2048 x 2048)"),
        ("1k", None, 512, 512, "requested 1k, delivered 512 x 512 (512 x 512)"),
        (None, "16:9", 1024, 1024, "requested 16:9, delivered 1:1 (1024 x 1024)"),
        (None, "16:9", 768, 1344, "requested 16:9, delivered 9:16 (768 x 1344)"),
        (None, "1:1", 1100, 1000, "requested 1:1, delivered 1.10:1 (1100 x 1000)"),
    ],
)
def test_another_size_or_ratio_is_named(
    image_size: str | None, aspect_ratio: str | None, width: int, height: int, message: str
) -> None:
    """With what was requested, what was delivered, and the pixels."""
    info = ImageInfo(format="png", width=width, height=height)
    (one,) = compare(RequestedImage(image_size, aspect_ratio), info)
    assert one.message == message


# --- through the client -----------------------------------------------------------------------------------------------


async def save_one(simulator: Simulator, tmp_path: Path, request: GenerationRequest) -> SavedImage:
    """Generate and save one image."""
    async with simulator.client() as client:
        (saved,) = await client.save(await client.generate(request), tmp_path)
        assert client.statistics().mismatches == dict(Counter(one.kind.value for one in saved.mismatch))
    return saved


@pytest.mark.parametrize(
    ("flaw", "kind"),
    [
        ("wrong_sizes", MismatchKind.SIZE),
        ("wrong_ratios", MismatchKind.RATIO),
        ("blank_images", MismatchKind.BLANK),
        ("truncated_images", MismatchKind.TRUNCATED),
    ],
)
async def test_a_saved_image_says_in_what_it_is_not_as_requested(tmp_path: Path, flaw: str, kind: MismatchKind) -> None:
    """The client remembers what was requested."""
    simulator = Simulator(SimulatorProfile.from_faults(flaw, median_s=0.02, visibility_delay_s=0))
    saved = await save_one(simulator, tmp_path, GenerationRequest("a fox", image_size="1k", aspect_ratio="4:3"))
    assert [one.kind for one in saved.mismatch] == [kind]
    assert Path(saved).read_bytes().startswith(b"\x89PNG")


async def test_an_image_as_requested_has_no_mismatch(tmp_path: Path) -> None:
    """And its header is read."""
    simulator = Simulator(FAST_PROFILE)
    saved = await save_one(simulator, tmp_path, GenerationRequest("a fox", image_size="1k", aspect_ratio="16:9"))
    assert (saved.mismatch, saved.info) == ((), ImageInfo(format="png", width=1360, height=768))


@pytest.mark.parametrize("form", ["file", "bytes", "data URI"])
async def test_a_reference_that_comes_back_is_noticed(tmp_path: Path, form: str) -> None:
    """The model has changed nothing, and the image was charged."""
    reference = render_png(ImageSpec(prompt="a hill", width=320, height=320))
    (tmp_path / "in.png").write_bytes(reference)
    forms: dict[str, Path | bytes | str] = {
        "file": tmp_path / "in.png",
        "bytes": reference,
        "data URI": f"data:image/png;base64,{base64.b64encode(reference).decode()}",
    }
    with SimulatorServer(FAST_PROFILE, render=lambda _: reference) as server:
        async with NanoBananaClient("dk-test", base_url=server.url, polling=FAST_POLLING) as client:
            (saved,) = await client.save(await client.generate("make it blue", images=[forms[form]]), tmp_path)
    assert [one.kind for one in saved.mismatch] == [MismatchKind.REFERENCE]


async def test_the_same_image_for_two_tasks_is_noticed_and_saving_twice_is_not(tmp_path: Path) -> None:
    """A cache at the service charges twice for one image."""
    async with Simulator(FAST_PROFILE).client() as client:
        first, second = await client.generate("a fox"), await client.generate("a fox")
        for task, expected in ((first, []), (first, []), (second, [MismatchKind.REPEATED])):
            (saved,) = await client.save(task, tmp_path)
            assert [one.kind for one in saved.mismatch] == expected


@pytest.mark.parametrize("fill", [b"\xff", b"\xff\x01\x00\x02"])
def test_a_jpeg_with_millions_of_segments_takes_no_time(fill: bytes) -> None:
    """Its size is not known then."""
    data = b"\xff\xd8" + fill * (2**24 // len(fill))
    began_s = time.perf_counter()
    info, image_format = read_info(data), sniff(data)
    assert image_format is not None
    image_format.is_complete(data)
    assert time.perf_counter() - began_s < 1
    assert info is not None
    assert info.width is None


# --- through a batch --------------------------------------------------------------------------------------------------

FLAWS = {"wrong_sizes": "size", "wrong_ratios": "ratio", "blank_images": "blank", "truncated_images": "truncated"}


async def test_in_a_batch_of_200_every_mismatch_is_found_and_none_falsely(tmp_path: Path) -> None:
    """As the simulator has recorded them; after a restart the ledger still has them."""
    profile = attrs.evolve(FAST_PROFILE, wrong_sizes=0.1, wrong_ratios=0.1, blank_images=0.1, truncated_images=0.05)
    simulator = Simulator(profile, seed=7)
    rng = random.Random(1)
    rows = [
        BatchRow(
            key=f"{number}",
            request=GenerationRequest(
                f"image {number}",
                image_size=rng.choice(["1k", "2k", "4k"]),
                aspect_ratio=rng.choice(["1:1", "16:9", "3:4"]),
            ),
        )
        for number in range(200)
    ]
    for replayed in (False, True):
        async with simulator.client() as client, Batch.open(tmp_path, client) as batch:
            found = {
                outcome.task.task_id: [one.kind.value for one in outcome.files[0].mismatch]
                async for outcome in batch.run(rows)
                if isinstance(outcome, Succeeded) and outcome.replayed is replayed
            }
        expected = {
            task_id: [FLAWS[task.flaw]] if task.flaw is not None else []
            for task_id, task in simulator.service.tasks.items()
        }
        assert found == expected
    assert sum(map(bool, expected.values())) > 30
    manifest = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert Counter(one["kind"] for line in manifest for file in line["files"] for one in file["mismatch"]) == Counter(
        kind for one in expected.values() for kind in one
    )
    with (tmp_path / "results.csv").open(encoding="utf-8-sig", newline="") as table:
        assert sum(bool(line["mismatch"]) for line in csv.DictReader(table)) == sum(map(bool, expected.values()))
    page = (tmp_path / "index.html").read_text()
    assert page.count("data-mismatch") == sum(map(bool, expected.values()))


@pytest.mark.other_clients
def test_the_commands_say_what_is_not_as_requested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a line of its own for each image, in the closing summary, and with --json."""
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\n")
    profile = attrs.evolve(FAST_PROFILE, wrong_sizes=1.0, price=Decimal(1))
    with SimulatorServer(profile, render=tiny_png) as server:
        monkeypatch.setenv("DEFAPI_BASE_URL", server.url)
        monkeypatch.setenv("DEFAPI_API_KEY", "dk-test")
        sizes = ("--model", "google/nano-banana-2", "--image-size", "4k", "--poll", "0.05")
        one = nanobanana("generate", "a fox", "-o", str(tmp_path / "one"), *sizes)
        many = nanobanana("batch", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"), *sizes)
        lines = nanobanana("generate", "a fox", "-o", str(tmp_path), *sizes, "--json")
    assert "requested 4k, delivered 2k (2048 x 2048)" in one.err
    assert "line 1 'a fox': requested 4k, delivered 2k (2048 x 2048)" in many.err
    assert "not as requested: 2 size." in many.err
    assert json.loads(lines.out)["mismatch"] == ["requested 4k, delivered 2k (2048 x 2048)"]
