"""G3: a ledger that cannot be opened is named for what it is, with a way out."""

import os
import sqlite3
import tempfile
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import anyio
import pytest

from nanobanana_async import LedgerError
from nanobanana_async.ledger.batch_ledger import BatchLedger


def _message_for_another_user(folder: Path, messages: "SimpleQueue[str]") -> None:
    os.setuid(65_534)
    try:
        anyio.run(partial(BatchLedger.open, folder))
    except LedgerError as exc:
        messages.put(str(exc))
    else:
        messages.put("it was opened")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # with the threads of pytest-xdist, from 3.12 on
@pytest.mark.parametrize("protected", ["file", "folder"])
def test_g3_the_ledger_of_another_user_is_named_for_what_it_is(protected: str) -> None:
    """G3: SQLite says that it is unable to open a file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if protected == "file":
            anyio.run(_make_ledger, folder)
        folder.chmod(0o777 if protected == "file" else 0o755)
        processes = get_context("fork")
        messages = processes.SimpleQueue()
        process = processes.Process(target=_message_for_another_user, args=(folder, messages))
        process.start()
        message = messages.get()
        process.join()
    assert "this user may not write it, or its folder" in message
    assert "--ledger DIR" in message


async def _make_ledger(folder: Path) -> None:
    await (await BatchLedger.open(folder)).aclose()


def test_g3_a_file_system_without_locks_is_named_for_what_it_is(tmp_path: Path) -> None:
    """G3: SQLite says that the database is locked, although this run holds the lock."""
    anyio.run(_make_ledger, tmp_path)
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as other:
        other.execute("BEGIN EXCLUSIVE")  # what a share that refuses every lock looks like
        with pytest.raises(LedgerError, match=r"the file system does not lock files.*--ledger DIR"):
            anyio.run(partial(BatchLedger.open, tmp_path))
