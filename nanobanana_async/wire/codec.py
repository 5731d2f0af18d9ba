"""Convert models to bytes and back. The only file with cattrs and with the JSON names of the service.

Both directions are total. Every valid request can be encoded, and no byte sequence makes a decoder raise anything but
the errors of this package. Wire facts name their source where they matter.
"""

import json
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Final, cast
from urllib.parse import quote

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from nanobanana_async._text import excerpt, sanitize_line
from nanobanana_async.errors import (
    ApiError,
    AuthenticationError,
    InsufficientCredits,
    InvalidRequest,
    ProtocolError,
    RateLimited,
    ServiceUnavailable,
    TaskNotFound,
)
from nanobanana_async.models import CallbackPayload, GeneratedImage, GenerationRequest, JsonValue, Task, TaskStatus
from nanobanana_async.protocols import RequestKind, WireRequest, WireResponse
from nanobanana_async.wire.body import decode_data_uri, decompress, is_plain_data_uri, parse_json, without_images
from nanobanana_async.wire.refusals import says_empty_account
from nanobanana_async.wire.task_ids import find_task_id, salvage_task_id

SUBMIT_PATH: Final = "/api/image/gen"
QUERY_PATH: Final = "/api/task/query"
BALANCE_PATH: Final = "/api/user"

_MAX_DIGITS: Final = 64
_MESSAGE_CHARS: Final = 1000
"""Number of characters of the service's message that an error quotes."""

MAX_JSON_BYTES: Final = 2**20
"""Largest response body without images."""
MAX_QUERY_BYTES: Final = 64 * 2**20
"""Largest response body of a query, which may contain data URIs."""


# --- requests --------------------------------------------------------------------------------------------------------


