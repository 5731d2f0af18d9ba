"""What was requested against what was delivered, because services deliver less and charge for more.

Public reports of this family of models: 4096 pixels requested and 1536 delivered (fal-ai/fal 655), `image_size` without
an effect (googleapis/js-genai 897, lobehub/lobehub 13598).
"""

import base64
import binascii
import io
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio.to_thread
import attrs

from nanobanana_async._concurrency.fifo_cache import FifoCache
from nanobanana_async.images.formats import sniff
from nanobanana_async.models import GenerationRequest, ImageSource
from nanobanana_async.saved import ImageInfo, Mismatch, MismatchKind

if TYPE_CHECKING:
    from PIL import Image

_SIDES: Final = {"1k": 1024, "2k": 2048, "4k": 4096}
"""Side of the square that has the area of an `image_size`."""
_AREA_FACTOR: Final = 2.1
"""Areas of neighbouring sizes differ by a factor of 4. A little more than half of that, since 3840 x 2160 is a 4k."""
_RATIO_TOLERANCE: Final = 0.04
"""Sides are multiples of 16 or 32: 896 x 1152 for 4:5 is off by 2.8 %, 1584 x 672 for 21:9 by 1 %."""
_BLANK_BYTES_PER_PIXEL: Final = 0.05
"""A larger file is not blank, and need not be decoded. A blank one has 0.005."""
_MAX_BLANK_PIXELS: Final = 2**25
"""Twice a 4k. A larger image is not decoded, which takes 4 bytes per pixel."""
_ONE_AT_A_TIME: Final = threading.Lock()
_BLANK_SPREAD: Final = 4
"""Largest difference of a channel in a blank image: JPEG has some noise."""
_EDGE_BYTES: Final = 576
"""Begin and end of an image, which tell it from any other together with its length. A multiple of 3, for base64."""
_MAX_REQUESTS: Final = 10_000
_MAX_IMAGES: Final = 100_000

_Edges: TypeAlias = tuple[int, bytes, bytes]


@attrs.frozen
class RequestedImage:
    """The part of a request that an image can be compared with."""

    image_size: str | None
    aspect_ratio: str | None
    references: tuple[Path | _Edges, ...] = ()

    @classmethod
    def from_request(cls, request: GenerationRequest) -> "RequestedImage":
        """Return what *request* says about its image. Reads no files."""
        references = tuple(one for image in request.images if (one := _reference(image)) is not None)
        return cls(request.image_size, request.aspect_ratio, references)


class DeliveryCheck:
    """Compares the images of one client with what was requested. It knows the last 10,000 requests."""

    def __init__(self) -> None:
        self._requested: FifoCache[RequestedImage] = FifoCache(_MAX_REQUESTS)
        self._task_ids: FifoCache[str] = FifoCache(_MAX_IMAGES)
        """Tasks by the hash of their images."""
        self.counts: Final[Counter[MismatchKind]] = Counter()
        """Mismatches found."""

    def remember(self, task_id: str, request: GenerationRequest) -> None:
        """Keep what *request* says about the image of *task_id*."""
        if request.image_size or request.aspect_ratio or request.images:
            self._requested.add(task_id, RequestedImage.from_request(request))

    async def check(
        self, data: bytes, info: ImageInfo, sha256: str, task_id: str | None, request: GenerationRequest | None = None
    ) -> tuple[Mismatch, ...]:
        """Return in what the encoded image *data* of *task_id* is not as requested. Counts it. Never raises.

        *sha256* is its hash, or "". *request* None stands for the remembered one.
        """
        if request is not None:
            requested: RequestedImage | None = RequestedImage.from_request(request)
        else:
            requested = self._requested.get(task_id or "")
        found = list(compare(requested, info)) if requested is not None else []
        if (image_format := sniff(data)) is not None and not image_format.is_complete(data):
            found.append(_mismatch(MismatchKind.TRUNCATED, "", "a part", "the image file ends too early"))
        if requested is not None and requested.references:
            found += await anyio.to_thread.run_sync(_equal_reference, data, requested.references)
        pixels = (info.width or 0) * (info.height or 0)
        if len(data) < _BLANK_BYTES_PER_PIXEL * pixels <= _BLANK_BYTES_PER_PIXEL * _MAX_BLANK_PIXELS:
            found += await anyio.to_thread.run_sync(_blank, data)
        found += self._repeated(sha256, task_id)
        self.counts.update(one.kind for one in found)
        return tuple(found)

    def _repeated(self, sha256: str, task_id: str | None) -> Iterator[Mismatch]:
        if sha256 and task_id is not None:
            self._task_ids.add(sha256, task_id)
            if (first := self._task_ids.get(sha256)) != task_id:
                yield _mismatch(MismatchKind.REPEATED, "", f"task {first}", f"the same image as that of task {first}")


