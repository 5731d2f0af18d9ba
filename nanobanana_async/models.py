"""The values a user holds: a request, a task, an image. Frozen, checked where they are made, no I/O."""

import enum
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO, Final, Protocol, TypeAlias, TypedDict, runtime_checkable
from urllib.parse import urlsplit

import attrs

JsonValue: TypeAlias = "bool | int | float | Decimal | str | list[JsonValue] | dict[str, JsonValue] | None"

DEFAULT_MODEL: Final = "google/gempix2"
"""Nano Banana, as the vendor's documentation names it."""

MAX_IMAGES: Final = 4
"""Reference images per request (vendor's documentation)."""


@runtime_checkable
class SupportsSave(Protocol):
    """What we need of a `PIL.Image.Image`; Pillow itself is not required."""

    def save(self, fp: BinaryIO, format: str | None = None) -> None:  # noqa: A002 - Pillow's own name
        """Write the encoded picture to *fp*."""


ImageSource: TypeAlias = str | Path | bytes | SupportsSave
"""A reference image: a URL or data URI (`str`), a file (`Path`), encoded bytes, or a PIL image."""


class TaskStatus(enum.StrEnum):
    """Where a task stands. `UNKNOWN` is a word we do not know: the task counts as still running."""

    PENDING = "pending"
    SUBMITTED = "submitted"
    IN_PROGRESS = "in_progress"
    SUCCESS = "success"
    FAILED = "failed"
    UNRECOGNIZED = "unrecognized"

    @property
    def is_final(self) -> bool:
        """Whether the task will never change again."""
        return self in (TaskStatus.SUCCESS, TaskStatus.FAILED)


