"""Remove the API key from bodies that quote it, in whatever encoding: errors, logs and files quote the body."""

import html
import json
import re
from typing import Final
from urllib.parse import unquote

import attrs

from nanobanana_async.models import JsonValue
from nanobanana_async.protocols import WireResponse
from nanobanana_async.wire.body import decompress

_MARK: Final = "[API key]"
_MAX_BYTES: Final = 2**20
_DISGUISES: Final = (b"\\", b"%", b"&", b"\0")
"""Bytes without which a body in UTF-8 quotes the key as it is, or not at all."""
_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")


def redact_response(response: WireResponse, key: str) -> WireResponse:
    """Return *response* without *key*: as it is, compressed, UTF-16, or escaped as in JSON, a URL or HTML."""
    coding = response.headers.get("content-encoding", "")
    body = decompress(response.body, coding, _MAX_BYTES)
    is_plain = body is response.body
    if key.encode() in body:
        body = body.replace(key.encode(), _MARK.encode())
    elif not any(sign in body for sign in _DISGUISES):
        return response
    text = body.decode(json.detect_encoding(body), "replace")
    if any(key in variant for variant in _variants(text)):
        body = _redact_text(text, key).encode("utf-8", "replace")
    elif is_plain:
        return response if body is response.body else attrs.evolve(response, body=body)
    headers = {name: value for name, value in response.headers.items() if name != "content-encoding"}
    return attrs.evolve(response, body=body, headers=headers)


def _variants(text: str) -> list[str]:
    """Return *text* as the readers of JSON, URLs and HTML take it, also of one inside another."""
    found = [text]
    for _ in range(2):
        for decode in (_unescape_json, unquote, _unescape_html):
            found += [plain for plain in map(decode, found) if plain not in found]
    return found


def _unescape_json(text: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else found[2], text) if "\\" in text else text


def _unescape_html(text: str) -> str:
    try:
        return html.unescape(text) if "&" in text else text
    except ValueError:  # a reference of thousands of digits
        return text


def _redact_text(text: str, key: str) -> str:
    try:
        return json.dumps(_redact_value(json.loads(text), key))
    except (ValueError, RecursionError):
        return next(variant for variant in _variants(text) if key in variant).replace(key, _MARK)


def _redact_value(value: JsonValue, key: str) -> JsonValue:
    if isinstance(value, str):
        found = next((variant for variant in _variants(value) if key in variant), None)
        return value if found is None else found.replace(key, _MARK)
    if isinstance(value, list):
        return [_redact_value(entry, key) for entry in value]
    if isinstance(value, dict):
        return {str(_redact_value(name, key)): _redact_value(entry, key) for name, entry in value.items()}
    return value
