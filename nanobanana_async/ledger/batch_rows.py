"""The rows of a batch in the tables of `ledger.schema`. SQL on a given connection."""

import json
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, Final

import attrs

from nanobanana_async._text import slugify
from nanobanana_async.ledger.schema import NEXT_ATTEMPT, SELECT_ROWS, BatchRow, LedgerRow, RowState, find_row
from nanobanana_async.models import JsonValue
from nanobanana_async.saved import ImageInfo, Mismatch, SavedImage


def upsert_row(
    db: sqlite3.Connection, row: BatchRow, listing: int | None, image_stems: frozenset[str]
) -> sqlite3.Row | None:
    """Insert *row* as ready, or update it if no charge is pending. Return its line; None if *listing* has its key.

    A new row whose image exists (*image_stems*) was charged before the ledger was lost. It is inserted as unknown if
    the ledger has been adopted since.

    Raises:
        ValueError: The image of a new row exists, and the ledger was not adopted.
    """
    found = find_row(db, row.key)
    if found is not None and listing is not None and found["listing"] == listing:
        return None
    content = (row.fingerprint, row.request.prompt, row.request.model, row.request.image_size)
    if found is None:
        number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM rows").fetchone()[0]
        columns = "key, number, file_stem, fingerprint, prompt, model, image_size"
        stem = _stem(db, row, number)
        is_restored = _is_restored(db, stem, image_stems)
        db.execute(f"INSERT INTO rows ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", (row.key, number, stem, *content))
        if is_restored:
            add_restored_attempt(db, row.key, RowState.UNKNOWN)
    elif found["fingerprint"] != row.fingerprint and found["state"] in _EDITABLE_STATES:
        update = "UPDATE rows SET fingerprint = ?, prompt = ?, model = ?, image_size = ? WHERE key = ?"
        db.execute(update, (*content, row.key))
    given = json.dumps(dict(row.columns)) if row.columns else None
    if found is not None and found["fingerprint"] != row.fingerprint and found["state"] not in _EDITABLE_STATES:
        given = found["columns"]  # the image was made from what the row was before
    db.execute("UPDATE rows SET line = ?, columns = ?, listing = ? WHERE key = ?", (row.line, given, listing, row.key))
    entered: sqlite3.Row = db.execute(f"{SELECT_ROWS} WHERE key = ?", (row.key,)).fetchone()
    return entered


def begin_listing(db: sqlite3.Connection) -> int:
    """Return the number of a new listing."""
    db.execute("UPDATE meta SET value = value + 1 WHERE name = 'listing'")
    number: int = db.execute("SELECT value FROM meta WHERE name = 'listing'").fetchone()[0]
    return number


def unlisted(db: sqlite3.Connection, listing: int) -> list[sqlite3.Row]:
    """Return the lines of charged rows that are not saved, and are not in this *listing*."""
    where = "state IN ('submitted', 'succeeded') AND listing IS NOT ?"
    return db.execute(f"{SELECT_ROWS} WHERE {where} ORDER BY number", (listing,)).fetchall()


def last_number(db: sqlite3.Connection) -> int:
    """Return the number of the last row; 0 if there is none."""
    number: int = db.execute("SELECT coalesce(max(number), 0) FROM rows").fetchone()[0]
    return number


def page(
    db: sqlite3.Connection, *, numbers: tuple[int, int], states: tuple[RowState, ...], folder: Path
) -> list[LedgerRow]:
    """Return the rows with these *numbers*, from first to last, all or those in *states*."""
    where = "number BETWEEN ? AND ?"
    where += f" AND coalesce(state, 'ready') IN ({', '.join('?' * len(states))})" if states else ""
    found = db.execute(f"{SELECT_ROWS} WHERE {where} ORDER BY number", (*numbers, *states))
    return [to_ledger_row(line, folder) for line in found]


def count_states(db: sqlite3.Connection, listed: Container[str]) -> Counter[tuple[RowState, bool]]:
    """Return the number of rows by state and whether their key is in *listed*."""
    states = db.execute("SELECT key, coalesce(state, 'ready') FROM rows LEFT JOIN attempts USING (key, attempt)")
    counts = Counter((state, key in listed) for key, state in states)
    return Counter({(RowState(state), is_listed): count for (state, is_listed), count in counts.items()})


