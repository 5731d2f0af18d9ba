"""A batch's ledger and its surroundings: it has to know all that they know, or it is adopted.

A ledger that was copied, restored from a backup, or has lost its write-ahead log would let rows be charged again. What
remembers more than the database gives it away: the lock file, the manifest, and the images.
"""

import contextlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self, cast

import attrs

from nanobanana_async.errors import LedgerError
from nanobanana_async.ledger import batch_rows, schema
from nanobanana_async.ledger.database import accept_as_it_is, inode
from nanobanana_async.ledger.lock import LockRecord
from nanobanana_async.ledger.schema import RowState

FILE_NAME: Final = "ledger.db"
MANIFEST_NAME: Final = "manifest.jsonl"
GALLERY_NAME: Final = "index.html"
GALLERY_MARK: Final = b'name="generator" content="nanobanana-async"'
"""What the begin of each gallery contains."""
LOCATION_NAME: Final = "ledger.location"
"""In the folder of the images: where the ledger is, if it is elsewhere."""
_MAX_ATTEMPTS: Final = 1000
_IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_MAX_LINES_TRIED: Final = 5
_HEAD_BYTES: Final = 4096


def find_file(folder: Path, ledger_folder: Path | None, *, create: bool) -> Path:
    """Return the ledger file of the batch in *folder*. With *create*, create the folders that it needs.

    Raises:
        LedgerError: There is none, or the folders cannot be used.
    """
    home = ledger_location(folder, ledger_folder)
    path = home / FILE_NAME
    try:
        if create:
            _create_folders(folder, home)
        elif not path.exists():
            raise LedgerError(f"{path}: not found. Pass the --out folder of a batch.")
    except OSError as exc:
        raise LedgerError(f"{path}: cannot be opened: {exc.strerror or exc}") from exc
    return path


def has_ledger(folder: Path, ledger_folder: Path | None) -> bool:
    """Return whether there is a ledger of the batch in *folder*. Raises as `ledger_location` does."""
    return (ledger_location(folder, ledger_folder) / FILE_NAME).exists()


def _create_folders(folder: Path, ledger_folder: Path) -> None:
    for needed in (folder, ledger_folder):
        needed.mkdir(parents=True, exist_ok=True)
    if ledger_folder.resolve() != folder.resolve():
        _claim(folder, ledger_folder.resolve())


