"""Attempts to make a batch charge twice, lose an id, or hang. Each of them once succeeded."""

import asyncio
import contextlib
import errno
import gc
import io
import shutil
import threading
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest

from nanobanana_async import (
    AttemptEnd,
    Batch,
    BudgetExceeded,
    CallbackReceiver,
    Failed,
    GenerationRequest,
    LedgerError,
    RowState,
    SavedImage,
    Succeeded,
    Timeouts,
    Transport,
    Unknown,
    WireRequest,
    WireResponse,
)
from nanobanana_async.batch.rows import RowKeys
from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.simulator import FAST_PROFILE, Simulator, SimulatorProfile
from tests.batches import FOXES, batch_of, kinds, nth_post, run, run_until_stopped
from tests.fakes import PNG, InterceptingTransport, lost, rejected

pytestmark = pytest.mark.anyio


async def test_a_write_that_fails_does_not_fail_others(tmp_path: Path) -> None:
    """A key that SQLite cannot store does not fail the other writes of its transaction."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch, anyio.create_task_group() as group:

        async def spoil() -> None:
            for _ in range(20):
                with pytest.raises(LedgerError):
                    await batch.abandon("caf\udce9")

        group.start_soon(spoil)
        assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)
    assert len(simulator.charges) == len(FOXES)
    async with batch_of(simulator, tmp_path) as batch:
        await run(batch)
    assert len(simulator.charges) == len(FOXES)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_cancelling_one_writer_does_not_stop_others(tmp_path: Path) -> None:
    """A web server cancels the request that delivered a callback, and the batch continues."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:

        async def cancel_writers() -> None:
            for interval_s in (0, 0.001, 0.005, 0.02, 0.03) * 4:
                writing = asyncio.ensure_future(batch.unknown_rows())
                await asyncio.sleep(interval_s)
                writing.cancel()

        meddling = asyncio.ensure_future(cancel_writers())
        with anyio.fail_after(10):
            assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)
        await meddling


@pytest.mark.parametrize("profile", [FAST_PROFILE, SimulatorProfile(median_s=0.02, visibility_delay_s=0, text_only=1)])
async def test_a_repeated_key_in_one_run_is_charged_once(tmp_path: Path, profile: SimulatorProfile) -> None:
    """A repeated key fails, whether or not its first row has ended."""
    simulator = Simulator(profile)
    fox = RowKeys().row(GenerationRequest("fox"), key="k")
    hare = RowKeys().row(GenerationRequest("hare"), key="h")
    async with batch_of(simulator, tmp_path) as batch:
        outcomes = [outcome async for outcome in batch.run([fox, fox, fox, hare], max_in_flight=1)]
    assert sorted(charge.prompt for charge in simulator.charges) == ["fox", "hare"]
    assert sum("another row has this key" in str(o.error) for o in outcomes if isinstance(o, Failed)) == 2


async def test_many_models_do_not_get_around_the_budget(tmp_path: Path) -> None:
    """A price is never borrowed: one submit of unknown price at a time, and none once nothing is left."""
    simulator = Simulator(FAST_PROFILE)
    requests = [GenerationRequest("fox", model=f"model {number}") for number in range(10)]
    async with batch_of(simulator, tmp_path, budget=Decimal("1.2")) as batch:
        with pytest.raises(BudgetExceeded):
            _ = [outcome async for outcome in batch.run(requests)]
        assert batch.progress().budget.remaining == Decimal("-0.3")
    assert len(simulator.charges) == 3


async def test_a_resubmit_stays_within_the_budget(tmp_path: Path) -> None:
    """The earlier submit may also be charged, so a resubmit has to fit, too."""
    simulator = Simulator(FAST_PROFILE)
    intercept = nth_post(lambda n: rejected(500, 1, "internal error") if n == 1 else None)
    async with batch_of(simulator, tmp_path, intercept, budget=Decimal("1.0")) as batch:
        await run_until_stopped(batch)
        funds = batch.progress().budget
    assert funds.remaining is not None
    assert funds.remaining >= 0


async def test_a_rejected_row_is_not_unknown_however_the_run_ends(tmp_path: Path) -> None:
    """After many 429s and an interrupt, the ledger says that nothing was charged."""
    simulator = Simulator(FAST_PROFILE)
    intercept = nth_post(lambda n: rejected(429, 1, "busy") if n else None)
    async with batch_of(simulator, tmp_path, intercept) as batch:
        with anyio.move_on_after(0.6):
            await run(batch)
    async with batch_of(simulator, tmp_path) as batch:
        assert await batch.unknown_rows() == []
        assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)


