"""The ledger of single tasks: what survives the process, and what it says of money."""

import asyncio
import json
import stat
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from nanobanana_async import (
    ConfigurationError,
    InvalidRequest,
    LedgerError,
    NanoBananaClient,
    OwnerLimits,
    RowState,
    SqliteLedger,
    SubmissionUnknown,
    TaskHandle,
    WireRequest,
    WireResponse,
)
from nanobanana_async.simulator import FAST_POLLING, Simulator
from tests.batches import nth_post
from tests.fakes import InterceptingTransport, lost, rejected
from tests.ledgers import client_of, resumed, rows

pytestmark = pytest.mark.anyio


async def test_the_attempt_is_durable_before_the_post_and_the_id_before_the_caller_sees_it(tmp_path: Path) -> None:
    """What is on the disk at each moment is enough to find the charge after a crash."""
    states: list[list[str]] = []

    def look(request: WireRequest) -> None:
        if request.method == "POST":
            states.append([row["state"] for row in rows(tmp_path)])

    async with client_of(Simulator(), tmp_path, look) as client:
        handle = await client.submit("a fox")
        assert [(row["state"], row["task_id"]) for row in rows(tmp_path)] == [("submitted", handle.task_id)]
        task = await handle.result()
    assert states == [["submitting"]]
    (row,) = rows(tmp_path)
    assert (row["state"], Decimal(row["consumed"])) == ("succeeded", task.consumed)


async def test_resume_yields_what_is_not_acknowledged_with_owner_note_and_snapshot(tmp_path: Path) -> None:
    """A restarted bot knows whose image it was, and where to send it."""
    simulator = Simulator()
    async with client_of(simulator, tmp_path) as client:
        done = await client.submit("a fox", owner="discord:42", note={"channel": 17, "tags": ["a", None]})
        await done.result()
        used = await client.submit("a hare")
        await used.result()
        await used.ack()
        task = await client.generate("an owl", owner="x")
    async with client_of(simulator, tmp_path) as client:
        first, second = await resumed(client)
        assert (first.task_id, first.owner, first.note) == (
            done.task_id,
            "discord:42",
            {"channel": 17, "tags": ["a", None]},
        )
        assert first.snapshot is not None
        assert first.snapshot.consumed == Decimal("0.5")
        assert (second.task_id, second.owner, second.note) == (task.task_id, "x", None)
        assert (await first.result()).images
        await first.ack()
        await first.ack()
        await client.task(task.task_id).ack()
        assert await resumed(client) == []
    async with client_of(simulator, tmp_path) as client:
        assert await resumed(client) == []
    assert len(simulator.charges) == 3


async def test_an_unfinished_task_is_waited_for_after_a_restart(tmp_path: Path) -> None:
    """It has no snapshot, and its end is recorded by the process that resumes it."""
    simulator = Simulator()
    async with client_of(simulator, tmp_path) as client:
        await client.submit("a fox")
    async with client_of(simulator, tmp_path) as client:
        (handle,) = await resumed(client)
        assert handle.snapshot is None
        await handle.result()
        assert (await client.spending()).spent == Decimal("0.5")
    assert [row["state"] for row in rows(tmp_path)] == ["succeeded"]


async def test_a_lost_response_is_unresolved_until_it_is_acknowledged(tmp_path: Path) -> None:
    """The application learns which submit may have been charged, for whom, and never resubmits it."""
    simulator = Simulator()
    async with client_of(simulator, tmp_path, nth_post(lambda _: lost())) as client:
        with pytest.raises(SubmissionUnknown):
            await client.submit("a fox", owner="x", note=[1])
    async with client_of(simulator, tmp_path) as client:
        (attempt,) = [attempt async for attempt in client.unresolved()]
        assert (attempt.prompt, attempt.owner, attempt.note, attempt.possible_charges) == ("a fox", "x", [1], 1)
        assert "may have been charged" in attempt.reason
        assert await resumed(client) == []
        await attempt.ack()
        assert [attempt async for attempt in client.unresolved()] == []
        assert (await client.spending("x")).unpriced == 1


