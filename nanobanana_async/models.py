"""The values a user holds: requests, tasks, images. Frozen, validated on construction, no I/O."""

import enum
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO, Final, Protocol, TypeAlias, TypedDict, runtime_checkable
from urllib.parse import quote, urlsplit, urlunsplit

import attrs

JsonValue: TypeAlias = "bool | int | float | Decimal | str | list[JsonValue] | dict[str, JsonValue] | None"

DEFAULT_MODEL: Final = "google/gempix2"
"""Nano Banana, under the name that the service's documentation uses."""

MAX_IMAGES: Final = 4
"""Reference images per request, as the service's documentation states."""


@runtime_checkable
class SupportsSave(Protocol):
    """The part of `PIL.Image.Image` that the client uses. Pillow itself is not required."""

    def save(self, fp: BinaryIO, format: str | None = None) -> None:  # noqa: A002 - Pillow's own name
        """Write the encoded image to *fp*."""


ImageSource: TypeAlias = str | Path | bytes | SupportsSave
"""A reference image: a URL or data URI (`str`), a file (`Path`), encoded bytes, or a PIL image."""


class TaskStatus(enum.StrEnum):
    """Status of a task.

    `UNRECOGNIZED` stands for a status that this version does not know. The task is treated as running.

    Attributes:
        PENDING: It waits.
        SUBMITTED: It was passed on.
        IN_PROGRESS: It is being generated.
        SUCCESS: It has ended. It may contain text instead of images.
        FAILED: It has ended without an image.
        UNRECOGNIZED: A status that this version does not know.
    """

    PENDING = "pending"
    SUBMITTED = "submitted"
    IN_PROGRESS = "in_progress"
    SUCCESS = "success"
    FAILED = "failed"
    UNRECOGNIZED = "unrecognized"

    @property
    def is_final(self) -> bool:
        """Whether the status will never change again."""
        return self in (TaskStatus.SUCCESS, TaskStatus.FAILED)


class ReasonKind(enum.StrEnum):
    """Why a task has no image, by the words of the service and of the model.

    Attributes:
        REFUSED: They refuse the prompt, a reference image or the result: safety, policy, copyright.
        EMPTY: The task succeeded, or was to, and there is no image.
        ERROR: The service had an error of its own.
        UNKNOWN: There are no words, or they say something else.
    """

    REFUSED = "refused"
    EMPTY = "empty"
    ERROR = "error"
    UNKNOWN = "unknown"


def honours_image_size(model: str) -> bool:
    """Return whether *model* is known to honour `image_size`. Observed: only models with these suffixes do."""
    return model.endswith(("-pro", "-2"))


