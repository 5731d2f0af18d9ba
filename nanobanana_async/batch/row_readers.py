"""The lines of a file as records: .txt, .csv, .tsv, .jsonl and .ndjson, as spreadsheets and programs write them."""

import csv
import difflib
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final, Protocol, TypeAlias

from nanobanana_async._text import normalize
from nanobanana_async.batch.result_columns import RESULT_COLUMNS, is_result_header
from nanobanana_async.batch.row_source import FileError
from nanobanana_async.models import JsonValue

COLUMNS: Final = ("prompt", "images", "model", "aspect_ratio", "image_size", "key", "name")
"""Columns that have a meaning. Others are kept for the results."""
_MAX_CELL_CHARS: Final = 2**27
"""Longest cell of a .csv: four data URIs of 20 MiB."""
_MIN_PART_CHARS: Final = 4
"""Part of the name of a column, such as `ratio`, that counts as misspelt."""

Record: TypeAlias = tuple[int, "Mapping[str, JsonValue] | ValueError"]
"""A line number, and the cells of the row by column, or what is wrong with it."""


def _from_txt(lines: Iterator[str], *, needs_prompt: bool) -> Iterator[Record]:  # noqa: ARG001 - see `Reader`
    for number, line in enumerate(lines, start=1):
        prompt = normalize(line)
        if number == 1 and "prompt" in map(str.strip, re.split("[,;\t]", prompt.lower())) and not prompt.isalpha():
            raise FileError("line 1 looks like the header of a table. Pass --format csv.")
        if prompt and not prompt.startswith("#"):
            yield number, {"prompt": prompt.removeprefix("\\") if prompt.startswith("\\#") else prompt}


def _from_csv(lines: Iterator[str], *, needs_prompt: bool) -> Iterator[Record]:
    delimiter, header, first_line = _header(lines)
    csv.field_size_limit(_MAX_CELL_CHARS)
    reader = csv.reader(_prepended(header, lines), delimiter=delimiter, strict=True, skipinitialspace=True)
    names = _next_csv_row(reader, first_line) or []
    columns, width = _columns(names, header, needs_prompt=needs_prompt), len(names)
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


def _columns(cells: list[str], header: str, *, needs_prompt: bool) -> list[str]:
    """Return the names of the columns; "" for one without a name, such as the index that pandas writes."""
    cells = cells[: -len(RESULT_COLUMNS)] if is_result_header(cells) else cells  # the table of an earlier run
    names = [_column(cell) for cell in cells]
    while names and not names[-1]:
        names.pop()
    if twice := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
        raise FileError(f"line 1: column: expected each name once, got {twice[0]!r} twice")
    if needs_prompt and "prompt" not in names:
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


def _from_jsonl(lines: Iterator[str], *, needs_prompt: bool) -> Iterator[Record]:  # noqa: ARG001 - see `Reader`
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


class Reader(Protocol):
    """Reads the lines of a file as records."""

    def __call__(self, lines: Iterator[str], *, needs_prompt: bool) -> Iterator[Record]:
        """Yield each record. With *needs_prompt* a table without the column is refused.

        Raises:
            FileError: The file as a whole is invalid.
        """
        ...


READERS: Final[Mapping[str, Reader]] = {
    "txt": _from_txt,
    "csv": _from_csv,
    "tsv": _from_csv,
    "jsonl": _from_jsonl,
    "ndjson": _from_jsonl,
}


def read_delimiter(lines: Iterator[str]) -> str:
    """Return what separates the cells of a .csv or .tsv."""
    return _header(lines)[0]