def encode_submit(base_url: str, request: GenerationRequest) -> WireRequest:
    """Return the POST that submits *request*, whose images must be URLs or data URIs.

    Raises:
        ValueError: `extra` contains a value that JSON cannot encode.
    """
    document = {**_converter.unstructure(request), **request.extra}
    images, mark = document.get("images"), secrets.token_hex(8)
    listed = cast("list[object]", images) if isinstance(images, list) else []
    spliced = [image for image in listed if is_plain_data_uri(image)]
    if spliced:
        document["images"] = [mark if is_plain_data_uri(image) else image for image in listed]
    try:
        text = json.dumps(document, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as exc:
        raise ValueError(f"extra: cannot be encoded as JSON: {exc}") from exc
    # Megabytes of base64 need no escapes, and `json` would hold the interpreter's lock while it looks for them.
    head, *rest = text.split(mark)
    pieces = [head, *(piece for pair in zip(spliced, rest, strict=True) for piece in pair)]
    body = b"".join(piece.encode() for piece in pieces)
    return WireRequest(
        kind=RequestKind.SUBMIT,
        method="POST",
        url=base_url + SUBMIT_PATH,
        headers={"Content-Type": "application/json"},
        body=body,
        max_bytes=MAX_JSON_BYTES,
    )


def encode_query(base_url: str, task_id: str) -> WireRequest:
    """Return the GET that queries a task."""
    url = f"{base_url}{QUERY_PATH}?task_id={quote(task_id, safe='')}"
    return WireRequest(kind=RequestKind.READ, method="GET", url=url, max_bytes=MAX_QUERY_BYTES)


def encode_balance(base_url: str) -> WireRequest:
    """Return the GET that queries the balance."""
    return WireRequest(kind=RequestKind.READ, method="GET", url=base_url + BALANCE_PATH, max_bytes=MAX_JSON_BYTES)


# --- the envelope of a response --------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Envelope:
    """A response body, decoded as far as possible."""

    is_service_json: bool = False
    """Whether the body has the service's JSON shape: an object with a `code`."""
    ok: bool = False
    """Whether `code` means success: the integer 0 or "0". In Python `false == 0`, so the type is checked."""
    code: int | None = None
    message: str = ""
    """Message of the service, `detail` before `message`; an excerpt of the body if it is not JSON."""
    data: Mapping[str, JsonValue] = attrs.field(factory=dict[str, JsonValue], repr=False)
    task_id: str | None = None
    """Task id in `data`, else the only one anywhere in the body, also if it is truncated or not JSON."""


def decode_envelope(response: WireResponse) -> Envelope:
    """Decode the body of *response*. Never raises, and ignores the content type, which is not reliable."""
    body = decompress(response.body, response.headers.get("content-encoding", ""), MAX_JSON_BYTES)
    is_searched = not 400 <= response.status < 500  # a rejection may quote the request, with ids of other tasks
    try:
        document = parse_json(body)
    except (ValueError, RecursionError):
        return Envelope(message=excerpt(body), task_id=salvage_task_id(body) if is_searched else None)
    if not isinstance(document, dict):
        return Envelope(message=excerpt(body), task_id=find_task_id(None, document) if is_searched else None)
    code = document.get("code")
    data = document.get("data")
    fields: Mapping[str, JsonValue] = data if isinstance(data, dict) else {}
    message = next((text for key in ("detail", "message", "error") if (text := _to_text(document.get(key)))), "")
    return Envelope(
        is_service_json="code" in document,
        ok=(type(code) is int and code == 0) or code == "0",
        code=_code(code),
        message=sanitize_line(message[:_MESSAGE_CHARS]) or excerpt(body),
        data=fields,
        task_id=find_task_id(fields.get("task_id"), document if is_searched else None),
    )


def to_api_error(response: WireResponse, envelope: Envelope, *, task_id: str | None = None) -> ApiError:
    """Return the error for an error response, classified by HTTP status first, then by code and words."""
    kind = _error_type(response.status, envelope)
    code = "" if envelope.code is None else f", code {envelope.code}"
    subject = f"task {task_id}: " if task_id else ""
    is_other_server = 400 <= response.status < 500 and kind is InvalidRequest and not envelope.is_service_json
    advice = _OTHER_SERVER_ADVICE if is_other_server else _ADVICE.get(kind, "")
    detail = f"{envelope.message or 'rejected'}{_redirect_note(response)}"
    message = f"{subject}{detail} (HTTP {response.status}{code}).{advice}"
    return kind(message, status=response.status, code=envelope.code, task_id=task_id)


_OTHER_SERVER_ADVICE: Final = " The response is not from the service. Check the base URL and the network."
_ADVICE: Final[dict[type, str]] = {
    AuthenticationError: " Check the API key.",
    InsufficientCredits: " Top up the account.",
}


def _error_type(status: int, envelope: Envelope) -> type[ApiError]:
    if status == 401 or envelope.code == 401:
        return AuthenticationError
    if status == 429:
        return RateLimited
    if status >= 500 or status in (408, 421, 425):
        return ServiceUnavailable
    if status == 402 or (envelope.is_service_json and not envelope.ok and says_empty_account(envelope.message)):
        return InsufficientCredits
    return TaskNotFound if status == 404 and envelope.is_service_json else InvalidRequest


def _redirect_note(response: WireResponse) -> str:
    """Return a note that names the host of a redirect. A request with the key is never redirected."""
    if not 300 <= response.status < 400:
        return ""
    found = re.match(r"(?:https?:)?//([A-Za-z0-9.:\[\]-]{1,100})", response.headers.get("location", ""))
    return f" (redirected to {found[1] if found else 'another path'}, not followed). Check the base URL"


# --- responses of the operations ---------------------------------------------------------------------------------


def decode_task(response: WireResponse, task_id: str) -> Task:
    """Return the task in the response to a query.

    Raises:
        ApiError: The service responded with an error.
        ProtocolError: The response cannot be decoded, or is about another task.
    """
    envelope = _checked_envelope(response, task_id)
    try:
        wire = _converter.structure({**envelope.data, "raw": without_images(envelope.data)}, _TaskData)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as exc:
        what = f"{type(exc).__name__}: {exc}"
    else:
        if wire.task_id in ("", task_id):
            return wire.task(task_id)
        what = f"expected this task, got {wire.task_id!r}"
    raise ProtocolError(
        f"task {task_id}: the response cannot be decoded: {what}", task_id=task_id, status=response.status
    )


def decode_callback(body: bytes) -> CallbackPayload:
    """Return the contents of a callback body: the fields of a task, without envelope (service's documentation).

    Raises:
        ProtocolError: The body is not JSON, or names no task.
    """
    try:
        document = parse_json(body)
    except (ValueError, RecursionError):
        document = None
    payload = document if isinstance(document, dict) else {}
    task_id = find_task_id(payload.get("task_id"), document)
    if task_id is None:
        raise ProtocolError(f"callback: expected a task_id, got {excerpt(body) or 'an empty body'}")
    return CallbackPayload(task_id=task_id, status=_status(payload.get("status"), None), raw=payload)


def decode_balance(response: WireResponse) -> Decimal:
    """Return the credits in the response to a balance request.

    Raises:
        ApiError: The service responded with an error.
        ProtocolError: The response contains no number.
    """
    envelope = _checked_envelope(response)
    credit = _decimal(envelope.data.get("credit"), Decimal)
    if credit is None:
        raise ProtocolError(f"balance: expected a credit, got {envelope.message}", status=response.status)
    return credit


def _checked_envelope(response: WireResponse, task_id: str | None = None) -> Envelope:
    envelope = decode_envelope(response)
    if response.status >= 300 or (envelope.is_service_json and not envelope.ok):
        raise to_api_error(response, envelope, task_id=task_id)
    if not envelope.is_service_json:
        raise ProtocolError(
            f"expected the service's JSON, got HTTP {response.status}: {envelope.message or 'an empty body'}",
            task_id=task_id,
            status=response.status,
        )
    return envelope


# --- fields ----------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class _Reason:
    message: str = ""


@attrs.frozen(kw_only=True)
class _ResultItem:
    """One entry of `result`: an image, text, or both."""

    image: GeneratedImage | None = None
    text: str = ""


@attrs.frozen(kw_only=True)
class _TaskData:
    """The `data` object of a query response, with the field names of the service."""

    task_id: str = ""
    status: TaskStatus = TaskStatus.UNRECOGNIZED
    result: tuple[_ResultItem, ...] = ()
    consumed: Decimal | None = None
    created_at: datetime | None = None
    status_reason: _Reason = _Reason()
    raw: Mapping[str, JsonValue]

    def task(self, task_id: str) -> Task:
        return Task(
            task_id=task_id,
            status=self.status,
            images=tuple(item.image for item in self.result if item.image is not None),
            texts=tuple(item.text for item in self.result if item.text),
            consumed=self.consumed,
            reason=self.status_reason.message or None,
            created_at=self.created_at,
            raw=self.raw,
        )


def _status(value: object, _: object) -> TaskStatus:
    try:
        return TaskStatus(str(value).strip().lower())
    except ValueError:
        return TaskStatus.UNRECOGNIZED


def _decimal(value: object, _: object) -> Decimal | None:
    """Return a number or decimal string as Decimal; None for other values, infinities and negative amounts."""
    if isinstance(value, bool) or not isinstance(value, int | str | Decimal):
        return None
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    # 1e999999999 is a valid Decimal, but printing it in full would need a gigabyte.
    sane = number.is_finite() and number >= 0 and abs(number.adjusted()) < _MAX_DIGITS
    return number if sane else None


def _to_datetime(value: object, _: object) -> datetime | None:
    """Return an ISO date (UTC if it has no zone) or a Unix time as datetime; None for anything else."""
    try:
        if isinstance(value, str):
            parsed = datetime.fromisoformat(value)
            return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
        if isinstance(value, int | Decimal) and not isinstance(value, bool):
            return datetime.fromtimestamp(float(value), UTC)
    except (ValueError, OverflowError, OSError):
        pass
    return None


def _items(value: object, _: object) -> tuple[_ResultItem, ...]:
    """Return the entries of `result`: () for null, one for an object or string. Others are only in `Task.raw`."""
    entries = cast("list[object]", value) if isinstance(value, list) else [value]
    return tuple(item for entry in entries if (item := _item(entry)) is not None)


def _item(entry: object) -> _ResultItem | None:
    if isinstance(entry, str):
        return _ResultItem(image=_image(entry))
    if (fields := _fields(entry)) is not None:
        return _ResultItem(image=_image(fields.get("image")), text=_to_text(fields.get("text")))
    return None


def _fields(value: object) -> Mapping[str, object] | None:
    """Return *value* if it is a JSON object, otherwise None."""
    return cast("Mapping[str, object]", value) if isinstance(value, dict) else None


def _image(value: object) -> GeneratedImage | None:
    if not isinstance(value, str) or not value.strip():
        return None
    return decode_data_uri(value) or GeneratedImage(url=value.strip())


def _reason(value: object, _: object) -> _Reason:
    fields = _fields(value)
    return _Reason(message=_to_text(value if fields is None else fields.get("message")))


def _to_text(value: object) -> str:
    """Return a field as text: a string unchanged, a list or object as JSON, "" for null."""
    if isinstance(value, str):
        return value.strip()
    try:
        return "" if value in (None, [], {}) else json.dumps(value, default=str)[:1000]
    except RecursionError:  # nesting that could be decoded may be too deep to encode from here
        return ""


def _code(value: object) -> int | None:
    if isinstance(value, int | str) and not isinstance(value, bool) and re.fullmatch(r"-?\d{1,9}", str(value)):
        return int(value)
    return None


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=False)
    converter.register_structure_hook(TaskStatus, _status)
    converter.register_structure_hook(Decimal | None, _decimal)
    converter.register_structure_hook(datetime | None, _to_datetime)
    converter.register_structure_hook(_Reason, _reason)
    converter.register_structure_hook(str, lambda value, _: value if isinstance(value, str) else "")
    converter.register_structure_hook_func(lambda kind: kind == tuple[_ResultItem, ...], _items)
    converter.register_structure_hook_func(lambda kind: kind == Mapping[str, JsonValue], lambda value, _: value)
    converter.register_structure_hook(_TaskData, make_dict_structure_fn(_TaskData, converter))
    # Unset fields are left out, never sent as null.
    optional = override(omit_if_default=True)
    converter.register_unstructure_hook(
        GenerationRequest,
        make_dict_unstructure_fn(
            GenerationRequest,
            converter,
            images=optional,
            aspect_ratio=optional,
            image_size=optional,
            callback_url=optional,
            extra=override(omit=True),
        ),
    )
    return converter


_converter: Final = _make_converter()
