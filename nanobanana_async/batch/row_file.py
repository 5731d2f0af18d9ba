"""Read rows from .txt, .csv, .tsv, .jsonl and .ndjson files, as text editors, spreadsheets and data frames write them.

A file is read twice: first all of it is checked, then its rows are taken one at a time. So a million rows need no
memory, and an error in the last line is found before the first submit.
"""

import sys
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from nanobanana_async.batch.row_parser import RowParser
from nanobanana_async.batch.row_readers import COLUMNS, READERS, read_delimiter
from nanobanana_async.batch.row_source import FileError, RowSource, read_lines
from nanobanana_async.batch.rows import RowKeys, digest
from nanobanana_async.errors import ImageError, InvalidBatchFile
from nanobanana_async.ledger.schema import BatchRow
from nanobanana_async.models import GenerationRequest, honours_image_size
from nanobanana_async.policies import ReferencePolicy

_MAX_ERRORS: Final = 1000
_PROGRESS_ROWS: Final = 1000


def read_rows(  # noqa: PLR0913 - public: each is an option of the command
    path: Path,
    *,
    file_format: str | None = None,
    once: bool = False,
    template: str | None = None,
    variants: int = 1,
    references: ReferencePolicy = ReferencePolicy(),
    on_progress: Callable[[int], None] = lambda _: None,
    **defaults: str | None,
) -> "RowFile":
    """Check a file of rows and return it: one prompt per line (.txt), or records with `COLUMNS` (.csv, .tsv, .jsonl).

    In a .txt, lines that begin with `#` are comments. A backslash before it begins a prompt with `#`. Images are URLs,
    data URIs, `file:` URLs, or paths relative to the file. In a .csv they are separated by `|`. Text is normalized:
    NFC, LF, no invisible characters, and no blanks around it. Blocking.

    A template such as `"photo of {name}, {colour}"` makes the prompts from columns. `{{` and `}}` stand for braces.

    Args:
        path: The file; `-` reads standard input.
        file_format: `"txt"`, `"csv"` or `"jsonl"`; None goes by the suffix, and means txt for standard input.
        once: Whether to leave out copies: rows with the content of an earlier row.
        template: Text of the prompts, with the names of columns in braces; None takes the column `prompt`.
        variants: Rows of each record. The first has its key, and the nth `key-n`. Their names are `name-1`, `name-2`
            and so on. A larger number adds rows.
        references: How large reference images may be. Pass that of the client.
        on_progress: Called with the number of rows that were checked, every thousand rows.
        **defaults: model, aspect_ratio and image_size of rows without them.

    Raises:
        InvalidBatchFile: Rows are invalid. `errors` lists the first thousand of them with their lines.
        OSError: The file cannot be read.
    """
    if variants < 1:
        raise InvalidBatchFile(f"variants: expected 1 or more, got {variants}")
    try:
        options = {name: value for name, value in defaults.items() if value}
        GenerationRequest("-", **options)  # type: ignore[arg-type]  # checked here, so that it is one error
    except ValueError as exc:
        raise InvalidBatchFile(str(exc)) from None
    is_stdin = str(path) == "-"
    suffix = file_format or ("txt" if is_stdin else path.suffix.lower().removeprefix("."))
    if suffix not in READERS:
        raise InvalidBatchFile(
            f"{path}: expected a .txt, .csv, .tsv, .jsonl or .ndjson file. For another name, pass --format."
        )
    source = RowSource(path, sys.stdin.buffer if is_stdin else None)
    shape = RowShape(suffix, options, template, variants, references, once=once)
    return RowFile(source, shape, on_progress=on_progress)


@attrs.frozen
class RowShape:
    """How rows are made of the lines of a file. The fields are those of `read_rows`."""

    file_format: str
    options: Mapping[str, str]
    template: str | None
    variants: int
    references: ReferencePolicy
    once: bool = attrs.field(kw_only=True)


class RowFile:
    """The rows of a file that was checked. Each iteration reads the file again. Made by `read_rows`."""

    def __init__(self, source: RowSource, shape: RowShape, *, on_progress: Callable[[int], None]) -> None:
        self._source = source
        self._shape = shape
        self.once: Final = shape.once
        """Whether copies are left out."""
        self.copies: int = 0
        """Rows with the content of an earlier row. They are among the rows, unless `once` is set."""
        self.extra_columns: tuple[str, ...] = ()
        """Columns that have no meaning. They are kept for the results, and not sent."""
        self.delimiter: str | None = None
        """What separates the cells of a .csv or .tsv; None for another format."""
        self.references: int = 0
        """Reference images of all rows."""
        self.unhonoured_sizes: Final[Counter[str]] = Counter()
        """Rows with an image size, by model, of models that are not known to honour it."""
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
                    if row.request.image_size is not None and not honours_image_size(row.request.model):
                        self.unhonoured_sizes[row.request.model] += 1
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
        if self._shape.file_format in ("csv", "tsv"):
            with self._source.open() as file:
                self.delimiter = read_delimiter(read_lines(file, path))
        self.copies = keys.copies
        self.extra_columns = tuple(name for name in columns if name not in COLUMNS)

    def _parsed_rows(self, keys: RowKeys) -> Iterator[tuple[int, BatchRow | Exception]]:
        shape = self._shape
        parser = RowParser(self._source.folder, shape.options, keys, shape.template, shape.variants, shape.references)
        with self._source.open() as file:
            lines = read_lines(file, self._source.path)
            for line, record in READERS[shape.file_format](lines, needs_prompt=shape.template is None):
                try:
                    for number, row in enumerate(parser.rows(line, record)):
                        if shape.once and number == 0 and keys.is_copy(row):
                            break
                        yield line, row
                except (ValueError, TypeError, ImageError) as exc:
                    yield line, exc