async def test_charged_rows_that_left_the_file_are_still_downloaded(tmp_path: Path) -> None:
    """Rows that are no longer in the file come last."""
    simulator = Simulator(SimulatorProfile(median_s=0.3, sigma=0, visibility_delay_s=0))
    async with batch_of(simulator, tmp_path) as batch:
        with anyio.move_on_after(0.2):
            await run(batch)
    async with batch_of(simulator, tmp_path) as batch:
        outcomes = await run(batch, ["a hare"])
    assert kinds(outcomes) == ["Succeeded"] * (len(simulator.charges))
    assert len(list(tmp_path.glob("*.png"))) == len(simulator.charges)


async def test_a_missing_ledger_beside_a_manifest_is_an_error(tmp_path: Path) -> None:
    """A new ledger would charge every row again."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        await run(batch)
    (tmp_path / "ledger.db").unlink()
    with pytest.raises(LedgerError, match="would be charged again"):
        await BatchLedger.open(tmp_path)
    (tmp_path / "ledger.db").touch()
    with pytest.raises(LedgerError, match="would be charged again"):
        await BatchLedger.open(tmp_path)


async def test_a_ledger_that_is_removed_stops_the_run(tmp_path: Path) -> None:
    """Writes to an unlinked file are not durable."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path / "run") as batch:
        await run(batch, ["first"])
        shutil.move(tmp_path / "run" / "ledger.db", tmp_path / "elsewhere.db")
        _, cause = await run_until_stopped(batch)
    assert isinstance(cause, LedgerError)
    assert len(simulator.charges) == 1


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_a_callback_that_names_another_rows_task_is_ignored(tmp_path: Path) -> None:
    """The row stays unknown, and its true callback still resolves it."""
    simulator = Simulator(FAST_PROFILE)

    timeouts = Timeouts(recovery_s=0.0)
    async with simulator.client(timeouts=timeouts, wrap=lambda inner: _LosingTransport(inner, "fox")) as first:
        receiver = CallbackReceiver(first, public_url="https://app.example/nb", secret="s" * 32)
        async with Batch.open(tmp_path, first, callback=receiver) as batch:
            outcomes = await run(batch, ["hare", "fox"])
            assert isinstance(outcomes["fox"], Unknown)
            ids = {charge.prompt: charge.task_id for charge in simulator.charges}
            path = simulator.service.tasks[ids["fox"]].callback_url or ""
            await receiver.deliver(path, b'{"task_id": "%s"}' % ids["hare"].encode())
            assert [record.state for record in await batch.unknown_rows()] == [RowState.UNKNOWN]
            await anyio.sleep(11)  # past the interval between two confirmations
            await receiver.deliver(path, b'{"task_id": "%s"}' % ids["fox"].encode())
            assert await batch.unknown_rows() == []
    async with simulator.client(timeouts=timeouts) as second, Batch.open(tmp_path, second) as batch:
        outcomes = await run(batch, ["hare", "fox"])
    fox = outcomes["fox"]
    assert isinstance(fox, Succeeded)
    assert fox.task.task_id == ids["fox"]


class _LosingTransport(InterceptingTransport):
    """Loses the responses to submits of one prompt."""

    def __init__(self, inner: Transport, prompt: str) -> None:
        super().__init__(inner, lambda _: None)
        self.prompt = prompt

    async def send(self, request: WireRequest, **options: Any) -> WireResponse:  # noqa: ANN401 - passed on
        """Send as the simulator does, and lose that response."""
        received = await super().send(request, **options)
        if request.method == "POST" and self.prompt.encode() in (request.body or b""):
            raise lost()
        return received