def url_problem(url: str) -> str | None:
    """Return what makes *url* unusable as an absolute http(s) URL; None if it is usable."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return "contains whitespace, control or non-ASCII characters. Percent-encode them."
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as exc:
        return f"is not a URL ({exc})"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "is not an absolute http:// or https:// URL"
    if "@" in parts.netloc:
        return "contains a user name or password. Remove them."
    return None


def percent_encoded(url: str) -> str:
    """Return *url* with blanks and letters outside ASCII encoded, as browsers do; unchanged if it cannot be."""
    if url.isascii() and " " not in url:
        return url
    try:
        parts = urlsplit(url.strip())
        host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    except ValueError:
        return url
    encoded = [quote(part, safe="%/:=&?~#+!$,;'@()*[]") for part in (parts.path, parts.query)]
    return urlunsplit((parts.scheme, host, *encoded, ""))


def _abbreviated(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _repr_length(values: tuple[object, ...]) -> str:
    return f"<{len(values)}>"


_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def _check_text(_: object, field: "attrs.Attribute[str]", value: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{field.name}: expected str, got {_abbreviated(value)}")
    if not value.strip():
        raise ValueError(f"{field.name}: expected text, got {_abbreviated(value)}")
    if not value.isascii() and _SURROGATE.search(value):
        raise ValueError(
            f"{field.name}: contains a lone surrogate, which JSON cannot encode, got {_abbreviated(value)}"
        )


def _check_images(_: object, __: object, images: tuple[ImageSource, ...]) -> None:
    if len(images) > MAX_IMAGES:
        raise ValueError(f"images: expected at most {MAX_IMAGES}, got {len(images)}")
    for image in images:
        if not isinstance(image, str | Path | bytes | SupportsSave):
            raise TypeError(f"images: expected URL, data URI, Path, bytes or PIL image, got {_abbreviated(image)}")
        if isinstance(image, str) and image[:5].lower() != "data:" and (problem := url_problem(image)):
            raise ValueError(f"images: {_abbreviated(image)} {problem}. To send a file, pass pathlib.Path.")


def _check_aspect_ratio(_: object, __: object, value: str | None) -> None:
    if value is not None and value != "auto" and not re.fullmatch(r"[1-9]\d{0,3}:[1-9]\d{0,3}", value, re.ASCII):
        raise ValueError(f"aspect_ratio: expected 'auto' or 'N:M' such as '16:9', got {_abbreviated(value)}")


def _to_ratio(value: str | None) -> str | None:
    """Return a ratio as the service takes it. Spreadsheets turn 16:9 into a time, such as 16:09 or 16:09:00."""
    found = re.fullmatch(r"0*(\d+):0*(\d+)(?::00)?", value, re.ASCII) if isinstance(value, str) else None
    return value if found is None else f"{found[1]}:{found[2]}"


def _check_callback_url(_: object, __: object, value: str | None) -> None:
    if value is not None and (problem := url_problem(value)):
        raise ValueError(f"callback_url: {_abbreviated(value)} {problem}")


def _lower(value: str | None) -> str | None:
    return value.lower() if isinstance(value, str) else value


def _check_extra(request: "GenerationRequest", _: object, extra: Mapping[str, JsonValue]) -> None:
    clash = sorted(attrs.fields_dict(type(request)).keys() & extra.keys()) if extra else []
    if clash and not (clash == ["images"] and not request.images):
        raise ValueError(f"extra: got {', '.join(clash)}. Pass it as an argument instead.")


def _as_images(images: ImageSource | Iterable[ImageSource]) -> tuple[ImageSource, ...]:
    if isinstance(images, tuple | list):  # the common case; `isinstance` with a protocol is slow
        return tuple(images)
    if isinstance(images, str | bytes | Path | SupportsSave):
        return (images,)  # one image instead of a list; iterating over a str would yield its characters
    return tuple(images)


@attrs.frozen(kw_only=True)
class GenerationRequest:
    """One image to generate. Invalid values raise ValueError or TypeError on construction, before anything is sent.

    Nano Banana has no `n` parameter. For several images, send several requests.

    Attributes:
        prompt: Text to generate from.
        images: Reference images, at most four.
        model: Name of the model. Any text is accepted, because the service adds models without notice.
        aspect_ratio: `"16:9"` or another N:M, or `"auto"`. None leaves the choice to the service.
        image_size: `"1k"`, `"2k"` or `"4k"`, for the -pro and -2 models only. None leaves the choice to the
            service.
        callback_url: URL to which the service posts the final state. It must be reachable from the internet.
        extra: Additional JSON fields, sent unchanged. The service ignores fields that it does not know. With `images`
            in it, more than four URLs or data URIs are sent, unchecked, and the field `images` is to be empty.
    """

    prompt: str = attrs.field(validator=_check_text, kw_only=False)
    images: tuple[ImageSource, ...] = attrs.field(
        default=(), converter=_as_images, validator=_check_images, repr=_repr_length
    )
    model: str = attrs.field(default=DEFAULT_MODEL, validator=_check_text)
    aspect_ratio: str | None = attrs.field(default=None, converter=_to_ratio, validator=_check_aspect_ratio)
    image_size: str | None = attrs.field(
        default=None,
        converter=_lower,
        validator=attrs.validators.optional(_check_text),
    )
    callback_url: str | None = attrs.field(default=None, validator=_check_callback_url)
    extra: Mapping[str, JsonValue] = attrs.field(factory=dict[str, JsonValue], validator=_check_extra)


class RequestOptions(TypedDict, total=False):
    """The fields of a `GenerationRequest` except the prompt, as keyword arguments."""

    images: ImageSource | Iterable[ImageSource]
    model: str
    aspect_ratio: str | None
    image_size: str | None
    callback_url: str | None
    extra: Mapping[str, JsonValue]


@attrs.frozen(kw_only=True)
class GeneratedImage:
    """One image of a finished task. Either `url` or `data` is set.

    Attributes:
        url: Location of the image. Its lifetime is unknown: download it at once.
        data: The encoded image, if the service returned it inline.
        media_type: Media type that the service stated for inline data; None for a URL. Downloads check the
            bytes instead.
    """

    url: str | None = None
    data: bytes | None = attrs.field(default=None, repr=lambda data: "None" if data is None else f"<{len(data)} bytes>")
    media_type: str | None = None


@attrs.frozen(kw_only=True)
class Task:
    """A snapshot of one task, as the service last reported it.

    Attributes:
        task_id: Identifier of the task at the service.
        status: Its status.
        images: Images of a finished task; () if there are none.
        texts: Text that the model returned beside or instead of images.
        consumed: Credits charged; None if the service did not report them.
        reason: Reason for the failure in the service's words. Often None, even for a failed task.
        created_at: When the service created it; None if it does not say.
        raw: The service's own `data` object, with unknown fields. Numbers with a decimal point are Decimal.
            Inline images are cut: `images` contains them.
    """

    task_id: str
    status: TaskStatus
    images: tuple[GeneratedImage, ...] = ()
    texts: tuple[str, ...] = ()
    consumed: Decimal | None = None
    reason: str | None = None
    created_at: datetime | None = None
    raw: Mapping[str, JsonValue] = attrs.field(factory=dict[str, JsonValue], repr=False, eq=False)

    @property
    def is_final(self) -> bool:
        """Whether `status` is success or failed."""
        return self.status.is_final

    @property
    def has_inline_image(self) -> bool:
        """Whether an image is contained in the snapshot, which then takes megabytes."""
        return any(image.data is not None for image in self.images)


@attrs.frozen(kw_only=True)
class CallbackPayload:
    """The body posted to a callback URL. It is not authenticated: query the task before you act on it.

    Attributes:
        task_id: The task that the callback names.
        status: The status that the callback states.
        raw: The whole object that was posted.
    """

    task_id: str
    status: TaskStatus
    raw: Mapping[str, JsonValue] = attrs.field(factory=dict[str, JsonValue], repr=False, eq=False)


@attrs.frozen(kw_only=True)
class Eta:
    """Time left until a task is final, in seconds.

    Attributes:
        median_s: Half of the tasks of this age are final by then.
        p90_s: Nine of ten are.
    """

    median_s: float
    p90_s: float


@attrs.frozen(kw_only=True)
class Spending:
    """What submits were charged, and what they may have been charged, in credits.

    Attributes:
        spent: Credits that the service reported as charged.
        reserved: Largest amount that unfinished tasks may cost, at known prices.
        unknown: Largest amount of submits that may have been charged without a statement of the service, at
            known prices.
        unpriced: Submits that are in neither of the two, because no price is known for them.
    """

    spent: Decimal
    reserved: Decimal
    unknown: Decimal
    unpriced: int


@attrs.frozen(kw_only=True)
class UnresolvedAttempt:
    """A submit of a single task that may have been charged, and whose task id is not known.

    Attributes:
        key: Identifies the call, as in its events and in the error that it has raised (`exc.key`).
        owner: Whom the image was for.
        note: What the application has passed as `note`.
        prompt: Empty if the ledger stores no prompts.
        model: Model of the request.
        image_size: Image size of the request; None leaves it to the service.
        submitted_at: When the POST was about to be sent.
        reason: What happened to it.
        possible_charges: POSTs that may have been charged.
        acknowledge: Called by `ack`.
    """

    key: str
    owner: str | None
    note: JsonValue
    prompt: str
    model: str
    image_size: str | None
    submitted_at: datetime
    reason: str
    possible_charges: int
    acknowledge: Callable[[], Awaitable[None]] = attrs.field(repr=False, eq=False)

    async def ack(self) -> None:
        """Record that the application knows of it, so that it is not yielded again. A second call has no effect."""
        await self.acknowledge()
