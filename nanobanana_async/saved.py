"""Image files that were saved, and in what they differ from what was requested."""

import enum
from pathlib import Path

import attrs


@attrs.frozen(kw_only=True)
class ImageInfo:
    """What the header of an encoded image states.

    Attributes:
        format: `"png"`, `"jpeg"`, `"webp"` or `"gif"`.
        width: Width in pixels; None if the header is damaged.
        height: Height in pixels; None if the header is damaged.
    """

    format: str
    width: int | None
    height: int | None


class MismatchKind(enum.StrEnum):
    """In what an image is not as requested.

    Attributes:
        SIZE: Its area is that of another `image_size`.
        RATIO: Its sides differ from `aspect_ratio` by more than 4 %.
        TRUNCATED: Its file ends too early, at the file host itself.
        BLANK: It has one colour all over. Checked where Pillow is installed.
        REPEATED: It has the bytes of an image of another task of this client.
        REFERENCE: It has the bytes of a reference image.
    """

    SIZE = "size"
    RATIO = "ratio"
    TRUNCATED = "truncated"
    BLANK = "blank"
    REPEATED = "repeated"
    REFERENCE = "reference"


@attrs.frozen(kw_only=True)
class Mismatch:
    """One difference between the image that was requested and the one that was delivered.

    Attributes:
        kind: In what they differ.
        requested: What was requested, such as `"4k"`; "" where nothing special was.
        delivered: What was delivered, such as `"1k"`.
        message: The difference as a sentence.
    """

    kind: MismatchKind = attrs.field(converter=MismatchKind)
    requested: str
    delivered: str
    message: str


@attrs.frozen(kw_only=True)
class SavedImage:
    """An image file that was checked and written durably. It is path-like: `open(saved)` opens the file.

    Attributes:
        path: Where the image is.
        sha256: Hex digest of the file.
        size_bytes: Size of the file.
        info: Format, width and height; None if it is not known. The client sets it.
        mismatch: In what the image is not as requested; () if in nothing. The client sets it.
    """

    path: Path
    sha256: str
    size_bytes: int
    info: ImageInfo | None = None
    mismatch: tuple[Mismatch, ...] = ()

    def __fspath__(self) -> str:
        return str(self.path)