async def test_a_transport_that_quotes_the_key_does_not_leak_it(tmp_path: Path) -> None:
    """The key is not in the ledger, the gallery, the manifest or an error."""
    simulator = Simulator(FAST_PROFILE)

    def quote(request: WireRequest) -> None:
        raise RuntimeError(f"cannot send {dict(request.headers)}")

    async with batch_of(simulator, tmp_path, quote) as batch:
        outcomes, cause = await run_until_stopped(batch)
    assert "dk-test" not in str(cause)
    assert all("dk-test" not in str(o.error) for o in outcomes.values() if not isinstance(o, Succeeded))
    assert all(b"dk-test" not in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("again", [False, True])
async def test_a_cancelled_close_still_ends(tmp_path: Path, *, again: bool) -> None:
    """With `asyncio.wait_for` around it, once or twice, the folder is free and nothing keeps running."""
    others = asyncio.all_tasks()
    simulator = Simulator(FAST_PROFILE)
    async with simulator.client() as client:
        for moment in range(0, 60, 4):
            opening = Batch.open(tmp_path, client)
            batch = await opening.__aenter__()
            closing = asyncio.ensure_future(batch.aclose())
            await asyncio.sleep(0)
            await asyncio.sleep(0.001 * moment)
            closing.cancel()
            if again:
                await asyncio.sleep(0)
                closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
            await (await BatchLedger.open(tmp_path)).aclose()
            await opening.__aexit__(None, None, None)
    with anyio.fail_after(5):
        while asyncio.all_tasks() != others:
            await anyio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("what", ["client", "ledger"])
def test_a_loop_that_ends_before_the_first_step_ends(tmp_path: Path, what: str, steps: int) -> None:
    """`asyncio.run` also cancels tasks that never took a step."""
    ended = threading.Event()

    async def use(ready: asyncio.Event) -> None:
        async with contextlib.AsyncExitStack() as stack:
            call: Callable[[], Awaitable[object]]
            if what == "client":
                call = (await stack.enter_async_context(Simulator(FAST_PROFILE).client())).balance
            else:
                call = (
                    await stack.enter_async_context(contextlib.aclosing(await BatchLedger.open(tmp_path)))
                ).attempt_costs
            ready.set()
            for _ in range(steps):
                await asyncio.sleep(0)
            await call()

    async def main() -> None:
        ready = asyncio.Event()
        using.append(asyncio.ensure_future(use(ready)))
        await ready.wait()

    using: list[asyncio.Future[None]] = []

    def whole() -> None:
        asyncio.run(main())
        ended.set()

    threading.Thread(target=whole, daemon=True).start()
    assert ended.wait(10)
    using.clear()
    gc.collect()  # tasks that never took a step are warned about here, and not in another test


async def test_a_report_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run continues, and the log says why there is no gallery."""
    monkeypatch.setattr("nanobanana_async.batch.runner._REPORT_INTERVAL_S", 0.01)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("nanobanana_async.batch.report.ReportWriter", full)
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)
    assert "the gallery, the manifest or the results cannot be written" in caplog.text


async def test_a_rejection_that_quotes_a_prompt_about_credit_fails_one_row(tmp_path: Path) -> None:
    """The rejection is not taken for an empty account, which would end the run."""
    simulator = Simulator(FAST_PROFILE)
    quoting = rejected(400, 1, "the prompt 'a balance of credit' breaks the rules on credit cards")
    async with batch_of(simulator, tmp_path, nth_post(lambda n: quoting if n == 5 else None)) as batch:
        assert kinds(await run(batch)) == ["Failed"] + ["Succeeded"] * (len(FOXES) - 1)


async def test_an_image_is_encoded_in_a_thread(tmp_path: Path) -> None:
    """Encoding a large image takes more than a second."""
    main, where = threading.get_ident(), []

    class FakeImage:
        def save(self, file: io.BytesIO, **_: object) -> None:
            where.append(threading.get_ident())
            file.write(PNG)

    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch, [GenerationRequest("a fox", images=[FakeImage()])])) == ["Succeeded"]  # type: ignore[list-item]
    assert main not in where


async def test_a_journal_that_is_removed_stops_the_run(tmp_path: Path) -> None:
    """Data in an unlinked file ends with the process."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        (tmp_path / "ledger.db-wal").unlink()
        with pytest.raises(LedgerError, match="removed or replaced"):
            await run(batch)
    assert simulator.charges == []


async def test_a_blank_task_id_cannot_be_bound(tmp_path: Path) -> None:
    """A blank id would be polled without end."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path, nth_post(lambda n: lost() if n == 3 else None)) as batch:
        await run(batch)
        (record,) = await batch.unknown_rows()
        with pytest.raises(ValueError, match="task_id"):
            await batch.bind(record.key, " ")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_store_that_cancels_itself_does_not_end_a_run_in_silence(tmp_path: Path) -> None:
    """A future that other code has cancelled looks like a cancellation of the row."""

    class Cancelled:
        async def put(self, name: str, data: bytes) -> SavedImage:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future
            raise AssertionError

    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path, image_store=Cancelled()) as batch:
        with pytest.raises(RuntimeError, match="cancelled internally"):
            await run(batch)
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)
    assert len(simulator.charges) == len(FOXES)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_record_that_cancels_itself_ends_its_own_call_only() -> None:
    """The background tasks of the client continue."""

    class Cancelled:
        is_doubted = False

        async def begin_attempt(self, nonce: str | None) -> None:
            """Record nothing."""

        async def end_attempt(self, end: AttemptEnd) -> None:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

    async with Simulator(FAST_PROFILE).client() as client:
        with pytest.raises(RuntimeError, match="cancelled internally"):
            await client.submit("a fox", record=Cancelled())
        assert (await client.generate("a hare")).images