def _claim(folder: Path, ledger_folder: Path) -> None:
    """Write where the ledger of *folder* is, once and for all runs.

    Raises:
        LedgerError: Another process has just begun with another ledger.
    """
    place = folder / LOCATION_NAME
    if place.exists() and not place.stat().st_size:  # of a run that was killed, or on a full disk
        place.unlink()
    written = place.with_name(f".{secrets.token_hex(8)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        with os.fdopen(os.open(written, flags, 0o666), "w", encoding="utf-8") as file:
            file.write(f"{ledger_folder}\n")
        with contextlib.suppress(FileExistsError):  # written whole before it has its name
            place.hardlink_to(written)
    finally:
        written.unlink(missing_ok=True)
    if ledger_location(folder, ledger_folder) != ledger_folder or (folder / FILE_NAME).exists():
        raise LedgerError(f"{folder}: another process has begun with a ledger elsewhere. Run the batch again.")


def ledger_location(folder: Path, wanted: Path | None) -> Path:
    """Return the folder of the ledger of *folder*: *wanted*, else where it is known to be, else *folder*.

    Raises:
        LedgerError: The ledger is in another folder than *wanted*. A second one would charge its rows again.
    """
    known = None
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        text = (folder / LOCATION_NAME).read_text(encoding="utf-8", errors="replace").strip()
        known = Path(text) if text or wanted is None else None
        if known is not None and not known.is_absolute():
            raise LedgerError(
                f"{folder / LOCATION_NAME}: expected the path of the ledger's folder, got {str(known)!r:.80}"
            )
    if known is None and (folder / FILE_NAME).exists():
        known = folder.resolve()
    if known is not None and wanted is not None and wanted.resolve() != known:
        raise LedgerError(f"{folder}: its ledger is in {known}, got {wanted}. Pass --ledger {known}.")
    return wanted or known or folder


def _image_stems(folder: Path) -> frozenset[str]:
    return frozenset(entry.stem.lower() for entry in folder.iterdir() if entry.suffix.lower() in _IMAGE_SUFFIXES)


def manifest_path(folder: Path) -> Path:
    """Return the manifest of the batch in *folder*. A file of the user's with that name is left alone."""
    path = folder / MANIFEST_NAME
    is_free = not path.is_symlink() and not path.exists()
    return path if is_free or is_manifest(path) else folder / f"nanobanana-{MANIFEST_NAME}"


def _has_gallery(folder: Path) -> bool:
    """Return whether a batch has written to *folder*, as a sign that a ledger is missing."""
    page = folder / GALLERY_NAME
    with contextlib.suppress(OSError):
        if page.is_file():
            with page.open("rb") as file:
                return GALLERY_MARK in file.read(_HEAD_BYTES)
    return False


def is_manifest(path: Path) -> bool:
    """Return whether *path* is empty, or one of its first lines is about a row."""
    with contextlib.suppress(OSError):
        if not path.is_file():  # a pipe would block
            return False
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as lines:
        first = list(islice(lines, _MAX_LINES_TRIED))
        return not first or any(_ManifestLine.parse_or_none(text) is not None for text in first)
    return False


def _meta(db: sqlite3.Connection) -> dict[str, str | int]:
    return dict(db.execute("SELECT name, value FROM meta").fetchall())


class BatchChecks:
    """The `OpeningChecks` of the batch in *folder*, whose ledger is *path*."""

    @property
    def is_shared(self) -> bool:
        """See `OpeningChecks.is_shared`."""
        return False

    def __init__(self, path: Path, folder: Path, *, adopt: bool) -> None:
        self._path = path
        self._folder = folder
        self._adopt = adopt
        try:
            self.image_stems: frozenset[str] = _image_stems(folder)
            """Stems of the images in the folder when it was opened, in lower case, but for those before the batch."""
        except OSError as exc:
            raise LedgerError(f"{path}: cannot be opened: {exc.strerror or exc}") from exc

    def check_new(self, found: LockRecord) -> None:
        """See `OpeningChecks.check_new`."""
        if self._path.parent.resolve() == self._folder.resolve() and (self._folder / LOCATION_NAME).exists():
            raise LedgerError(
                f"{self._folder}: another process has begun with a ledger elsewhere. Run the batch again."
            )
        if found.ledger_id or is_manifest(manifest_path(self._folder)):
            raise LedgerError(
                f"{self._path}: missing or empty, but {self._folder} contains a batch that would be charged again. "
                "Restore the file, or use another folder."
            )

    def on_created(self, db: sqlite3.Connection) -> None:
        """See `OpeningChecks.on_created`. Images that exist before the first row are not those of the batch."""
        if not _has_gallery(self._folder):
            db.execute("INSERT INTO meta VALUES ('foreign', ?)", (json.dumps(sorted(self.image_stems)),))
            self.image_stems = frozenset()

    def check_existing(self, db: sqlite3.Connection, found: LockRecord) -> None:
        """See `OpeningChecks.check_existing`."""
        if self.image_stems:
            self.image_stems -= batch_rows.foreign_stems(db) | batch_rows.saved_stems(db)
        surroundings = _Surroundings(db, found, self._path, self._folder, self.image_stems)
        if self._adopt:
            surroundings.adopt()
        elif problem := surroundings.problem():
            raise LedgerError(
                f"{self._path}: {problem}. Running it could charge rows twice. If no other copy was run since, or "
                f"will be, run: nanobanana batch resolve adopt --out {self._folder}"
            )


class _Surroundings:
    """What lock file, manifest and images say, compared with the ledger."""

    def __init__(
        self, db: sqlite3.Connection, found: LockRecord, path: Path, folder: Path, image_stems: frozenset[str]
    ) -> None:
        self._db = db
        self._found = found
        self._path = path
        self._folder = folder
        self._image_stems = image_stems

    def problem(self) -> str | None:
        """Return why the ledger cannot be trusted, or None."""
        meta = _meta(self._db)
        # A process that was killed right after it had created the ledger leaves an empty lock file.
        is_new = not self._found.ledger_id and not meta["attempts"]
        if meta["instance"] != inode(self._path) or (meta["ledger_id"] != self._found.ledger_id and not is_new):
            return "is a copy of another ledger"
        if self._found.commits > int(meta["commits"]):
            lost = self._found.commits - int(meta["commits"])
            return f"lacks its last {lost} writes. It was restored from a backup, or {FILE_NAME}-wal is damaged"
        if any(True for _ in self._rows_known_elsewhere()):
            return f"lacks rows that {MANIFEST_NAME} contains. It was restored from a backup"
        if stem := next((stem for _, stem in self._submittable_rows() if stem.lower() in self._image_stems), None):
            return f"has no submit of {stem}, whose image exists. It was restored from a backup"
        return None

    def adopt(self) -> None:
        """Accept the ledger. What its surroundings know of rows is recorded, and what is lost becomes unknown."""
        db, meta = self._db, _meta(self._db)
        for known in list(self._rows_known_elsewhere()):
            self._record_elsewhere(known)
        # A lock file that is missing or about another ledger does not say what was lost.
        is_same = self._found.ledger_id == meta["ledger_id"]
        lost = not is_same or self._found.attempts > int(_meta(db)["attempts"])
        for key, stem in list(self._submittable_rows()):
            if lost or stem.lower() in self._image_stems:
                batch_rows.add_restored_attempt(db, key, RowState.UNKNOWN)
        # Rows that are not in the ledger may have been submitted, too.
        db.execute("INSERT OR REPLACE INTO meta VALUES ('adopted', ?)", (json.dumps(sorted(self._image_stems)),))
        db.execute("INSERT OR REPLACE INTO meta VALUES ('lost', ?)", (int(lost or bool(meta.get("lost"))),))
        accept_as_it_is(db, self._path, self._found)

    def _submittable_rows(self) -> Iterator[tuple[str, str]]:
        """Yield key and file stem of the rows that a run could submit."""
        for line in self._db.execute(schema.SELECT_ROWS):
            if RowState(line["state"]).is_submittable:
                yield line["key"], line["file_stem"]

    def _rows_known_elsewhere(self) -> Iterator["_ManifestLine"]:
        """Yield the lines of the manifest about submits that the ledger does not have."""
        manifest = manifest_path(self._folder)
        with contextlib.suppress(FileNotFoundError), manifest.open(encoding="utf-8", errors="replace") as lines:
            for known in map(_ManifestLine.parse_or_none, lines):
                if known is not None and self._lacks(known):
                    yield known

    def _lacks(self, known: "_ManifestLine") -> bool:
        if known.state in (RowState.READY, RowState.REJECTED):
            return False
        mine = self._db.execute(f"{schema.SELECT_ROWS} WHERE key = ?", (known.key,)).fetchone()
        if mine is None or mine["attempt"] < known.attempt:
            return True
        return bool(mine["attempt"] == known.attempt and known.task_id and mine["task_id"] is None)

    def _record_elsewhere(self, known: "_ManifestLine") -> None:
        db = self._db
        number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM rows").fetchone()[0]
        stem = f"{number:04}-restored"
        db.execute(
            "INSERT OR IGNORE INTO rows (key, number, file_stem, fingerprint, prompt, model, image_size)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                known.key,
                number,
                stem,
                known.fingerprint,
                known.prompt,
                known.model,
                known.image_size,
            ),
        )
        missing = known.attempt - db.execute("SELECT attempt FROM rows WHERE key = ?", (known.key,)).fetchone()[0]
        for _ in range(missing - 1):
            batch_rows.add_restored_attempt(db, known.key, RowState.UNKNOWN)
        state = RowState.UNKNOWN if known.task_id is None else RowState.SUBMITTED
        batch_rows.add_restored_attempt(db, known.key, state, known.task_id)