def url_problem(url: str) -> str | None:
    """Say what keeps *url* from being an absolute http(s) URL that is safe to send; None when nothing does."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return "has blanks, control or non-ASCII characters; percent-encode them"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as exc:
        return f"is not a URL ({exc})"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "is not an absolute http:// or https:// URL"
    if "@" in parts.netloc:
        return "carries a user name or password; leave them out"
    return None


def _abbreviated(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _repr_length(values: tuple[object, ...]) -> str:
    return f"<{len(values)}>"


def _check_text(_: object, field: "attrs.Attribute[str]", value: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{field.name}: expected str, got {_abbreviated(value)}")
    if not value.strip():
        raise ValueError(f"{field.name}: must not be empty, got {_abbreviated(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(
            f"{field.name}: holds half of a surrogate pair, which no JSON text can carry: {_abbreviated(value)}"
        )


def _check_images(_: object, __: object, images: tuple[ImageSource, ...]) -> None:
    if len(images) > MAX_IMAGES:
        raise ValueError(f"images: the service takes at most {MAX_IMAGES}, got {len(images)}; leave some out")
    for image in images:
        if not isinstance(image, str | Path | bytes | SupportsSave):
            raise TypeError(f"images: expected URL, data URI, Path, bytes or PIL image, got {_abbreviated(image)}")
        if isinstance(image, str) and not image.startswith("data:") and (problem := url_problem(image)):
            raise ValueError(f"images: {_abbreviated(image)} {problem} (for a file on disk, pass pathlib.Path)")


def _check_aspect_ratio(_: object, __: object, value: str | None) -> None:
    if value is not None and value != "auto" and not re.fullmatch(r"[1-9]\d{0,3}:[1-9]\d{0,3}", value, re.ASCII):
        raise ValueError(f"aspect_ratio: expected 'auto' or 'N:M' such as '16:9', got {_abbreviated(value)}")


def _check_callback_url(_: object, __: object, value: str | None) -> None:
    if value is not None and (problem := url_problem(value)):
        raise ValueError(f"callback_url: {_abbreviated(value)} {problem}")


def _lower(value: str | None) -> str | None:
    return value.lower() if isinstance(value, str) else value


def _check_extra(request: "GenerationRequest", _: object, extra: Mapping[str, JsonValue]) -> None:
    if clash := sorted(attrs.fields_dict(type(request)).keys() & extra.keys()):
        raise ValueError(f"extra: {', '.join(clash)} has an argument of its own; use that")


def _as_images(images: ImageSource | Iterable[ImageSource]) -> tuple[ImageSource, ...]:
    if isinstance(images, tuple | list):  # the rule; the question below is a slow one
        return tuple(images)
    if isinstance(images, str | bytes | Path | SupportsSave):
        return (images,)  # a lone image is a natural slip, and a str would otherwise fall apart into letters
    return tuple(images)


@attrs.frozen(kw_only=True)
class GenerationRequest:
    """One picture to be made. Bad values raise ValueError or TypeError here, before anything is paid.

    Nano Banana has no `n`: several pictures are several requests.
    """

    prompt: str = attrs.field(validator=_check_text, kw_only=False)
    images: tuple[ImageSource, ...] = attrs.field(
        default=(), converter=_as_images, validator=_check_images, repr=_repr_length
    )
    """At most four reference images."""
    model: str = attrs.field(default=DEFAULT_MODEL, validator=_check_text)
    """A free string: the vendor adds models without notice."""
    aspect_ratio: str | None = attrs.field(default=None, validator=_check_aspect_ratio)
    """`"16:9"` or any N:M, or `"auto"`; None leaves it to the service."""
    image_size: str | None = attrs.field(
        default=None,
        converter=_lower,
        validator=attrs.validators.optional(_check_text),
    )
    """`"1k"`, `"2k"` or `"4k"` (only the -pro and -2 models); None leaves it to the service."""
    callback_url: str | None = attrs.field(default=None, validator=_check_callback_url)
    """Where the service posts the final state; must be reachable from the internet."""
    extra: Mapping[str, JsonValue] = attrs.field(factory=dict, validator=_check_extra)
    """Further JSON fields, sent as they are: the service ignores those it does not know."""


class RequestOptions(TypedDict, total=False):
    """The fields of a `GenerationRequest` beside the prompt, as keyword arguments."""

    images: ImageSource | Iterable[ImageSource]
    model: str
    aspect_ratio: str | None
    image_size: str | None
    callback_url: str | None
    extra: Mapping[str, JsonValue]


@attrs.frozen(kw_only=True)
class GeneratedImage:
    """One picture of a finished task: either `url` or `data` is set."""

    url: str | None = None
    """Where the picture lies. Its lifetime is unknown: download at once."""
    data: bytes | None = attrs.field(default=None, repr=lambda data: "None" if data is None else f"<{len(data)} bytes>")
    """The encoded picture itself, when the service answered it inline."""
    media_type: str | None = None
    """As announced with inline data; None for a URL. The downloader trusts only the bytes."""


@attrs.frozen(kw_only=True)
class Task:
    """A snapshot of one task, as the service last told it."""

    task_id: str
    status: TaskStatus
    images: tuple[GeneratedImage, ...] = ()
    texts: tuple[str, ...] = ()
    """What the model answered in words, beside or instead of pictures."""
    consumed: Decimal | None = None
    """Credits charged; None when the service did not say."""
    reason: str | None = None
    """Why it failed, in the vendor's words; often None even then."""
    created_at: datetime | None = None
    raw: Mapping[str, JsonValue] = attrs.field(factory=dict, repr=False, eq=False)
    """The service's own `data` object, unknown fields included. Numbers with a point are Decimal."""

    @property
    def is_final(self) -> bool:
        """Whether `status` is success or failed."""
        return self.status.is_final


@attrs.frozen(kw_only=True)
class SavedImage:
    """A picture on disk: whole, type-checked, and durable."""

    path: Path
    sha256: str
    """Of the file, in hex."""
    size_bytes: int


@attrs.frozen(kw_only=True)
class CallbackPayload:
    """What somebody who posted to a callback URL claims. Not to be believed: query the task."""

    task_id: str
    status: TaskStatus
    raw: Mapping[str, JsonValue] = attrs.field(factory=dict, repr=False, eq=False)
    """The whole object that was posted."""


class PendingCallback(Protocol):
    """One submit whose end will be announced."""

    @property
    def nonce(self) -> str:
        """What tells this submit from all others."""
        ...

    @property
    def url(self) -> str:
        """The callback URL of this submit, and of no other."""
        ...

    def bind(self, task_id: str) -> bool:
        """Note which task the submit became; True when a callback for it has come already."""
        ...

    async def wait_task_id(self) -> str:
        """Return the task id that a callback brings, when one comes."""
        ...


@runtime_checkable
class CallbackSource(Protocol):
    """Who hears the service's callbacks: `CallbackReceiver`."""

    unmatched_hooks: list[Callable[[str, str], Awaitable[None]]]
    """Told of nonce and claimed task id when a callback is about a submit whose task is not known here."""

    def register(self) -> PendingCallback:
        """Return the expectation of one submit."""
        ...
