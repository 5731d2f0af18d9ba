"""Read rows from .txt, .csv, .tsv, .jsonl and .ndjson files, as text editors, spreadsheets and data frames write them.

A file is read twice: first all of it is checked, then its rows are taken one at a time. So a million rows need no
memory, and an error in the last line is found before the first submit.
"""

import csv
import difflib
import functools
import json
import re
import sys
import unicodedata
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeAlias

import attrs

from nanobanana_async._text import normalize
from nanobanana_async.batch.result_columns import RESULT_COLUMNS, is_result_header
from nanobanana_async.batch.row_source import FileError, RowSource, read_lines
from nanobanana_async.batch.rows import RowKeys, digest
from nanobanana_async.errors import ImageError, InvalidBatchFile
from nanobanana_async.images.references import check_data_uri, check_file, is_data_uri, parse_reference
from nanobanana_async.ledger.schema import BatchRow
from nanobanana_async.models import GenerationRequest, ImageSource, JsonValue
from nanobanana_async.policies import Limits

COLUMNS: Final = ("prompt", "images", "model", "aspect_ratio", "image_size", "key", "name")
"""Columns that have a meaning. Others are kept for the results."""
_OPTIONS: Final = ("model", "aspect_ratio", "image_size")
_MAX_CELL_CHARS: Final = 2**27
"""Longest cell of a .csv: four data URIs of 20 MiB."""
_MAX_KEPT_CHARS: Final = 2000
"""Longest text of a cell that is kept for the results."""
_MAX_ERRORS: Final = 1000
_CHECKED_FILES: Final = 10_000
"""Number of reference images whose check is remembered."""
_PROGRESS_ROWS: Final = 1000
_MIN_PART_CHARS: Final = 4
"""Part of the name of a column, such as `ratio`, that counts as misspelt."""

_Record: TypeAlias = tuple[int, "Mapping[str, JsonValue] | ValueError"]
"""A line number, and the cells of the row by column, or what is wrong with it."""


def read_rows(
    path: Path,
    *,
    file_format: str | None = None,
    once: bool = False,
    on_progress: Callable[[int], None] = lambda _: None,
    **defaults: str | None,
) -> "RowFile":
    """Check a file of rows and return it: one prompt per line (.txt), or records with `COLUMNS` (.csv, .tsv, .jsonl).

    In a .txt, lines that begin with `#` are comments. A backslash before it begins a prompt with `#`. Images are URLs,
    data URIs, `file:` URLs, or paths relative to the file. In a .csv they are separated by `|`. Text is normalized:
    NFC, LF, no invisible characters, and no blanks around it. Blocking.

    Args:
        path: The file; `-` reads standard input.
        file_format: `"txt"`, `"csv"` or `"jsonl"`; None goes by the suffix, and means txt for standard input.
        once: Whether to leave out copies: rows with the content of an earlier row.
        on_progress: Called with the number of rows that were checked, every thousand rows.
        **defaults: model, aspect_ratio and image_size of rows without them.

    Raises:
        InvalidBatchFile: Rows are invalid. `errors` lists the first thousand of them with their lines.
        OSError: The file cannot be read.
    """
    try:
        options = {name: value for name, value in defaults.items() if value}
        GenerationRequest("-", **options)  # type: ignore[arg-type]  # checked here, so that it is one error
    except ValueError as exc:
        raise InvalidBatchFile(str(exc)) from None
    is_stdin = str(path) == "-"
    suffix = file_format or ("txt" if is_stdin else path.suffix.lower().removeprefix("."))
    if suffix not in _READERS:
        raise InvalidBatchFile(
            f"{path}: expected a .txt, .csv, .tsv, .jsonl or .ndjson file. For another name, pass --format."
        )
    source = RowSource(path, sys.stdin.buffer if is_stdin else None)
    return RowFile(source, _READERS[suffix], options, once=once, on_progress=on_progress)