_text = attrs.validators.and_(attrs.validators.instance_of(str), attrs.validators.min_len(1))


@attrs.frozen(kw_only=True)
class _ManifestLine:
    """What the manifest says of one row."""

    key: str = attrs.field(validator=_text)
    state: str
    attempt: int = attrs.field(validator=[attrs.validators.instance_of(int), attrs.validators.le(_MAX_ATTEMPTS)])
    fingerprint: str = attrs.field(validator=_text)
    prompt: str = attrs.field(validator=_text)
    model: str = attrs.field(validator=_text)
    image_size: str | None = attrs.field(validator=attrs.validators.optional(_text))
    task_id: str | None = attrs.field(validator=attrs.validators.optional(_text))

    @classmethod
    def parse_or_none(cls, text: str) -> Self | None:
        """Return a line of the manifest; None if this package has not written it."""
        try:
            return cls._parse(text)
        except (LookupError, ValueError, TypeError, RecursionError):
            return None

    @classmethod
    def _parse(cls, text: str) -> Self:
        document = cast("dict[str, Any]", json.loads(text))
        line = cls(**{name: document[name] for name in attrs.fields_dict(cls)})
        for value in (line.key, line.prompt, line.model, line.task_id or ""):
            value.encode()  # a lone surrogate cannot be stored
        return line