def compare(requested: RequestedImage, info: ImageInfo) -> Iterator[Mismatch]:
    """Yield in what size and ratio of *info* are not as *requested*. Pure."""
    if not info.width or not info.height:
        return
    pixels = f"{info.width} x {info.height}"
    size, area = requested.image_size or "", info.width * info.height
    if size in _SIDES and not 1 / _AREA_FACTOR < area / _SIDES[size] ** 2 < _AREA_FACTOR:
        nearest = min(_SIDES, key=lambda name: abs(math.log(area / _SIDES[name] ** 2)))
        delivered = nearest if nearest != size else pixels
        yield _mismatch(MismatchKind.SIZE, size, delivered, f"requested {size}, delivered {delivered} ({pixels})")
    ratio = requested.aspect_ratio or "auto"
    if ratio != "auto":
        wide, high = map(int, ratio.split(":"))
        if abs(info.width * high / (info.height * wide) - 1) > _RATIO_TOLERANCE:
            delivered = _nearest_ratio(info.width / info.height)
            yield _mismatch(
                MismatchKind.RATIO, ratio, delivered, f"requested {ratio}, delivered {delivered} ({pixels})"
            )


_RATIOS: Final = ("1:1", "16:9", "21:9", "2:3", "3:2", "3:4", "4:3", "4:5", "5:4", "9:16")
"""Ratios that public clients of the service offer."""


def _nearest_ratio(value: float) -> str:
    """Return the ratio of the service that is *value* within the tolerance, else the number."""
    for ratio in _RATIOS:
        wide, high = map(int, ratio.split(":"))
        if abs(value * high / wide - 1) <= _RATIO_TOLERANCE:
            return ratio
    return f"{value:.2f}:1"


def _mismatch(kind: MismatchKind, requested: str, delivered: str, message: str) -> Mismatch:
    return Mismatch(kind=kind, requested=requested, delivered=delivered, message=message)


def _reference(image: ImageSource) -> Path | _Edges | None:
    """Return what tells whether an image is this reference; None for a URL or a PIL image."""
    if isinstance(image, Path):
        return image
    if isinstance(image, bytes):
        return _edges(image)
    if not isinstance(image, str) or image[:5].lower() != "data:":
        return None
    payload = image.partition(",")[2].rstrip()
    chars = _EDGE_BYTES * 4 // 3
    with suppress(binascii.Error):
        head, tail = base64.b64decode(payload[:chars]), base64.b64decode(payload[-chars:])
        return len(payload) // 4 * 3 - payload.count("=", -2), head, tail[-_EDGE_BYTES + 3 :]
    return None


def _edges(data: bytes) -> _Edges:
    return len(data), data[:_EDGE_BYTES], data[-_EDGE_BYTES + 3 :]


def _equal_reference(data: bytes, references: Iterable[Path | _Edges]) -> list[Mismatch]:
    """Return a mismatch if *data* is one of *references*. Blocking."""
    edges = _edges(data)
    for reference in references:
        with suppress(OSError):
            is_equal = edges == reference
            if isinstance(reference, Path):
                is_equal = reference.stat().st_size == len(data) and reference.read_bytes() == data
            if is_equal:
                message = "the reference image came back unchanged"
                return [_mismatch(MismatchKind.REFERENCE, "", "a reference image", message)]
    return []


def _blank(data: bytes) -> list[Mismatch]:
    """Return a mismatch if *data* has one colour all over. Blocking. Needs Pillow."""
    try:
        from PIL import Image  # noqa: PLC0415 - an extra

        with _ONE_AT_A_TIME, Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (image.width // 8, image.height // 8))  # a JPEG is decoded in a coarser form
            spread = _spread(image)
    except Exception:  # noqa: BLE001 - Pillow is not installed, or refuses the file: there is no finding
        return []
    if spread > _BLANK_SPREAD:
        return []
    return [_mismatch(MismatchKind.BLANK, "", "one colour", "the image has one colour all over")]


def _spread(image: "Image.Image") -> float:
    """Return the largest difference within a channel. Large images are not converted, which would take 64 MiB."""
    if image.mode == "P":
        palette, used = (
            image.getpalette() or [],
            {index for _, index in image.getcolors() or () if isinstance(index, int)},
        )
        channels: Iterable[tuple[float, ...]] = zip(*(palette[3 * at : 3 * at + 3] for at in used), strict=True)
        return max(max(channel) - min(channel) for channel in channels)
    bands = (band.getextrema() for band in image.split())
    return max(
        float(high) - float(low) for low, high in bands if not isinstance(low, tuple) and not isinstance(high, tuple)
    )
