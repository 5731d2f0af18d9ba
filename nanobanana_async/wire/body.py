"""Decode bodies from the network, whatever they contain."""

import base64
import contextlib
import json
import re
import zlib
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from itertools import pairwise
from typing import Final, TypeGuard

from nanobanana_async.models import GeneratedImage, JsonValue

_CHUNK_BYTES: Final = 1024
_GZIP_TRAILER_BYTES: Final = 8
"""Checksum and length at the end of gzip. They are decompressed as a chunk of their own, because they may be damaged.
"""


def decompress(body: bytes, content_encoding: str, max_bytes: int) -> bytes:
    """Return *body*, decompressed by one layer if it is gzip or deflate, up to *max_bytes*.

    *content_encoding* is the value of that header. The HTTP library never decompresses: 235 bytes of triple gzip cost
    it 1.5 GiB (measured). A truncated body yields what could be decompressed.
    """
    if content_encoding.strip().lower() not in ("gzip", "x-gzip", "deflate"):
        return body
    inflater, inflated = zlib.decompressobj(wbits=47), bytearray()  # 47: gzip or zlib, detected from the header
    bounds = [*range(0, len(body) - _GZIP_TRAILER_BYTES, _CHUNK_BYTES), len(body) - _GZIP_TRAILER_BYTES, len(body)]
    with contextlib.suppress(zlib.error):  # the bytes before the damage may contain a task id
        for start, end in pairwise(bounds):
            inflated += inflater.decompress(body[start:end], max_bytes - len(inflated))
            if len(inflated) >= max_bytes:
                break
    return bytes(inflated) or body


def parse_json(body: bytes) -> JsonValue:
    """Return the JSON document in *body*, which is UTF-8, -16 or -32.

    Numbers with a decimal point are Decimal. Lone surrogates are replaced.

    Raises:
        ValueError: The body is not JSON, or contains NaN or an integer of thousands of digits.
        RecursionError: It is nested deeper than the interpreter can follow.
    """
    text = body.decode(json.detect_encoding(body))
    document: JsonValue = _DECODER.decode(text)
    # A lone surrogate is valid here, but cannot be encoded when it is written to a file or database.
    return _replace_surrogates(document) if _SURROGATE.search(text) else document


_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


def _replace_surrogates(value: JsonValue) -> JsonValue:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_replace_surrogates(entry) for entry in value]
    if isinstance(value, dict):
        return {str(_replace_surrogates(key)): _replace_surrogates(entry) for key, entry in value.items()}
    return value


def _parse_decimal(text: str) -> Decimal | str:
    try:
        return Decimal(text)
    except InvalidOperation:
        return text


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_float=_parse_decimal, parse_constant=_reject_constant)

_MIN_SPLICED_CHARS: Final = 65_536


def is_plain_data_uri(value: object) -> TypeGuard[str]:
    """Return whether *value* is a long data URI that JSON needs no escapes for."""
    return (
        isinstance(value, str)
        and len(value) >= _MIN_SPLICED_CHARS
        and value[:5].lower() == "data:"
        and value.isascii()
        and value.partition(",")[0].isprintable()
        and not any(sign in value for sign in ('"', "\\", "\n", "\r", "\t", "\0"))
    )


def decode_data_uri(uri: str) -> GeneratedImage | None:
    """Return the image in a base64 data URI; None if *uri* is not one, or is damaged.

    A damaged one remains a `url`, which the download rejects. So one bad image does not hide the other images of a
    charged task.
    """
    head, comma, payload = uri.strip().partition(",")
    if not comma or not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
        return None
    try:
        data = base64.b64decode(payload, validate=True)
    except ValueError:  # try the URL-safe alphabet; only now, because translating megabytes is slow
        standard = payload.translate(_TO_STANDARD_BASE64)
        try:
            data = base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True)
        except ValueError:
            return None
    media_type = head[len("data:") :].partition(";")[0].lower()
    return GeneratedImage(data=data, media_type=media_type or None) if data else None


_TO_STANDARD_BASE64: Final = {ord("-"): "+", ord("_"): "/", **dict.fromkeys(map(ord, " \t\r\n="))}

_MAX_RAW_CHARS: Final = 10_000
"""Longest data URI in `Task.raw`."""


def without_images(data: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """Return *data* with inline images cut, which are megabytes and decoded elsewhere."""
    result = data.get("result")
    if not isinstance(result, list):
        return data
    return {**data, "result": [_cut(entry) for entry in result]}


def _cut(entry: JsonValue) -> JsonValue:
    if isinstance(entry, dict):
        return {name: _cut(value) for name, value in entry.items()}
    is_long = isinstance(entry, str) and len(entry) > _MAX_RAW_CHARS and entry.lstrip()[:5].lower() == "data:"
    return f"{str(entry).lstrip()[:40]}..." if is_long else entry
