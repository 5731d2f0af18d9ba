"""`Thumbnails`: small copies of large images, so that a gallery of thousands opens at once. Blocking. Needs Pillow."""

import io
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from nanobanana_async.images.files import replacing

_FOLDER_NAME: Final = ".thumbnails"
_SIDE_PX: Final = 640
"""Twice the width of a card, for screens with two pixels per pixel."""
_MIN_BYTES: Final = 200_000
"""A smaller image is its own thumbnail."""
_MAX_PIXELS: Final = 2**25
"""Twice a 4k. A larger image is not decoded, which takes 4 bytes per pixel."""


class Thumbnails:
    """Thumbnails of the images in *folder*. Missing ones are made until *max_s* have passed, others by the next report.

    Without Pillow there are none.
    """

    def __init__(self, folder: Path, max_s: float) -> None:
        self._folder = folder
        self._until_s = time.monotonic() + max_s

    def link(self, image: Path) -> str:
        """Return the thumbnail of *image*, relative to the folder; the name of the image itself if it has none."""
        thumbnail = self._folder / _FOLDER_NAME / f"{image.name}.webp"
        with suppress(OSError):
            found = image.stat()
            if found.st_size >= _MIN_BYTES and (_is_newer(thumbnail, found.st_mtime) or self._make(image, thumbnail)):
                return f"{_FOLDER_NAME}/{thumbnail.name}"
        return image.name

    def _make(self, image: Path, thumbnail: Path) -> bool:
        if time.monotonic() > self._until_s or thumbnail.parent.is_symlink():
            return False
        try:
            from PIL import Image  # noqa: PLC0415 - an extra

            with Image.open(image) as opened:
                if opened.width * opened.height > _MAX_PIXELS:
                    return False
                opened.draft("RGB", (_SIDE_PX, _SIDE_PX))  # a JPEG is decoded in a coarser form
                opened.thumbnail((_SIDE_PX, _SIDE_PX))
                small, file = opened.convert("RGBA" if opened.has_transparency_data else "RGB"), io.BytesIO()
                small.save(file, format="WEBP", quality=80)
        except Exception:  # noqa: BLE001 - Pillow is not installed, or refuses the file: the image is shown itself
            return False
        with replacing(thumbnail, is_durable=False) as target:
            target.write(file.getvalue())
        return True


def _is_newer(thumbnail: Path, than_s: float) -> bool:
    with suppress(OSError):
        return thumbnail.stat().st_mtime >= than_s
    return False
