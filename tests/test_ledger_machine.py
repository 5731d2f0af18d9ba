"""The ledger against a model: events in any order, power failures with partial writes, and planted bugs.

A driver submits as the batch does, a service charges at random, and the truth is compared after each step.
"""

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanobanana_async import BatchRow, GenerationRequest, LedgerError, LedgerRow, RowState, SavedImage
from nanobanana_async.batch.rows import RowKeys
from nanobanana_async.ledger import database, schema
from nanobanana_async.ledger.batch_ledger import BatchLedger

KEYS = ("a", "b", "c")


def row(key: str) -> BatchRow:
    """Return the row with this key."""
    return RowKeys().row(GenerationRequest(key), key=key)


class LedgerMachine(RuleBasedStateMachine):
    """One ledger, three rows, and what was really charged for them."""

    keys = st.sampled_from(KEYS)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.root = Path(tempfile.mkdtemp())
        self.folder = self.root / "0"
        self.restarts = 0
        self.charged: Counter[str] = Counter()
        self.tasks: dict[str, set[str]] = {key: set() for key in KEYS}
        self.allowed = Counter(dict.fromkeys(KEYS, 1))
        """Charges that the user has agreed to."""
        self.posted: dict[str, str | None] = {}
        """Rows with a POST in flight, and the task id on its way, if it was charged."""
        self.known: dict[str, RowState] = {}
        """What the ledger has acknowledged last."""

    @initialize()
    def begin(self) -> None:
        """Insert all rows."""
        self.ledger = self.do(BatchLedger.open(self.folder, group_commit_s=0))
        self.do(self.ledger.upsert_rows(map(row, KEYS)))

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401 - any result
        """Run a coroutine to its end."""
        return self.runner.run(work)

    def records(self) -> dict[str, LedgerRow]:
        """Return the rows of the ledger."""
        return {record.key: record for record in self.do(self.ledger.list_rows())}

    def move(self, key: str, state: RowState, **facts: str) -> None:
        """Commit a transition."""
        self.do(self.ledger.transition(key, state, **facts))
        self.known[key] = state

    @rule(key=keys, charges=st.booleans())
    def submit(self, key: str, charges: bool) -> None:  # noqa: FBT001 - drawn
        """Record an attempt and send the POST; the ledger rejects it if a charge is possible."""
        try:
            self.do(self.ledger.begin_attempt(key))
        except LedgerError:
            return
        self.known[key] = RowState.SUBMITTING
        self.posted[key] = None
        if charges:
            self.charged[key] += 1
            self.posted[key] = f"ta-{key}-{self.charged[key]}"

    @precondition(lambda self: self.posted)
    @rule(data=st.data())
    def respond(self, data: st.DataObject) -> None:
        """Deliver an id, a rejection, or nothing."""
        key = data.draw(st.sampled_from(sorted(self.posted)))
        task_id = self.posted.pop(key)
        if data.draw(st.booleans()):
            self.move(key, RowState.UNKNOWN, reason="lost")
        elif task_id is None:
            self.move(key, RowState.REJECTED)
        else:
            self.move(key, RowState.SUBMITTED, task_id=task_id)

    @rule(key=keys, wins=st.booleans())
    def finish(self, key: str, wins: bool) -> None:  # noqa: FBT001 - drawn
        """End a task."""
        if self.known.get(key) is RowState.SUBMITTED:
            self.move(key, RowState.SUCCEEDED if wins else RowState.FAILED, consumed="0.5")
            if not wins:
                self.allowed[key] += 1  # a failed row may be charged again, which is declared

    @rule(key=keys)
    def save(self, key: str) -> None:
        """Save an image."""
        if self.known.get(key) is RowState.SUCCEEDED:
            self.do(self.ledger.record_saved(key, [SavedImage(path=self.folder / key, sha256=key, size_bytes=1)]))
            self.known[key] = RowState.SAVED

    @rule(key=keys, again=st.booleans())
    def resolve(self, key: str, again: bool) -> None:  # noqa: FBT001 - drawn
        """Resolve an unknown row."""
        if self.known.get(key) is RowState.UNKNOWN:
            self.move(key, RowState.REQUEUED if again else RowState.ABANDONED)
            self.allowed[key] += again

    @rule(key=keys, state=st.sampled_from(RowState))
    def misuse(self, key: str, state: RowState) -> None:
        """Try a forbidden transition, which is rejected and changes nothing."""
        before = self.records()[key]
        if state in FOLLOWS and before.state not in FOLLOWS[state]:
            with pytest.raises(LedgerError):
                self.do(self.ledger.transition(key, state))
            assert self.records()[key] == before

    @rule(unsynced=st.floats(0, 1), garbled=st.booleans(), key=keys)
    def power_failure(self, unsynced: float, garbled: bool, key: str) -> None:  # noqa: FBT001 - drawn
        """Keep all acknowledged data and any prefix of the rest, possibly with garbage after it."""
        wal = self.folder / "ledger.db-wal"
        synced = wal.stat().st_size
        connection = self.ledger._db
        if not connection.in_transaction:
            connection.execute("BEGIN")
        schema.begin_attempt(
            connection, key, resubmit=False, nonce=None
        )  # not acknowledged, so nothing was sent because of it
        connection.execute("COMMIT")
        self.restarts += 1
        rescued = self.root / str(self.restarts)
        rescued.mkdir()
        log = wal.read_bytes()
        kept = synced + round((len(log) - synced) * unsynced)
        tail = b"\xa5" * (len(log) - kept) if garbled else b""
        (rescued / "ledger.db").write_bytes((self.folder / "ledger.db").read_bytes())
        (rescued / "ledger.db-wal").write_bytes(log[:kept] + tail)
        shutil.copy(self.folder / "ledger.lock", rescued)
        self.do(self.ledger.aclose())
        self.folder, before = rescued, dict(self.known)
        self.ledger = self.do(BatchLedger.open(rescued, adopt=True, group_commit_s=0))
        self.posted.clear()
        after = self.records()
        for name, state in before.items():
            assert name in after
            seen = after[name].state
            expected = RowState.UNKNOWN if state is RowState.SUBMITTING else state
            assert seen is expected or (name == key and seen is RowState.UNKNOWN and expected in SUBMITTABLE)
        self.known = {name: record.state for name, record in after.items()}

    @invariant()
    def every_charge_is_accounted_for(self) -> None:
        """There are no undeclared charges, and each is bound to its row or the row is unknown."""
        if not hasattr(self, "ledger"):
            return
        records = self.records()
        for key in KEYS:
            assert self.charged[key] <= self.allowed[key]
            assert key in records
            state = records[key].state
            if key in self.posted:
                assert state is RowState.SUBMITTING
            elif self.known.get(key) not in (None, RowState.SUBMITTING):
                assert state is self.known[key]
            if self.charged[key] and key not in self.posted:
                assert state is not RowState.READY

    def teardown(self) -> None:
        """Close the ledger and remove the files."""
        if hasattr(self, "ledger"):
            self.do(self.ledger.aclose())
        self.runner.close()
        shutil.rmtree(self.root)


