"""Read prompts from .txt, .csv, .jsonl or any iterable, as `BatchRow`s with stable keys."""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias, cast

import anyio.to_thread

from nanobanana_async._concurrency.map_unordered import iter_any
from nanobanana_async.errors import InvalidBatchFile
from nanobanana_async.images.formats import SNIFF_BYTES, sniff
from nanobanana_async.ledger.schema import BatchRow
from nanobanana_async.models import GenerationRequest, ImageSource, SupportsSave
from nanobanana_async.policies import Limits

COLUMNS: Final = ("prompt", "images", "model", "aspect_ratio", "image_size", "key", "name")
"""Columns of a .csv or .jsonl file. Others are rejected, because a misspelt column would silently cost money."""
_MAX_KEY_CHARS: Final = 200
_MAX_CELL_CHARS: Final = 2**27
"""Longest cell of a .csv: four data URIs of 20 MiB."""


Rows: TypeAlias = Iterable[BatchRow | GenerationRequest | str] | AsyncIterable[BatchRow | GenerationRequest | str]


class RowKeys:
    """Assigns keys to rows: the given key, else a hash of the content with an ordinal for equal rows.

    The order of rows does not matter, rows may be added anywhere, and an edited row is a new row.
    """

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def row(
        self,
        request: GenerationRequest,
        *,
        key: str | None = None,
        name: str | None = None,
        images: Iterable[str] | None = None,
    ) -> BatchRow:
        """Return the row of *request*. *images* are its references as written by the user.

        Raises:
            ValueError: The key is invalid, or another row has it.
        """
        content = _fingerprint(request, list(map(_image_identity, request.images) if images is None else images))
        self._seen[content] += 1
        if key is None:
            ordinal = self._seen[content]
            key = content if ordinal == 1 else f"{content}-{ordinal}"
        elif not key.strip() or not key.isprintable() or len(key) > _MAX_KEY_CHARS:
            raise ValueError(f"key: expected 1 to {_MAX_KEY_CHARS} visible characters, got {key!r:.80}")
        else:
            self._seen[f"key {key}"] += 1
            if self._seen[f"key {key}"] > 1:
                raise ValueError(f"key: {key!r} is also the key of an earlier row. Use another key.")
        return BatchRow(key=key, request=request, name=name, fingerprint=content)


async def with_keys(rows: Rows) -> AsyncGenerator[BatchRow | Exception]:
    """Yield each of *rows* with a key. An error of the source is yielded last, after the rows before it."""
    keys = RowKeys()
    try:
        async with contextlib.aclosing(iter_any(rows)) as source:
            async for one in source:
                if isinstance(one, BatchRow):
                    yield one
                    continue
                request = one if isinstance(one, GenerationRequest) else GenerationRequest(one)
                images = [await _image_identity_async(image) for image in request.images]
                yield keys.row(request, images=images)
    except Exception as exc:  # noqa: BLE001 - raised by the consumer
        yield exc


