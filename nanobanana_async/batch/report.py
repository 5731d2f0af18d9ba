"""Write the gallery `index.html` and the manifest `manifest.jsonl` from the ledger."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from nanobanana_async._text import format_credits
from nanobanana_async.batch import gallery
from nanobanana_async.ledger.restored import MANIFEST_NAME
from nanobanana_async.ledger.schema import LedgerRow, RowState

GALLERY_NAME: Final = "index.html"

_STATUS_LABELS: Final = {RowState.SAVED: "succeeded", RowState.FAILED: "failed", RowState.UNKNOWN: "unknown"}


def write(folder: Path, records: Iterable[LedgerRow]) -> None:
    """Write both files atomically, one row at a time. Blocking.

    Raises:
        OSError: A file could not be written.
    """
    title = os.fsencode(folder.resolve().name).decode("utf-8", "replace")
    manifest, page = folder / f".{MANIFEST_NAME}.part", folder / f".{GALLERY_NAME}.part"
    with manifest.open("w", encoding="utf-8") as lines:

        def cards() -> Iterator[gallery.GalleryCard]:
            for record in records:
                lines.write(f"{json.dumps(_manifest_line(record), ensure_ascii=False)}\n")
                if not record.state.is_ready:
                    yield _card(record)

        gallery.write(page, title, cards())
    manifest.replace(folder / MANIFEST_NAME)
    page.replace(folder / GALLERY_NAME)


def _card(record: LedgerRow) -> gallery.GalleryCard:
    is_done = record.state is RowState.SAVED
    return gallery.GalleryCard(
        prompt=record.prompt,
        status=_STATUS_LABELS.get(record.state, record.state.value),
        file=record.files[0].path.name if is_done and record.files else None,
        seconds=_seconds(record),
        cost="" if record.consumed is None else format_credits(record.consumed),
        note="" if is_done else (record.reason or ""),
    )


def _manifest_line(record: LedgerRow) -> dict[str, object]:
    return {
        "key": record.key,
        "number": record.number,
        "state": record.state.value,
        "prompt": record.prompt,
        "model": record.model,
        "image_size": record.image_size,
        "fingerprint": record.fingerprint,
        "task_id": record.task_id,
        "files": [
            {"file": file.path.name, "sha256": file.sha256, "size_bytes": file.size_bytes} for file in record.files
        ],
        "consumed": None if record.consumed is None else f"{record.consumed:f}",
        "attempt": record.attempt,
        "possible_duplicates": record.possible_duplicates,
        "held_charges": record.held_charges,
        "seconds": _seconds(record),
        "reason": record.reason,
    }


def _seconds(record: LedgerRow) -> float | None:
    if record.saved_at is None or record.intended_at is None:
        return None
    return round(max(0.0, record.saved_at - record.intended_at), 3)