FOLLOWS = dict(schema.ALLOWED_FROM)
SUBMITTABLE = (RowState.READY, RowState.REJECTED, RowState.REQUEUED, RowState.FAILED)
QUICK = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
NO_SHRINK = settings(QUICK, max_examples=300, phases=[Phase.generate], database=None, print_blob=False)

Machine = LedgerMachine.TestCase
Machine.settings = QUICK


def _acknowledged_before_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def commit(self: BatchLedger, orders: list[Any]) -> None:
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")
        for order in orders:
            order.value, order.is_done = order.work(self._db), True

    monkeypatch.setattr(BatchLedger, "_commit", commit)


def _intents_survive_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_INTERRUPT_ATTEMPTS", "SELECT ?")


def _any_state_may_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "ALLOWED_FROM", dict.fromkeys(RowState, tuple(RowState)))


def _whatever_is_known_is_submitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowState, "is_ready", property(lambda _: True))


def _unknown_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowState, "is_ready", property(lambda state: state in (*SUBMITTABLE[:3], RowState.UNKNOWN)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant",
    [
        _acknowledged_before_commit,
        _intents_survive_a_restart,
        _any_state_may_follow,
        _whatever_is_known_is_submitted_again,
        _unknown_is_ready,
    ],
)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine finds each planted bug."""
    plant(monkeypatch)
    with pytest.raises((AssertionError, LedgerError, BaseExceptionGroup, pytest.fail.Exception)):
        run_state_machine_as_test(LedgerMachine, settings=NO_SHRINK)
