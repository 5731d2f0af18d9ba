"""`RowParser`: records as rows. References are checked once each, and prompts may be filled into a template."""

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from nanobanana_async._text import normalize
from nanobanana_async.batch.row_readers import COLUMNS
from nanobanana_async.batch.rows import RowKeys
from nanobanana_async.errors import ImageError
from nanobanana_async.images.formats import split_suffix
from nanobanana_async.images.references import (
    MAX_SHRUNK_BYTES,
    check_data_uri,
    check_file,
    is_data_uri,
    parse_reference,
)
from nanobanana_async.ledger.schema import BatchRow
from nanobanana_async.models import GenerationRequest, ImageSource, JsonValue
from nanobanana_async.policies import ReferencePolicy

_OPTIONS: Final = ("model", "aspect_ratio", "image_size")
_MAX_KEPT_CHARS: Final = 2000
"""Longest text of a cell that is kept for the results."""
_CHECKED_FILES: Final = 10_000
"""Number of reference images whose check is remembered."""
_PLACEHOLDER: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@attrs.frozen
class RowParser:
    """Makes rows of records. References are checked once each."""

    folder: Path
    options: Mapping[str, str]
    keys: RowKeys
    template: str | None
    """Prompt with the names of columns in braces; None takes the column `prompt`."""
    variants: int
    """Rows of each record."""
    references: ReferencePolicy
    _check_file: Callable[[Path, ReferencePolicy], None] = attrs.field(
        init=False, factory=lambda: functools.lru_cache(_CHECKED_FILES)(check_file)
    )

    def rows(self, line: int, record: Mapping[str, JsonValue] | ValueError) -> Iterator[BatchRow]:
        """Yield the rows of *record*. Raises ValueError, TypeError or ImageError if it is invalid."""
        if isinstance(record, ValueError):
            raise record
        cells = {name: _to_text(name, value) for name, value in record.items() if name in COLUMNS and name != "images"}
        given = {name: text for name, text in cells.items() if text}
        texts = _references(record.get("images"))
        options = dict(self.options)
        options.update((name, given[name]) for name in _OPTIONS if name in given)
        sources = [self._load_image(text) for text in texts]
        prompt = given.get("prompt", "") if self.template is None else filled(self.template, record)
        request = GenerationRequest(prompt, images=sources, **options)  # type: ignore[arg-type]
        if not any(character.isalnum() for character in request.prompt):
            raise ValueError(f"prompt: expected a letter or a digit, got {request.prompt!r:.80}")
        columns: dict[str, JsonValue] = {}
        if len(record) > 1:
            columns.update((_storable(name), _kept(value)) for name, value in record.items())
        name, key = _storable(given["name"]) if "name" in given else None, given.get("key")
        stem = name if name is None or self.variants == 1 else split_suffix(name)[0]
        for number in range(1, self.variants + 1):
            own_key = f"{key}-{number}" if key is not None and number > 1 else key  # more variants keep the first row
            # The text as written, not the path: a row is the same in another working directory.
            assigned, fingerprint = self.keys.assign(request, own_key, texts, is_variant=number > 1)
            yield BatchRow(
                key=assigned,
                request=request,
                name=f"{stem}-{number}" if stem is not None and self.variants > 1 else name,
                fingerprint=fingerprint,
                line=line,
                columns=columns,
            )

    def _load_image(self, text: str) -> ImageSource:
        try:
            source = parse_reference(text, self.folder)
            if isinstance(source, Path):
                source = _as_on_disk(source)
                self._check_file(source, self.references)
            elif is_data_uri(source):
                is_shrunk = self.references.on_too_large == "shrink"
                check_data_uri(source, MAX_SHRUNK_BYTES if is_shrunk else self.references.max_bytes)
        except (ValueError, ImageError) as exc:
            raise ValueError(f"images: {exc}") from None
        return source


def filled(template: str, record: Mapping[str, JsonValue]) -> str:
    """Return *template* with the cells of *record* in place of `{column}`. `{{` and `}}` stand for braces.

    Raises:
        ValueError: A column is missing or empty, or a brace stands alone.
    """

    def cell(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        name = normalize(match[1] or "")
        if not name:
            raise ValueError(f"template: expected {{column}}, got {match[0]!r}. For a brace, write it twice")
        column = name if name in record else re.sub(r"[\s-]+", "_", name.lower())
        if column not in record:
            raise ValueError(f"template: the row has no column {name!r:.80}, only {', '.join(map(repr, record))[:200]}")
        value = record[column]
        text = f"{value:.15g}" if isinstance(value, float) else normalize(str(value)) if value is not None else ""
        if isinstance(value, list | dict) or not text:
            raise ValueError(f"template: expected text in the column {name!r}, got {value!r:.80}")
        return text

    return _PLACEHOLDER.sub(cell, template)


def _to_text(name: str, value: JsonValue) -> str:
    """Return a cell as normalized text. Spreadsheets and databases number their rows."""
    if name == "key" and (type(value) is int or (isinstance(value, float) and value.is_integer())):
        value = str(int(value))
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}: expected text, got {value!r:.80}")
    return normalize(value or "")


def _as_on_disk(path: Path) -> Path:
    """Return *path* with composed or decomposed letters, whichever exists: macOS and other systems differ."""
    forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return path if path.exists() else next((form for form in forms if form.exists()), path)


def _references(value: JsonValue) -> list[str]:
    entries = re.split(r"[|\n]", value) if isinstance(value, str) and not is_data_uri(value.strip()) else value
    listed = entries if isinstance(entries, list) else [] if entries is None else [entries]
    texts = [entry.strip() for entry in listed if isinstance(entry, str)]
    if len(texts) < len(listed):
        raise TypeError(f"images: expected a list of text, got {value!r:.80}")
    return [text for text in texts if text]


def _kept(value: JsonValue) -> JsonValue:
    """Return a cell for the results. Lists and objects become text. Long ones, such as data URIs, are cut."""
    if value is None or isinstance(value, bool | int | float):
        return value
    try:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    except RecursionError:
        text = "..."
    return _storable(text if len(text) <= _MAX_KEPT_CHARS else f"{text[:_MAX_KEPT_CHARS]}...")


def _storable(text: str) -> str:
    """Return *text* without halves of characters, which cannot be written."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
