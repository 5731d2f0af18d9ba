"""Write the gallery `index.html`, the manifest `manifest.jsonl` and the table `results.csv` from the ledger."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from nanobanana_async._text import format_credits
from nanobanana_async.batch import gallery
from nanobanana_async.batch.result_columns import RESULT_COLUMNS, is_result_header
from nanobanana_async.batch.thumbnails import Thumbnails
from nanobanana_async.images.files import replacing
from nanobanana_async.ledger.batch_rows import file_record
from nanobanana_async.ledger.restored import GALLERY_MARK, GALLERY_NAME, manifest_path
from nanobanana_async.ledger.schema import LedgerRow, RowState
from nanobanana_async.models import JsonValue

_RESULTS_NAME: Final = "results.csv"
_BOM: Final = "\ufeff"
"""Excel takes a .csv for UTF-8 only with this mark."""
_THUMBNAILS_S: Final = 10.0
"""Longest time that a report makes thumbnails, of 0.2 s each. The next one goes on."""
_HEAD_BYTES: Final = 65_536
_FORMULA_STARTS: Final = ("=", "+", "-", "@")

_STATUS_LABELS: Final = {RowState.SAVED: "succeeded", RowState.FAILED: "failed", RowState.UNKNOWN: "unknown"}


def gallery_path(folder: Path) -> Path:
    """Return the gallery of the batch in *folder*."""
    return _own_path(folder / GALLERY_NAME, lambda head: GALLERY_MARK in head)


def results_path(folder: Path) -> Path:
    """Return the table of the batch in *folder*."""
    return _own_path(folder / _RESULTS_NAME, _is_table)


def _is_table(head: bytes) -> bool:
    text = head.decode("utf-8-sig", "replace")
    for delimiter in ",;\t":
        with suppress(csv.Error, StopIteration):
            if is_result_header(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))):
                return True
    return False


def _own_path(path: Path, is_own: Callable[[bytes], bool]) -> Path:
    """Return *path*, or another one if there is a file of the user's."""
    try:
        if path.is_file():  # and not a pipe, which would block
            with path.open("rb") as file:
                if is_own(file.read(_HEAD_BYTES)):
                    return path
        elif not path.is_symlink() and not path.exists():
            return path
    except OSError:
        pass
    return path.with_name(f"nanobanana-{path.name}")


class ReportWriter:
    """Writes the three files, and replaces the earlier ones together when the block ends without an error. Blocking.

    *columns* are those of the files of the batch. A table begins with them, and has their *delimiter*. With semicolons,
    which spreadsheets write where the comma is the decimal sign, credits have one, too.

    Raises:
        OSError: A file could not be written.
    """

    def __init__(self, folder: Path, columns: Iterable[str], delimiter: str = ",") -> None:
        self._stack = ExitStack()
        self._decimal_sign = "," if delimiter == ";" else "."
        self._given = list(columns) or ["prompt"]
        self._thumbnails = Thumbnails(folder, _THUMBNAILS_S)
        title = os.fsencode(folder.resolve().name).decode("utf-8", "replace")
        head, self._tail = gallery.frame(title)
        try:
            self._page, self._manifest, results = (
                io.TextIOWrapper(
                    self._stack.enter_context(replacing(path, is_durable=False)),
                    "utf-8",
                    errors="replace",
                    newline="",
                    write_through=True,
                )
                for path in (gallery_path(folder), manifest_path(folder), results_path(folder))
            )
            self._page.write(head)
            results.write(_BOM)
            self._results = csv.writer(results, delimiter=delimiter)
            names = [f"nanobanana_{name}" if name in self._given else name for name in RESULT_COLUMNS]
            self._results.writerow([*self._given, *names])
        except BaseException as exc:
            self._stack.__exit__(type(exc), exc, exc.__traceback__)
            raise

    def add(self, records: Iterable[LedgerRow]) -> None:
        """Write some rows."""
        for record in records:
            self._manifest.write(f"{json.dumps(_manifest_line(record), ensure_ascii=False)}\n")
            self._results.writerow([*_given_cells(record, self._given), *_own_cells(record, self._decimal_sign)])
            if not record.state.is_ready:
                self._page.write(f"{gallery.render(_card(record, self._thumbnails))}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is None:
            self._page.write(self._tail)
        self._stack.__exit__(kind, exc, trace)


def _given_cells(record: LedgerRow, names: Iterable[str]) -> list[str]:
    known = {"prompt": record.prompt, "key": record.key if "key" in record.columns else ""}
    return [_cell(record.columns.get(name, known.get(name, ""))) for name in names]


def _cell(value: JsonValue) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)


def _own_cells(record: LedgerRow, decimal_sign: str) -> list[object]:
    info = record.files[0].info if record.files else None
    reason = record.reason or ""  # the service's words: a spreadsheet would run them as a formula
    return [
        "|".join(file.path.name for file in record.files),
        None if info is None else info.width,
        None if info is None else info.height,
        "|".join(one.kind for file in record.files for one in file.mismatch),
        record.state.value,
        None if record.total_consumed is None else format_credits(record.total_consumed).replace(".", decimal_sign),
        f"'{reason}" if reason.startswith(_FORMULA_STARTS) else reason,
    ]


def _card(record: LedgerRow, thumbnails: Thumbnails) -> gallery.GalleryCard:
    is_done = record.state is RowState.SAVED
    image = record.files[0].path if is_done and record.files else None
    return gallery.GalleryCard(
        prompt=record.prompt,
        status=_STATUS_LABELS.get(record.state, record.state.value),
        file=None if image is None else image.name,
        thumbnail=None if image is None else thumbnails.link(image),
        seconds=_seconds(record),
        cost="" if record.total_consumed is None else format_credits(record.total_consumed),
        note="" if is_done else (record.reason or ""),
        reason_kind=None if is_done or record.reason_kind is None else record.reason_kind.value,
        mismatch=tuple(one for file in record.files for one in file.mismatch),
    )


def _manifest_line(record: LedgerRow) -> dict[str, object]:
    return {
        "key": record.key,
        "number": record.number,
        "line": record.line,
        "state": record.state.value,
        "prompt": record.prompt,
        "model": record.model,
        "image_size": record.image_size,
        "fingerprint": record.fingerprint,
        "task_id": record.task_id,
        "files": list(map(file_record, record.files)),
        "consumed": None if record.consumed is None else f"{record.consumed:f}",
        "total_consumed": None if record.total_consumed is None else f"{record.total_consumed:f}",
        "attempt": record.attempt,
        "reason_kind": record.reason_kind,
        "possible_duplicates": record.possible_duplicates,
        "held_charges": record.held_charges,
        "seconds": _seconds(record),
        "reason": record.reason,
        "columns": dict(record.columns),
    }


def _seconds(record: LedgerRow) -> float | None:
    if record.saved_at is None or record.intended_at is None:
        return None
    return round(max(0.0, record.saved_at - record.intended_at), 3)
