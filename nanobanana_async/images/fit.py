"""Make a reference image fit: turned upright, in sRGB, and small enough. Blocking. Needs Pillow.

Phones store photos of 12 MB sideways, with a note of the orientation (EXIF) that services ignore, and in HEIC.
"""

import importlib.util
import io
import math
import sys
import threading
from typing import TYPE_CHECKING, Final, cast

from nanobanana_async.errors import ImageError
from nanobanana_async.images.formats import SNIFF_BYTES, sniff

if TYPE_CHECKING:
    from PIL import Image

_ORIENTATION: Final = 0x0112
"""EXIF tag: 1 is upright."""
_QUALITY: Final = 92
"""Of JPEG and WebP: no difference is visible, at a fifth of the size of a PNG."""
_MIN_SIDE_PX: Final = 64
_MAX_SIDE_PX: Final = 16383
"""Longest side of a WebP."""
_ONE_AT_A_TIME: Final = threading.Lock()
"""A photo of 48 megapixels takes 150 MB while it is decoded, and the work uses one core."""


def fit(name: str, data: bytes, *, max_side_px: int | None, max_bytes: int) -> bytes:
    """Return *data* unchanged if it is upright, small enough and of a format that the service takes, else a new image.

    The new one is a JPEG, or a WebP if it has transparent parts. It keeps the proportions, and its colours are in sRGB.
    An animation is reduced to its first image.

    Raises:
        ImageError: Pillow is not installed, or cannot read the image.
    """
    try:
        from PIL import Image, ImageOps  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise ImageError(f"{name}: shrinking needs Pillow: pip install 'nanobanana-async[images]'") from None
    _register_heif()
    with _ONE_AT_A_TIME:
        try:
            with Image.open(io.BytesIO(data)) as image:
                side_px = max(image.size)
                limit_px = min(side_px, max_side_px or _MAX_SIDE_PX, _MAX_SIDE_PX)
                is_upright = image.getexif().get(_ORIENTATION, 1) == 1
                if sniff(data[:SNIFF_BYTES]) and is_upright and limit_px == side_px and len(data) <= max_bytes:
                    return data
                image.draft("RGB", (limit_px, limit_px))  # a JPEG is decoded at half or a quarter, if that is enough
                upright = _to_srgb(ImageOps.exif_transpose(image))
            return _shrunk(upright, limit_px, max_bytes)
        except ImageError:
            raise
        except Exception as exc:
            raise ImageError(_problem(name, exc)) from exc


def check_readable(name: str, data: bytes) -> None:
    """Check that Pillow reads all of *data*, such as a HEIC.

    Raises:
        ImageError: It does not.
    """
    try:
        from PIL import Image  # noqa: PLC0415 - an extra

        _register_heif()
        with _ONE_AT_A_TIME, Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as exc:
        raise ImageError(_problem(name, exc)) from exc


def _problem(name: str, exc: Exception) -> str:
    if "cannot identify" in str(exc):
        return f"{name}: not an image, or a HEIC. To read HEIC, run: pip install pillow-heif"
    return f"{name}: cannot be shrunk: {type(exc).__name__}: {exc}"


def _shrunk(image: "Image.Image", side_px: int, max_bytes: int) -> bytes:
    """Return the encoded image with sides of at most *side_px*, and smaller ones until it has *max_bytes*."""
    while True:
        smaller = image.copy()
        smaller.thumbnail((side_px, side_px))
        file = io.BytesIO()
        smaller.save(file, format="WEBP" if image.mode == "RGBA" else "JPEG", quality=_QUALITY)
        size_bytes = file.tell()
        if size_bytes <= max_bytes:
            return file.getvalue()
        if side_px <= _MIN_SIDE_PX:
            raise ImageError(f"the image: cannot be shrunk to {max_bytes} bytes")
        side_px = max(_MIN_SIDE_PX, int(side_px * min(0.9, math.sqrt(max_bytes / size_bytes))))


def _to_srgb(image: "Image.Image") -> "Image.Image":
    """Return the image as RGB, or RGBA if it has transparent parts, in the colours of sRGB."""
    from PIL import Image, ImageCms  # noqa: PLC0415 - an extra

    profile = image.info.get("icc_profile")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            srgb = cast("io.BytesIO", ImageCms.createProfile("sRGB"))  # pyright: ignore[reportUnknownMemberType]
            target = ImageCms.ImageCmsProfile(srgb)  # which also takes the profile that is not annotated
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            image = converted or image
        except (ImageCms.PyCMSError, OSError):  # a damaged profile: the colours are taken as sRGB
            pass
    if image.mode.startswith("I"):  # 16 bits per pixel, of which `convert` would keep the lower ones
        upper = slice(1, None, 4) if sys.byteorder == "little" else slice(2, None, 4)
        image = Image.frombytes("L", image.size, image.convert("I").tobytes()[upper])
    image = image.convert(mode)
    image.info.clear()  # no profile and no EXIF with the place of the photo
    return image


def _register_heif() -> None:
    """Let Pillow read HEIC, if pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