async def test_what_was_not_charged_is_neither_resumed_nor_unresolved(tmp_path: Path) -> None:
    """A rejected request needs no decision."""
    async with client_of(Simulator(), tmp_path, nth_post(lambda _: rejected(400))) as client:
        with pytest.raises(InvalidRequest):
            await client.submit("a fox")
    async with client_of(Simulator(), tmp_path) as client:
        assert await resumed(client) == []
        assert [attempt async for attempt in client.unresolved()] == []
        assert (await client.spending()).unpriced == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_submit_that_is_cancelled_before_its_post_is_not_charged(tmp_path: Path) -> None:
    """`task.cancel()` may come while the attempt is being recorded. It leaves no attempt that may have been charged."""
    simulator = Simulator()
    orphans: list[TaskHandle] = []
    async with client_of(simulator, tmp_path, on_orphan=orphans.append) as client:
        for steps in range(1, 60):
            task = asyncio.create_task(client.submit("a fox", owner="x"))
            for _ in range(steps):
                await asyncio.sleep(0 if steps < 30 else 0.0002)
            task.cancel()
            await asyncio.wait([task])
        await anyio.sleep(0.2)
        spending = await client.spending("x")
        assert spending.unpriced == len(simulator.charges) == len([handle async for handle in client.resume()])
        assert [attempt async for attempt in client.unresolved()] == []
    async with client_of(simulator, tmp_path) as client:
        assert [attempt async for attempt in client.unresolved()] == []


async def test_a_handle_made_from_an_id_knows_what_this_process_has_recorded(tmp_path: Path) -> None:
    """The second request of a web app finds owner, note and time of the submit, also after a restart and `resume`."""
    simulator = Simulator()
    async with client_of(simulator, tmp_path) as client:
        handle = await client.submit("a fox", owner="x", note={"t": (1,), 5: 6})  # type: ignore[dict-item]
        again = client.task(handle.task_id)
        assert (again.owner, again.note) == (handle.owner, handle.note) == ("x", {"t": [1], "5": 6})
    async with client_of(simulator, tmp_path) as client:
        await client.task(handle.task_id).ack()  # opens the ledger, and needs no `resume`
        assert await resumed(client) == []
    async with client_of(simulator, tmp_path) as client:
        another = await client.submit("a hare", owner="y")
    async with client_of(simulator, tmp_path) as client:
        assert len(await resumed(client)) == 1
        again = client.task(another.task_id)
        assert again.owner == "y"
        assert again.submitted_at is not None


async def test_an_error_of_a_submit_names_its_call_and_owner(tmp_path: Path) -> None:
    """The application recognizes the submit that `unresolved` yields later."""
    async with client_of(Simulator(), tmp_path, nth_post(lambda _: lost())) as client:
        with pytest.raises(SubmissionUnknown) as caught:
            await client.submit("a fox", owner="x")
        (attempt,) = [attempt async for attempt in client.unresolved()]
    assert (caught.value.key, caught.value.owner) == (attempt.key, "x")


async def _coroutine(_: object) -> None:
    """Stand for a hook that cannot be called."""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ledger": "state/"}, "ledger: expected SqliteLedger"),
        ({"on_event": _coroutine}, "expected plain functions"),
        ({"owner_limits": 5}, "owner_limits: expected OwnerLimits or a function"),
        ({"owner_limits": OwnerLimits(budget=Decimal(1))}, "a budget needs a ledger"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options: dict[str, object], says: str) -> None:
    """Not at the first submit of a user."""
    with pytest.raises(ConfigurationError, match=says):
        NanoBananaClient("dk-test", **options)  # type: ignore[arg-type]


async def test_a_function_that_returns_no_limits_fails_the_submit() -> None:
    """Nothing is sent without the limits that were meant."""
    simulator = Simulator()
    async with NanoBananaClient("dk-test", transport=simulator, owner_limits=lambda _: None) as client:  # type: ignore[arg-type,return-value]
        with pytest.raises(ConfigurationError, match="returns OwnerLimits"):
            await client.submit("a fox", owner="x")
    assert simulator.charges == []


async def test_possible_duplicates_of_a_submit_survive_a_restart(tmp_path: Path) -> None:
    """The service may have charged the POST that it answered with its own error, too."""
    simulator = Simulator()
    first_fails = nth_post(lambda number: rejected(500) if number == 0 else None)
    async with client_of(simulator, tmp_path, first_fails) as client:
        handle = await client.submit("a fox")
        assert handle.possible_duplicates == 1
    async with client_of(simulator, tmp_path) as client:
        assert [handle.possible_duplicates for handle in await resumed(client)] == [1]