def count_mismatches(db: sqlite3.Connection, listed: Container[str]) -> Counter[str]:
    """Return the number of mismatches of the saved images by kind, of rows whose key is in *listed*."""
    lines = db.execute(
        "SELECT key, files FROM rows JOIN attempts USING (key, attempt)"
        " WHERE state = 'saved' AND files LIKE '%\"kind\"%'"
    )
    return Counter(
        one["kind"] for key, files in lines if key in listed for file in json.loads(files) for one in file["mismatch"]
    )


def count_reasons(db: sqlite3.Connection, listed: Container[str]) -> Counter[str]:
    """Return the number of failed rows by the kind of their reason, of rows whose key is in *listed*."""
    lines = db.execute(
        "SELECT key, reason_kind FROM rows JOIN attempts USING (key, attempt)"
        " WHERE state = 'failed' AND reason_kind IS NOT NULL"
    )
    return Counter(kind for key, kind in lines if key in listed)


def doubts(db: sqlite3.Connection) -> tuple[int, int]:
    """Return the sums of `possible_duplicates` and of `held_charges` of all rows."""
    line = db.execute(_SELECT_DOUBTS).fetchone()
    return line[0], line[1]


def columns(db: sqlite3.Connection) -> list[str]:
    """Return the columns of all files of the batch, in order."""
    found = db.execute("SELECT value FROM meta WHERE name = 'columns'").fetchone()
    names: list[str] = json.loads(found[0]) if found is not None else []
    return names


def add_columns(db: sqlite3.Connection, names: Iterable[str]) -> None:
    """Add *names* to the columns of the batch."""
    known = columns(db)
    if new := [name for name in names if name not in known]:
        db.execute("INSERT OR REPLACE INTO meta VALUES ('columns', ?)", (json.dumps(known + new),))


def delimiter(db: sqlite3.Connection) -> str:
    """Return what separates the cells of the last file of the batch; a comma if it was no table."""
    found = db.execute("SELECT value FROM meta WHERE name = 'delimiter'").fetchone()
    return "," if found is None else str(found[0])


def set_delimiter(db: sqlite3.Connection, value: str) -> None:
    """Record what separates the cells of the file."""
    db.execute("INSERT OR REPLACE INTO meta VALUES ('delimiter', ?)", (value,))


def note_failure(db: sqlite3.Connection, key: str, reason: str) -> None:
    """Record why the image of *key* is not saved."""
    current = "(key, attempt) = (SELECT key, attempt FROM rows WHERE key = ?)"
    db.execute(f"UPDATE attempts SET reason = ? WHERE {current} AND state = 'succeeded'", (reason, key))


def _is_restored(db: sqlite3.Connection, stem: str, image_stems: frozenset[str]) -> bool:
    """Return whether a new row may have been submitted before the ledger was restored and adopted."""
    meta = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('adopted', 'lost')").fetchall())
    if stem.lower() in image_stems and stem.lower() not in json.loads(meta.get("adopted", "[]")):
        raise ValueError(f"the image {stem} exists, and the ledger has no submit of it. Use another folder")
    return bool(meta.get("lost")) or stem.lower() in image_stems


def add_restored_attempt(db: sqlite3.Connection, key: str, state: RowState, task_id: str | None = None) -> None:
    """Add an attempt that was made, and whose record was lost."""
    db.execute(NEXT_ATTEMPT, (key,))
    db.execute("UPDATE meta SET value = value + 1 WHERE name = 'attempts'")
    db.execute(
        "INSERT INTO attempts (key, attempt, model, image_size, state, task_id, intended_at, reason)"
        " SELECT key, attempt, model, image_size, ?, ?, ?, ? FROM rows WHERE key = ?",
        (state, task_id, time.time(), _RESTORED_REASON, key),
    )


