"""Prompts from .txt, .csv, .jsonl, or any iterable: each a `BatchRow` with a key that is the same tomorrow."""

import contextlib
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeAlias

import anyio.to_thread
import attrs

from nanobanana_async._concurrency.map_unordered import iter_any
from nanobanana_async.errors import InvalidBatchFile
from nanobanana_async.images.formats import SNIFF_BYTES, sniff
from nanobanana_async.models import GenerationRequest, ImageSource, SupportsSave
from nanobanana_async.policies import Limits

COLUMNS: Final = ("prompt", "images", "model", "aspect_ratio", "image_size", "key", "name")
"""What a .csv or .jsonl may name. Anything else is refused: a misspelt column would silently cost money."""
_MAX_KEY_CHARS: Final = 200


@attrs.frozen(kw_only=True)
class BatchRow:
    """One picture that is wanted."""

    key: str
    """What makes it the same row in a later run."""
    request: GenerationRequest
    name: str | None = None
    """What to call the file; None makes a name from the prompt."""
    fingerprint: str
    """Of the request's content: two rows with one key must not differ in it."""


Rows: TypeAlias = Iterable[BatchRow | GenerationRequest | str] | AsyncIterable[BatchRow | GenerationRequest | str]


class RowKeys:
    """Gives rows their keys: the given one, else the content's hash, with an ordinal for equal rows.

    So the order of rows does not matter, rows may be added anywhere, and an edited row is a new row.
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
        """Return the row of *request*; *images* are its references as the user spelt them.

        Raises:
            ValueError: The key is not usable, or another row has it.
        """
        content = _fingerprint(request, list(map(_image_identity, request.images) if images is None else images))
        self._seen[content] += 1
        if key is None:
            ordinal = self._seen[content]
            key = content if ordinal == 1 else f"{content}-{ordinal}"
        elif not key.strip() or not key.isprintable() or len(key) > _MAX_KEY_CHARS:
            raise ValueError(f"key: expected 1 to {_MAX_KEY_CHARS} printable characters, got {key!r:.80}")
        else:
            self._seen[f"key {key}"] += 1
            if self._seen[f"key {key}"] > 1:
                raise ValueError(f"key: {key!r} is the key of an earlier row, too")
        return BatchRow(key=key, request=request, name=name, fingerprint=content)


async def with_keys(rows: Rows) -> AsyncGenerator[BatchRow | Exception]:
    """Yield each of *rows* with a key; what goes wrong with them comes last, so that those before it are not lost."""
    keys = RowKeys()
    try:
        async with contextlib.aclosing(iter_any(rows)) as wanted:
            async for one in wanted:
                if isinstance(one, BatchRow):
                    yield one
                    continue
                request = one if isinstance(one, GenerationRequest) else GenerationRequest(one)
                images = [await _image_identity_async(image) for image in request.images]
                yield keys.row(request, images=images)
    except Exception as exc:  # noqa: BLE001 - raised by whoever consumes
        yield exc


def _fingerprint(request: GenerationRequest, images: list[str]) -> str:
    """Return 16 hex digits of what the picture depends on. A file counts by its path, not by what is in it."""
    content = [request.prompt, images, request.model, request.aspect_ratio, request.image_size, dict(request.extra)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


async def _image_identity_async(image: ImageSource) -> str:
    """Return what `_image_text` does, which takes seconds for a large picture."""
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


def read_rows(path: Path, **defaults: str | None) -> list[BatchRow]:
    """Return the rows of a file: a prompt a line (.txt), or records with `COLUMNS` (.csv, .jsonl).

    Images are URLs, data URIs, or paths from the file's own folder; in a .csv, several are parted by `|`. *defaults*
    stand in for columns that a row leaves empty. Blocking.

    Raises:
        InvalidBatchFile: Some rows cannot be used: `faults` names them all, with their lines.
        OSError: The file cannot be read.
    """
    readers: dict[str, Callable[[str], Iterable[_Record]]] = {
        ".txt": _from_txt,
        ".csv": _from_csv,
        ".jsonl": _from_jsonl,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InvalidBatchFile(f"{path}: rows are read from .txt, .csv and .jsonl files")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = exc.object[: exc.start].count(b"\n") + 1
        raise InvalidBatchFile(
            f"{path}: line {line} is not UTF-8 (byte {exc.object[exc.start]:#x}); save it as UTF-8"
        ) from None
    try:
        GenerationRequest("-", **{name: value for name, value in defaults.items() if value})  # type: ignore[arg-type]
    except ValueError as exc:
        raise InvalidBatchFile(str(exc)) from None  # else every row would be blamed for it
    rows, errors, keys = [], [], RowKeys()
    try:
        for line, record in reader(text):
            try:
                rows.append(_parse_row(record, keys, path.parent, defaults))
            except (ValueError, TypeError) as exc:
                errors.append(f"line {line}: {exc}")
    except _FileError as exc:
        errors.append(str(exc))
    if errors:
        count = "a row" if len(errors) == 1 else f"{len(errors)} rows"
        raise InvalidBatchFile(f"{path}: {count} cannot be used; nothing was submitted", errors=tuple(errors))
    if not rows:
        raise InvalidBatchFile(f"{path}: there is no row in it")
    return rows


class _FileError(Exception):
    """The file has no rows in the sense of its suffix."""


_Record = tuple[int, Mapping[str, object]]


def _from_txt(text: str) -> Iterator[_Record]:
    for line, prompt in enumerate(re.split(r"\r\n|\n|\r", text), start=1):  # lines as editors count them
        if prompt.strip():
            yield line, {"prompt": prompt.strip()}


def _from_csv(text: str) -> Iterator[_Record]:
    header = text.partition("\n")[0]
    # Spreadsheets of half of Europe write semicolons; no column of ours has any of these in its name.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    columns = [name.strip().lower() for name in _next_csv_row(reader) or []]
    if "prompt" not in columns:
        raise _FileError(f"line 1: expected a header with a column 'prompt', got {header.strip()!r:.80}")
    _check_columns(columns)
    line = reader.line_num + 1
    while (cells := _next_csv_row(reader)) is not None:
        if any(cell.strip() for cell in cells):
            if len(cells) > len(columns):
                yield (
                    line,
                    {"fault": f"{len(cells)} cells, but {len(columns)} columns; quote a text with a comma in it"},
                )
            else:
                record = {name: cell for name, cell in zip(columns, cells, strict=False) if cell.strip()}
                images = [image.strip() for image in record.pop("images", "").split("|") if image.strip()]
                yield line, {**record, "images": images}
        line = reader.line_num + 1


def _next_csv_row(reader: "Iterator[list[str]]") -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as exc:
        raise _FileError(f"line {reader.line_num}: {exc}; is there a quote that is not closed?") from None  # type: ignore[attr-defined]  # a csv reader has it


def _from_jsonl(text: str) -> Iterator[_Record]:
    for line, part in enumerate(text.split("\n"), start=1):  # and not at U+2028, which JSON allows in a string
        if part.strip():
            try:
                record = json.loads(part)
            except json.JSONDecodeError as exc:
                record = {"fault": f"not JSON: {exc.msg} at column {exc.colno}"}
            except (ValueError, RecursionError) as exc:
                record = {"fault": f"not JSON: {exc}"}
            yield line, record if isinstance(record, dict) else {"fault": "not a JSON object"}


def _check_columns(names: Iterable[str]) -> None:
    names = list(names)
    if unknown := [name for name in names if name not in COLUMNS]:
        raise _FileError(f"line 1: {unknown[0]!r} is not one of {', '.join(COLUMNS)}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise _FileError(f"line 1: there are two columns {twice[0]!r}")


def _parse_row(
    record: Mapping[str, object], keys: RowKeys, folder: Path, defaults: Mapping[str, str | None]
) -> BatchRow:
    if "fault" in record:
        raise ValueError(record["fault"])
    if unknown := record.keys() - set(COLUMNS):
        raise ValueError(f"{min(unknown)!r} is not one of {', '.join(COLUMNS)}")
    for name, value in record.items():
        if name != "images" and not isinstance(value, str | None):
            raise TypeError(f"{name}: expected text, got {value!r:.80}")
    given = {name: value for name, value in record.items() if value not in (None, "")}
    key, title = given.pop("key", None), given.pop("name", None)
    images = given.pop("images", ())
    if not isinstance(images, str | list | tuple) or not all(isinstance(image, str) for image in images):
        raise TypeError(f"images: expected texts, got {images!r:.80}")
    options = {**{name: value for name, value in defaults.items() if value is not None}, **given}
    texts = [images] if isinstance(images, str) else images
    sources = [_load_image(text, folder) for text in texts]
    request = GenerationRequest(str(options.pop("prompt", "")), images=sources, **options)  # type: ignore[arg-type]  # texts, all of them
    # The spelling, not the path: the same row from another working directory is the same row.
    return keys.row(request, key=key, name=title, images=texts)  # type: ignore[arg-type]  # the same


def _load_image(text: str, folder: Path) -> ImageSource:
    if text.startswith(("https://", "http://", "data:")):
        return text
    path = folder / text
    try:
        with path.open("rb") as file:
            if sniff(file.read(SNIFF_BYTES)) is None:
                raise ValueError(f"images: {path} is not a PNG, JPEG, WebP or GIF")
    except OSError as exc:
        raise ValueError(f"images: {path} cannot be read ({exc.strerror})") from exc
    if path.stat().st_size > Limits().max_reference_bytes:
        raise ValueError(f"images: {path} is larger than {Limits().max_reference_bytes // 2**20} MiB")
    return path