async def test_a_client_without_a_ledger_says_so(tmp_path: Path) -> None:
    """Nothing is lost in silence."""
    async with Simulator().client() as client:
        handle = await client.submit("a fox")
        for call in (handle.ack, client.spending, lambda: resumed(client)):
            with pytest.raises(LedgerError, match="has no ledger"):
                await call()


async def test_a_note_that_is_not_json_is_refused_before_the_post(tmp_path: Path) -> None:
    """It could not be returned after a restart."""
    simulator = Simulator()
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    async with client_of(simulator, tmp_path) as client:
        for note in (object(), {"a": float("nan")}, "x" * 70_000, deep):
            with pytest.raises(ValueError, match="note: expected"):
                await client.submit("a fox", note=note)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="owner: expected"):
            await client.submit("a fox", owner=" ")
        with pytest.raises(ValueError, match="surrogates"):
            await client.submit("a fox", owner="\ud800")
        await client.submit("a fox")  # the slots are free
    assert len(simulator.charges) == 1


async def test_the_files_are_private_and_have_no_key(tmp_path: Path) -> None:
    """Prompts are stored for the user only, and not at all with store_requests=False."""
    async with client_of(Simulator(), tmp_path / "a") as client:
        await client.submit("a red fox")
    async with client_of(Simulator(seed=1), tmp_path / "b", store_requests=False) as client:
        await client.submit("a red fox")
        assert [handle.snapshot for handle in await resumed(client)] == [None]
    paths = list(tmp_path.glob("*/*"))
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in paths)
    assert not any(b"dk-test" in path.read_bytes() for path in paths)
    assert [b"red fox" in path.read_bytes() for path in sorted(tmp_path.glob("*/*.db"))] == [True, False]


async def test_a_batch_writes_into_its_own_ledger_only(tmp_path: Path) -> None:
    """A row would otherwise be resumed twice."""
    from nanobanana_async import Batch  # noqa: PLC0415 - the only test that needs it

    async with client_of(Simulator(), tmp_path / "state") as client:
        async with Batch.open(tmp_path / "run", client) as batch:
            assert len([outcome async for outcome in batch.run(["a fox"])]) == 1
        assert await resumed(client) == []
        assert (await client.spending()).spent == 0


async def test_a_ledger_that_the_caller_has_entered_is_not_closed_by_the_client(tmp_path: Path) -> None:
    """It may serve another client, or be read after it."""
    async with SqliteLedger(tmp_path) as ledger:
        async with NanoBananaClient("dk-test", transport=Simulator(), polling=FAST_POLLING, ledger=ledger) as client:
            await client.generate("a fox")
        (task,) = await ledger.all_tasks()
    assert (task.state, task.prompt, task.acknowledged_at) == (RowState.SUCCEEDED, "a fox", None)


async def test_a_ledger_that_cannot_be_opened_is_found_before_the_first_submit(tmp_path: Path) -> None:
    """At `async with`, or else at the first submit. Nothing is charged that would not be recorded."""
    (tmp_path / "file").write_text("")
    simulator = Simulator()
    with pytest.raises(LedgerError, match="expected a folder, got a file"):
        async with client_of(simulator, tmp_path / "file"):
            pass
    client = NanoBananaClient("dk-test", transport=simulator, ledger=SqliteLedger(tmp_path / "file"))
    with pytest.raises(LedgerError, match="expected a folder, got a file"):
        await client.submit("a fox")
    await client.aclose()
    assert simulator.charges == []