_SELECT_DOUBTS: Final = """
SELECT coalesce(sum(max(charges - 1, 0)), 0), coalesce(sum(held), 0) FROM (
    SELECT sum(may_be_charged AND NOT is_replaced AND (consumed IS NULL OR CAST(consumed AS REAL) > 0)) AS charges,
        sum(may_be_charged AND consumed IS NULL) AS held FROM attempts GROUP BY key
)
"""
_RESTORED_REASON: Final = "the ledger was restored, and the row may have been submitted after the backup"
_EDITABLE_STATES: Final = (RowState.READY, RowState.REJECTED, RowState.FAILED)
"""States in which a row with a key of its own may get another prompt, because no charge is pending."""


def _stem(db: sqlite3.Connection, row: BatchRow, number: int) -> str:
    named = None if row.name is None else re.sub(r"(\.(png|jpe?g|gif|webp))+$", "", row.name, flags=re.IGNORECASE)
    stem = slugify(f"{number:04}-{row.request.prompt.lower()}", limit=45) if named is None else slugify(named)
    foreign = foreign_stems(db)
    while stem.lower() in foreign or db.execute("SELECT 1 FROM rows WHERE file_stem = ?", (stem,)).fetchone():
        stem = f"{stem}-{number}"
    return stem


def saved_stems(db: sqlite3.Connection) -> frozenset[str]:
    """Return the stems, in lower case, of the images that rows were saved to."""
    found = db.execute("SELECT files FROM attempts WHERE files != '[]'")
    names = (record["file"] for (listed,) in found for record in json.loads(listed))
    return frozenset(name.rpartition(".")[0].lower() for name in names)


def foreign_stems(db: sqlite3.Connection) -> frozenset[str]:
    """Return the stems, in lower case, of the images that were in the folder before the batch."""
    found = db.execute("SELECT value FROM meta WHERE name = 'foreign'").fetchone()
    stems: list[str] = json.loads(found[0]) if found is not None else []
    return frozenset(stems)


@attrs.frozen
class ServiceIdentity:
    """The service and the account that a ledger is about."""

    base_url: str
    account: str
    """A digest of the key."""
    last_task_id: str | None
    """The task that was submitted last; None if there is none."""


def service(db: sqlite3.Connection) -> ServiceIdentity | None:
    """Return the service that the ledger is about; None if it is not recorded."""
    meta = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('base_url', 'account')").fetchall())
    last = db.execute("SELECT task_id FROM attempts WHERE task_id IS NOT NULL ORDER BY submitted_at DESC LIMIT 1")
    return ServiceIdentity(**meta, last_task_id=next((line[0] for line in last), None)) if meta else None


def set_service(db: sqlite3.Connection, base_url: str, account: str) -> None:
    """Record base URL and account of the service."""
    db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", [("base_url", base_url), ("account", account)])


def to_ledger_row(line: sqlite3.Row, folder: Path) -> LedgerRow:
    """Return a line of `SELECT_ROWS` as a `LedgerRow`."""
    fields = dict(line)
    del fields["listing"]
    files = tuple(_to_saved_image(record, folder) for record in json.loads(fields.pop("files")))
    columns = json.loads(fields.pop("columns") or "{}")
    return LedgerRow(**fields, files=files, columns=columns)


def file_record(file: SavedImage) -> dict[str, JsonValue]:
    """Return *file* as JSON, relative to the folder of the batch."""
    record: dict[str, JsonValue] = {
        "file": file.path.name,
        "sha256": file.sha256,
        "size_bytes": file.size_bytes,
        **({"format": None, "width": None, "height": None} if file.info is None else attrs.asdict(file.info)),
        "mismatch": [{**attrs.asdict(one), "kind": one.kind.value} for one in file.mismatch],
    }
    return record


def _to_saved_image(record: dict[str, Any], folder: Path) -> SavedImage:
    return SavedImage(
        path=folder / record["file"],
        sha256=record["sha256"],
        size_bytes=record["size_bytes"],
        info=record["format"] and ImageInfo(**{name: record[name] for name in ("format", "width", "height")}),
        mismatch=tuple(Mismatch(**one) for one in record["mismatch"]),
    )