def _fingerprint(request: GenerationRequest, images: list[str]) -> str:
    """Return 16 hex digits of everything the image depends on. A file counts by its path, not its content."""
    content = [request.prompt, images, request.model, request.aspect_ratio, request.image_size, dict(request.extra)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


async def _image_identity_async(image: ImageSource) -> str:
    """Return `_image_identity`, computed in a thread: it takes seconds for a large image."""
    return (
        _image_identity(image)
        if isinstance(image, str | Path)
        else await anyio.to_thread.run_sync(_image_identity, image)
    )


def _image_identity(image: ImageSource) -> str:
    if isinstance(image, str | Path):
        return str(image)
    if isinstance(image, SupportsSave):
        file = io.BytesIO()
        image.save(file, format="PNG")
        image = file.getvalue()
    return hashlib.sha256(image).hexdigest()


def read_rows(path: Path, *, file_format: str | None = None, **defaults: str | None) -> list[BatchRow]:
    """Return the rows of a file: one prompt per line (.txt), or records with `COLUMNS` (.csv, .tsv, .jsonl, .ndjson).

    In a .txt, lines that begin with `#` are comments. A backslash before it begins a prompt with `#`. Images are URLs,
    data URIs, or paths relative to the file. In a .csv they are separated by `|`. *defaults* fill empty columns.
    Blocking.

    Args:
        path: The file; `-` reads standard input.
        file_format: `"txt"`, `"csv"` or `"jsonl"`; None goes by the suffix, and means txt for standard input.
        **defaults: model, aspect_ratio and image_size of rows without them.

    Raises:
        InvalidBatchFile: Rows are invalid. `errors` lists all of them with their lines.
        OSError: The file cannot be read.
    """
    is_stdin = str(path) == "-"
    reader = _READERS.get(file_format or ("txt" if is_stdin else path.suffix.lower().removeprefix(".")))
    if reader is None:
        raise InvalidBatchFile(f"{path}: expected a .txt, .csv, .tsv, .jsonl or .ndjson file")
    text = _decode(path, sys.stdin.buffer.read() if is_stdin else path.read_bytes())
    try:
        GenerationRequest("-", **{name: value for name, value in defaults.items() if value})  # type: ignore[arg-type]
    except ValueError as exc:
        raise InvalidBatchFile(str(exc)) from None  # checked first, so that the error is not repeated for each row
    rows: list[BatchRow] = []
    errors: list[str] = []
    keys = RowKeys()
    try:
        for line, record in reader(text):
            try:
                rows.append(_parse_row(record, keys, path.parent, defaults))
            except (ValueError, TypeError) as exc:
                errors.append(f"line {line}: {exc}")
    except _FileError as exc:
        errors.append(str(exc))
    if errors:
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        raise InvalidBatchFile(f"{path}: {count}; nothing was submitted", errors=tuple(errors))
    if not rows:
        raise InvalidBatchFile(f"{path}: contains no rows")
    return rows


def _decode(path: Path, body: bytes) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark, as PowerShell writes it."""
    try:
        text = body.decode("utf-16" if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as exc:
        line = exc.object[: exc.start].count(b"\n") + 1
        raise InvalidBatchFile(
            f"{path}: line {line} is not UTF-8, got byte {exc.object[exc.start]:#x}. Save the file as UTF-8."
        ) from None
    if found := _CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise InvalidBatchFile(
            f"{path}: line {line} contains the control character {found.group()!r}. The file may have two encodings, "
            "or UTF-16 without a mark. Save it as UTF-8."
        )
    return text


_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class _FileError(Exception):
    """The file as a whole cannot be read as its type."""


_Record = tuple[int, Mapping[str, object] | ValueError]
"""A line number, and the columns of the row or what is wrong with it."""


def _from_txt(text: str) -> Iterator[_Record]:
    for line, part in enumerate(re.split(r"\r\n|\n|\r", text), start=1):  # line numbers as editors show them
        prompt = part.strip().removeprefix("\ufeff")  # files joined by a shell
        if prompt and not prompt.startswith("#"):
            yield line, {"prompt": prompt.removeprefix("\\") if prompt.startswith("\\#") else prompt}


def _from_csv(text: str) -> Iterator[_Record]:
    first_line = 1
    separator = re.match(r"sep=(.)\r?\n", text)  # Excel writes it, and reads it
    if separator is not None:
        text, first_line = text[separator.end() :], 2
    header = text.partition("\n")[0]
    # Spreadsheets in many locales write semicolons. No column name contains any of these.
    delimiter = max(",;\t", key=header.count) if separator is None else separator.group(1)
    csv.field_size_limit(_MAX_CELL_CHARS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    columns = [name.strip().lower() for name in _next_csv_row(reader) or []]
    while columns and not columns[-1]:
        columns.pop()
    if "prompt" not in columns:
        raise _FileError(f"line 1: expected a header with a column 'prompt', got {header.strip()!r:.80}")
    _check_columns(columns)
    line = reader.line_num + first_line
    while (cells := _next_csv_row(reader)) is not None:
        if any(cell.strip() for cell in cells):
            if any(cell.strip() for cell in cells[len(columns) :]):
                yield (
                    line,
                    ValueError(f"{len(cells)} cells, but {len(columns)} columns. Quote text that contains a comma."),
                )
            else:
                record = {name: cell for name, cell in zip(columns, cells, strict=False) if name and cell.strip()}
                images = [image.strip() for image in record.pop("images", "").split("|") if image.strip()]
                yield line, {**record, "images": images}
        line = reader.line_num + first_line


def _next_csv_row(reader: "Iterator[list[str]]") -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as exc:
        raise _FileError(f"line {reader.line_num}: {exc}. Check for a quote that is not closed.") from None  # type: ignore[attr-defined]  # csv readers have line_num


def _from_jsonl(text: str) -> Iterator[_Record]:
    for line, part in enumerate(text.split("\n"), start=1):  # not at U+2028, which JSON allows in a string
        if part.strip():
            try:
                record = json.loads(part)
            except json.JSONDecodeError as exc:
                record = ValueError(f"not JSON: {exc.msg} at column {exc.colno}")
            except (ValueError, RecursionError) as exc:
                record = ValueError(f"not JSON: {exc}")
            yield line, record if isinstance(record, dict | ValueError) else ValueError("not a JSON object")


def _check_columns(names: Iterable[str]) -> None:
    names = [name for name in names if name]  # pandas writes its index without a name
    if unknown := [name for name in names if name not in COLUMNS]:
        raise _FileError(f"line 1: column: expected one of {', '.join(COLUMNS)}, got {unknown[0]!r}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise _FileError(f"line 1: column: expected each name once, got {twice[0]!r} twice")


def _parse_row(
    record: Mapping[str, object] | ValueError, keys: RowKeys, folder: Path, defaults: Mapping[str, str | None]
) -> BatchRow:
    if isinstance(record, ValueError):
        raise record
    if unknown := record.keys() - set(COLUMNS):
        raise ValueError(f"column: expected one of {', '.join(COLUMNS)}, got {min(unknown)!r}")
    if type(record.get("key")) is int:  # spreadsheets and databases number their rows
        record = {**record, "key": str(record["key"])}
    for name, value in record.items():
        if name != "images" and not isinstance(value, str | None):
            raise TypeError(f"{name}: expected text, got {value!r:.80}")
    given = {name: value for name, value in record.items() if value not in (None, "")}
    key, title = given.pop("key", None), given.pop("name", None)
    images = given.pop("images", ())
    entries = cast("Sequence[object]", images) if isinstance(images, list | tuple) else [images]
    texts = [entry for entry in entries if isinstance(entry, str)]
    if len(texts) < len(entries):
        raise TypeError(f"images: expected a list of text, got {images!r:.80}")
    options = {**{name: value for name, value in defaults.items() if value is not None}, **given}
    sources = [_load_image(text, folder) for text in texts]
    request = GenerationRequest(str(options.pop("prompt", "")), images=sources, **options)  # type: ignore[arg-type]  # all are str
    if not any(character.isalnum() for character in request.prompt):
        raise ValueError(f"prompt: expected a letter or a digit, got {request.prompt!r:.80}")
    # The text as written, not the path: a row is the same in another working directory.
    return keys.row(request, key=key, name=title, images=texts)  # type: ignore[arg-type]  # all are str


def _load_image(text: str, folder: Path) -> ImageSource:
    if text.startswith(("https://", "http://", "data:")):
        return text
    path = folder / text
    try:
        with path.open("rb") as file:
            if sniff(file.read(SNIFF_BYTES)) is None:
                raise ValueError(f"images: expected a PNG, JPEG, WebP or GIF, got {path}")
    except OSError as exc:
        raise ValueError(f"images: {path} cannot be read ({exc.strerror})") from exc
    if path.stat().st_size > Limits().max_reference_bytes:
        raise ValueError(
            f"images: expected at most {Limits().max_reference_bytes // 2**20} MiB, got {path}. Scale the image down."
        )
    return path


_READERS: Final[Mapping[str, Callable[[str], Iterable[_Record]]]] = {
    "txt": _from_txt,
    "csv": _from_csv,
    "tsv": _from_csv,
    "jsonl": _from_jsonl,
    "ndjson": _from_jsonl,
}