class RowFile:
    """The rows of a file that was checked. Each iteration reads the file again. Made by `read_rows`."""

    def __init__(
        self,
        source: "RowSource",
        reader: Callable[[Iterator[str]], Iterable[_Record]],
        options: Mapping[str, str],
        *,
        once: bool,
        on_progress: Callable[[int], None],
    ) -> None:
        self._source = source
        self._reader = reader
        self._options = options
        self.once: Final = once
        """Whether copies are left out."""
        self.copies: int = 0
        """Rows with the content of an earlier row. They are among the rows, unless `once` is set."""
        self.extra_columns: tuple[str, ...] = ()
        """Columns that have no meaning. They are kept for the results, and not sent."""
        self.delimiter: str | None = None
        """What separates the cells of a .csv or .tsv; None for another format."""
        self.references: int = 0
        """Reference images of all rows."""
        self._keys = array("Q")
        self._check(on_progress)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        """Return whether a row has this *key*."""
        wanted = digest(str(key))
        at = bisect_left(self._keys, wanted)
        return at < len(self._keys) and self._keys[at] == wanted

    def __iter__(self) -> Iterator[BatchRow]:
        """Yield each row.

        Raises:
            InvalidBatchFile: The file was changed after it was checked.
        """
        changed = f"{self._source.path}: was changed after it was checked. Run the batch again."
        try:
            for _, row in self._parsed_rows(RowKeys()):
                # An editor may write into the file that is being read, for as long as the run lasts.
                if not isinstance(row, BatchRow) or not self._source.is_unchanged():
                    raise InvalidBatchFile(changed)
                yield row
        except (FileError, OSError):
            raise InvalidBatchFile(changed) from None

    def _check(self, on_progress: Callable[[int], None]) -> None:
        keys, errors, columns = RowKeys(), list[str](), dict[str, None]()
        try:
            for line, row in self._parsed_rows(keys):
                if isinstance(row, BatchRow):
                    self._keys.append(digest(row.key))
                    self.references += len(row.request.images)
                    columns.update(dict.fromkeys(row.columns))
                else:
                    errors.append(f"line {line}: {row}")
                if not len(self._keys) % _PROGRESS_ROWS:
                    on_progress(len(self._keys))
                if len(errors) == _MAX_ERRORS:
                    break
        except FileError as exc:
            errors.append(str(exc))
        path = self._source.path
        if errors:
            count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
            raise InvalidBatchFile(f"{path}: {count}; nothing was submitted", errors=tuple(errors))
        if not self._keys:
            raise InvalidBatchFile(f"{path}: contains no rows")
        self._keys = array("Q", sorted(self._keys))
        if self._reader is _from_csv:
            with self._source.open() as file:
                self.delimiter = _header(read_lines(file, path))[0]
        self.copies = keys.copies
        self.extra_columns = tuple(name for name in columns if name not in COLUMNS)

    def _parsed_rows(self, keys: RowKeys) -> Iterator[tuple[int, BatchRow | Exception]]:
        parser = _RowParser(self._source.folder, self._options, keys)
        with self._source.open() as file:
            for line, record in self._reader(read_lines(file, self._source.path)):
                try:
                    row = parser.row(line, record)
                except (ValueError, TypeError, ImageError) as exc:
                    yield line, exc
                    continue
                if not (self.once and keys.is_copy(row)):
                    yield line, row


# --- lines to records ------------------------------------------------------------------------------------------------


def _from_txt(lines: Iterator[str]) -> Iterator[_Record]:
    for number, line in enumerate(lines, start=1):
        prompt = normalize(line)
        if number == 1 and "prompt" in map(str.strip, re.split("[,;\t]", prompt.lower())) and not prompt.isalpha():
            raise FileError("line 1 looks like the header of a table. Pass --format csv.")
        if prompt and not prompt.startswith("#"):
            yield number, {"prompt": prompt.removeprefix("\\") if prompt.startswith("\\#") else prompt}


def _from_csv(lines: Iterator[str]) -> Iterator[_Record]:
    delimiter, header, first_line = _header(lines)
    csv.field_size_limit(_MAX_CELL_CHARS)
    reader = csv.reader(_prepended(header, lines), delimiter=delimiter, strict=True, skipinitialspace=True)
    names = _next_csv_row(reader, first_line) or []
    columns, width = _columns(names, header), len(names)
    line = reader.line_num + first_line
    while (cells := _next_csv_row(reader, first_line)) is not None:
        given = [cell.strip() for cell in cells]
        if any(given[width:]):
            yield line, ValueError(f"{len(cells)} cells, but {width} columns. Quote text that contains a comma.")
        elif any(given):
            yield line, {name: cell for name, cell in zip(columns, given, strict=False) if name}
        line = reader.line_num + first_line


def _header(lines: Iterator[str]) -> tuple[str, str, int]:
    """Return the delimiter of a .csv, its header, and the line number of the header."""
    header = next(lines, "")
    if (separator := re.fullmatch(r"sep=(.)\n?", header)) is not None:  # Excel writes it, and reads it
        return separator.group(1), next(lines, ""), 2
    # Spreadsheets in many locales write semicolons. No column name contains any of these.
    return max(",;\t", key=header.count), header, 1