async def test_an_id_that_cannot_be_recorded_is_in_the_error_and_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that fills up between the POST and its response is the last moment to save a charged id."""
    simulator = Simulator()

    def break_disk(request: WireRequest) -> None:
        if request.method == "POST":
            (tmp_path / "tasks-001.db").rename(tmp_path / "moved")

    async with client_of(simulator, tmp_path, break_disk) as client:
        with pytest.raises(LedgerError) as caught:
            await client.submit("a fox")
        (charge,) = simulator.charges
        assert caught.value.task_id == charge.task_id
        assert f"task {charge.task_id} is charged and could not be recorded" in caplog.text
        with pytest.raises(LedgerError, match="removed or replaced"):
            await client.submit("a hare")
    assert len(simulator.charges) == 1


async def test_old_acknowledged_tasks_are_pruned_and_still_count(tmp_path: Path) -> None:
    """The folder does not grow for ever, and a budget does not come back."""
    simulator = Simulator()
    async with client_of(simulator, tmp_path, nth_post(lambda number: lost() if number == 3 else None)) as client:
        for prompt in ("acknowledged", "acknowledged too", "not acknowledged"):
            handle = await client.submit(prompt, owner="x")
            await handle.result()
            if prompt != "not acknowledged":
                await handle.ack()
        with pytest.raises(SubmissionUnknown):
            await client.submit("unknown", owner="x")
    async with client_of(simulator, tmp_path, keep_days=0) as client:
        spending = await client.spending("x")
        assert [row["prompt"] for row in rows(tmp_path)] == ["not acknowledged", "unknown"]
        assert (spending.spent, spending.unknown) == (Decimal("1.5"), Decimal("0.5"))
        assert (await client.spending("x", since=datetime.now(UTC) + timedelta(days=2))).spent == 0
        assert (await client.spending("y")).spent == 0


async def test_a_callback_that_names_a_lost_id_is_recorded(tmp_path: Path) -> None:
    """The attempt is not unresolved any more."""
    from nanobanana_async import CallbackReceiver  # noqa: PLC0415 - the only test that needs it

    simulator = Simulator()

    class LosesResponses(InterceptingTransport):
        async def send(self, request: WireRequest, *, timeout_s: float) -> WireResponse:
            response = await super().send(request, timeout_s=timeout_s)
            if request.method == "POST":
                raise lost()
            return response

    ledger = SqliteLedger(tmp_path)
    transport = LosesResponses(simulator, lambda _: None)
    async with NanoBananaClient("dk-test", transport=transport, polling=FAST_POLLING, ledger=ledger) as client:
        receiver = CallbackReceiver(client, public_url="https://app.example/nb", secret="s" * 32)
        found: list[TaskHandle] = []
        async with anyio.create_task_group() as group:

            async def submit() -> None:
                found.append(await client.submit("a fox", callback=receiver))

            group.start_soon(submit)
            while not simulator.charges:
                await anyio.sleep(0.01)
            (charge,) = simulator.charges
            path = receiver._pending._items.copy().popitem()[1].url  # noqa: SLF001 - only the service knows it
            body = json.dumps({"task_id": charge.task_id, "status": "success"}).encode()
            await anyio.sleep(0.1)
            assert await receiver.deliver(path, body)
        assert found[0].task_id == charge.task_id
        assert client.task(charge.task_id).possible_duplicates == found[0].possible_duplicates == 0
        assert [attempt async for attempt in client.unresolved()] == []
        assert [handle.task_id for handle in await resumed(client)] == [charge.task_id]


async def test_what_is_acknowledged_during_resume_is_not_yielded_any_more(tmp_path: Path) -> None:
    """Also if it was acknowledged by its id."""
    simulator = Simulator()
    async with client_of(simulator, tmp_path) as client:
        first = await client.submit("a fox")
        second = await client.submit("a hare")
    async with client_of(simulator, tmp_path) as client:
        seen: list[str] = []
        async for handle in client.resume():
            seen.append(handle.task_id)
            await client.task(second.task_id).ack()
        assert seen == [first.task_id]


async def test_a_task_that_is_acknowledged_before_its_end_still_counts_what_it_costs(tmp_path: Path) -> None:
    """Its file is not released before."""
    simulator = Simulator()
    async with client_of(simulator, tmp_path) as survivor:
        await survivor.spending()
        async with client_of(simulator, tmp_path) as ended:
            await ended.submit("a fox", owner="x")
        await survivor.spending()
        (handle,) = await resumed(survivor)
        await handle.ack()
        await survivor.spending()
        await handle.result()
        spending = await survivor.spending("x")
        assert (spending.spent, spending.unpriced, spending.unknown) == (Decimal("0.5"), 0, Decimal(0))