def _prepended(first: str, lines: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
        yield from lines


def _next_csv_row(reader: Iterator[list[str]], first_line: int) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as exc:
        line = reader.line_num + first_line - 1  # type: ignore[attr-defined]  # csv readers have line_num
        raise FileError(f"line {line}: {exc}. Check for a quote that is not closed.") from None


def _columns(cells: list[str], header: str) -> list[str]:
    """Return the names of the columns; "" for one without a name, such as the index that pandas writes."""
    cells = cells[: -len(RESULT_COLUMNS)] if is_result_header(cells) else cells  # the table of an earlier run
    names = [_column(cell) for cell in cells]
    while names and not names[-1]:
        names.pop()
    if twice := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
        raise FileError(f"line 1: column: expected each name once, got {twice[0]!r} twice")
    if "prompt" not in names:
        raise FileError(f"line 1: expected a header with a column 'prompt', got {header.strip()!r:.80}")
    return names


@functools.lru_cache(1000)
def _column(written: str) -> str:
    """Return the column that *written* means: one of `COLUMNS`, or the text itself.

    Raises:
        FileError: It looks like a misspelt column. It would be ignored, and the images would not be those wanted.
    """
    text = normalize(written)
    name = re.sub(r"[\s-]+", "_", text.lower())
    if name in COLUMNS:
        return name
    near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.8)
    near += [column for column in COLUMNS if len(name) >= _MIN_PART_CHARS and name in column]
    if near:
        raise FileError(f"line 1: column: got {text!r}. Rename it to {near[0]!r} if you mean that, or to another name.")
    return text


def _from_jsonl(lines: Iterator[str]) -> Iterator[_Record]:
    for number, line in enumerate(lines, start=1):
        if line.strip("\ufeff \t\n"):
            try:
                text = line.strip("\ufeff \t\n")
                record = json.loads(text, parse_constant=lambda _: None, object_pairs_hook=_Pairs)  # pandas writes NaN
            except json.JSONDecodeError as exc:
                record = ValueError(f"not JSON: {exc.msg} at column {exc.colno}")
            except (ValueError, RecursionError) as exc:
                record = ValueError(f"not JSON: {exc}")
            yield number, _to_record(record) if isinstance(record, _Pairs | ValueError) else _NO_OBJECT


class _Pairs(list[tuple[str, JsonValue]]):
    """The fields of a JSON object, which may have a name twice."""


_NO_OBJECT: Final = ValueError("not a JSON object")


def _to_record(pairs: "_Pairs | ValueError") -> "Mapping[str, JsonValue] | ValueError":
    if isinstance(pairs, ValueError):
        return pairs
    record: dict[str, JsonValue] = {}
    for name, value in pairs:
        try:
            column = _column(name)
        except FileError as exc:
            return ValueError(str(exc).removeprefix("line 1: "))
        if column in record:
            return ValueError(f"{column}: expected each name once, got it twice")
        record[column] = value
    return record


_READERS: Final[Mapping[str, Callable[[Iterator[str]], Iterable[_Record]]]] = {
    "txt": _from_txt,
    "csv": _from_csv,
    "tsv": _from_csv,
    "jsonl": _from_jsonl,
    "ndjson": _from_jsonl,
}


# --- records to rows -------------------------------------------------------------------------------------------------


@attrs.frozen
class _RowParser:
    """Makes rows of records. References are checked once each."""

    folder: Path
    options: Mapping[str, str]
    keys: RowKeys
    _check_file: Callable[[Path, int], None] = attrs.field(
        init=False, factory=lambda: functools.lru_cache(_CHECKED_FILES)(check_file)
    )

    def row(self, line: int, record: Mapping[str, JsonValue] | ValueError) -> BatchRow:
        """Return the row of *record*. Raises ValueError, TypeError or ImageError if it is invalid."""
        if isinstance(record, ValueError):
            raise record
        cells = {name: _to_text(name, value) for name, value in record.items() if name in COLUMNS and name != "images"}
        given = {name: text for name, text in cells.items() if text}
        texts = _references(record.get("images"))
        options = dict(self.options)
        options.update((name, given[name]) for name in _OPTIONS if name in given)
        sources = [self._load_image(text) for text in texts]
        request = GenerationRequest(given.get("prompt", ""), images=sources, **options)  # type: ignore[arg-type]
        if not any(character.isalnum() for character in request.prompt):
            raise ValueError(f"prompt: expected a letter or a digit, got {request.prompt!r:.80}")
        # The text as written, not the path: a row is the same in another working directory.
        key, fingerprint = self.keys.assign(request, given.get("key"), texts)
        columns: dict[str, JsonValue] = {}
        if len(record) > 1:
            columns.update((_storable(name), _kept(value)) for name, value in record.items())
        name = _storable(given["name"]) if "name" in given else None
        return BatchRow(key=key, request=request, name=name, fingerprint=fingerprint, line=line, columns=columns)

    def _load_image(self, text: str) -> ImageSource:
        max_bytes = Limits().max_reference_bytes
        try:
            source = parse_reference(text, self.folder)
            if isinstance(source, Path):
                source = _as_on_disk(source)
                self._check_file(source, max_bytes)
            elif is_data_uri(source):
                check_data_uri(source, max_bytes)
        except (ValueError, ImageError) as exc:
            raise ValueError(f"images: {exc}") from None
        return source


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
