"""A batch resumes after any interruption. Every image is saved, and charged once."""

import errno
import json
import re
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest

from nanobanana_async import (
    AttemptEnd,
    AuthenticationError,
    Batch,
    BudgetExceeded,
    ClientClosed,
    ExchangeError,
    Failed,
    GenerationRequest,
    ImageError,
    InsufficientCredits,
    LedgerError,
    NoImage,
    NotSent,
    PollPolicy,
    ReasonKind,
    RetryPolicy,
    RowState,
    SavedImage,
    SubmissionUnknown,
    Succeeded,
    Task,
    TaskFailed,
    Timeouts,
    Unknown,
    WireRequest,
    WireResponse,
)
from nanobanana_async.batch.rows import RowKeys
from nanobanana_async.simulator import FAST_LIMITS, FAST_PROFILE, Simulator, SimulatorProfile
from tests.batches import FOXES, SLOW, batch_of, client_of, kinds, nth_post, rows_of, run, run_until_stopped
from tests.fakes import InterceptingTransport, lost, rejected, response

pytestmark = pytest.mark.anyio

# --- results --------------------------------------------------------------------------------------------------------


async def test_every_image_is_saved_and_charged_once(tmp_path: Path) -> None:
    """The folder has the files in row order, a gallery and a manifest, and no key."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path / "run") as batch:
        outcomes = await run(batch)
        assert batch.progress().succeeded == len(FOXES)
    assert kinds(outcomes) == ["Succeeded"] * len(FOXES)
    assert sorted(charge.prompt for charge in simulator.charges) == sorted(FOXES)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == [
        *(f"{n + 1:04}-fox-{n}.png" for n in range(12)),
        "index.html",
        "ledger.db",
        "ledger.lock",
        "manifest.jsonl",
        "results.csv",
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == FOXES
    assert all(line["state"] == "saved" and line["consumed"] == "0.500000" and line["seconds"] > 0 for line in lines)
    assert lines[0]["files"][0]["file"] == "0001-fox-0.png"
    page = (tmp_path / "run" / "index.html").read_text()
    assert all(name in page for name in names if name.endswith(".png"))
    assert all(b"dk-test" not in path.read_bytes() for path in (tmp_path / "run").iterdir())


async def test_a_second_run_replays_outcomes_and_costs_nothing(tmp_path: Path) -> None:
    """A program that died before it used an image gets its outcome again."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        first = await run(batch)
    async with batch_of(simulator, tmp_path) as batch:
        second = await run(batch)
    assert all(isinstance(outcome, Succeeded) and outcome.replayed for outcome in second.values())
    assert {name: outcome.files for name, outcome in first.items() if isinstance(outcome, Succeeded)} == {
        name: outcome.files for name, outcome in second.items() if isinstance(outcome, Succeeded)
    }
    assert len(simulator.charges) == len(FOXES)


async def test_rows_may_be_added_removed_and_shuffled(tmp_path: Path) -> None:
    """A later run submits only new rows."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        await run(batch)
    async with batch_of(simulator, tmp_path) as batch:
        outcomes = await run(batch, ["a hare", *reversed(FOXES[3:])])
    assert not outcomes["a hare"].replayed
    assert [charge.prompt for charge in simulator.charges[len(FOXES) :]] == ["a hare"]


async def test_equal_rows_are_separate_images(tmp_path: Path) -> None:
    """Three equal rows are three files and three charges, also after another run."""
    simulator = Simulator(FAST_PROFILE)
    for _ in range(2):
        async with batch_of(simulator, tmp_path) as batch:
            keys = [outcome.key async for outcome in batch.run(["fox"] * 3)]
        assert len(set(keys)) == 3
    assert (len(simulator.charges), len(list(tmp_path.glob("*.png")))) == (3, 3)


async def test_a_deleted_image_is_downloaded_again(tmp_path: Path) -> None:
    """The image is charged, so the next run downloads it."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        await run(batch)
    (tmp_path / "0001-fox-0.png").unlink()
    async with batch_of(simulator, tmp_path) as batch:
        outcomes = await run(batch)
    assert not outcomes["fox 0"].replayed
    assert (tmp_path / "0001-fox-0.png").exists()
    assert len(simulator.charges) == len(FOXES)


async def test_a_failed_row_is_submitted_again_only_with_retry_failed(tmp_path: Path) -> None:
    """A failed row does not affect others, and only `retry_failed` submits it again."""
    simulator = Simulator(
        SimulatorProfile(median_s=0.02, visibility_delay_s=0, failed_tasks=0.3, text_only=0.3), seed=5
    )
    async with batch_of(simulator, tmp_path) as batch:
        first = await run(batch)
    errors = {name: outcome.error for name, outcome in first.items() if isinstance(outcome, Failed)}
    assert {type(error) for error in errors.values()} == {TaskFailed, NoImage}
    assert all(error.task_id for error in errors.values())
    async with batch_of(simulator, tmp_path) as batch:
        again = await run(batch)
    assert kinds(again) == kinds(first)
    assert len(simulator.charges) == len(FOXES)
    simulator.service.profile = FAST_PROFILE
    async with batch_of(simulator, tmp_path) as batch:
        mended = await run(batch, retry_failed=True)
    assert kinds(mended) == ["Succeeded"] * len(FOXES)
    assert len(simulator.charges) == len(FOXES) + len(errors)


# --- order and bounds -----------------------------------------------------------------------------------------------


async def test_each_step_is_durable_before_the_next(tmp_path: Path) -> None:
    """The attempt is durable before the POST, the id before anything else, the file before the outcome."""
    simulator = Simulator(FAST_PROFILE)
    seen: list[RowState] = []

    def intercept(request: WireRequest) -> None:
        prompt = "fox 0" if b"fox 0" in (request.body or b"") else ""
        if prompt or (request.method == "GET" and simulator.charges and simulator.charges[0].task_id in request.url):
            (state,) = batch._ledger._db.execute(  # noqa: SLF001 - no other connection can read a locked ledger
                "SELECT state FROM attempts JOIN rows USING (key) WHERE prompt = 'fox 0'"
            ).fetchone()
            seen.append(RowState(state))

    async with batch_of(simulator, tmp_path, intercept) as batch:
        async for outcome in batch.run(["fox 0"]):
            assert isinstance(outcome, Succeeded)
            assert all(file.path.is_file() for file in outcome.files)
            (record,) = await rows_of(batch)
            assert record.state is RowState.SAVED
    assert seen[0] is RowState.SUBMITTING
    assert set(seen[1:-1]) == {RowState.SUBMITTED}
    assert seen[-1] is RowState.SUCCEEDED  # when the image is downloaded


async def test_rows_in_flight_are_bounded(tmp_path: Path) -> None:
    """The number of rows in flight is bounded, and a slow consumer stops new submits."""
    simulator = Simulator(FAST_PROFILE)
    read = most = 0
    async with batch_of(simulator, tmp_path) as batch:
        async for _ in batch.run(FOXES, max_in_flight=3):
            await anyio.sleep(0.01)
            most = max(most, len(simulator.charges) - read)
            read += 1
    assert (read, most <= 3) == (len(FOXES), True)


@pytest.mark.parametrize("ending", ["break", "raise"])
async def test_a_consumer_that_stops_early_loses_nothing(tmp_path: Path, ending: str) -> None:
    """The next run downloads what was charged."""
    simulator = Simulator(SimulatorProfile(median_s=0.04, sigma=1, visibility_delay_s=0))

    async def consume(batch: Batch) -> None:
        outcomes = batch.run(FOXES)
        await anext(outcomes)
        if ending == "raise":
            await outcomes.athrow(RuntimeError("the consumer's own"))
        await outcomes.aclose()

    async with batch_of(simulator, tmp_path) as batch:
        if ending == "raise":
            with pytest.raises(RuntimeError):
                await consume(batch)
        else:
            await consume(batch)
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)
    assert sorted(charge.prompt for charge in simulator.charges) == sorted(FOXES)


async def test_cancelling_lets_a_submit_in_flight_reach_the_ledger(tmp_path: Path) -> None:
    """Its task id is in the ledger when the block is left."""
    simulator = Simulator(SLOW, delay_s=0.2)
    async with batch_of(simulator, tmp_path) as batch:
        with anyio.move_on_after(0.15):  # the service has charged it, and the response is on its way
            await run(batch, ["fox"])
    async with batch_of(simulator, tmp_path) as batch:
        (record,) = await rows_of(batch)
    assert (record.state, record.task_id) == (RowState.SUBMITTED, simulator.charges[0].task_id)


async def test_a_batch_may_be_closed_twice_and_from_another_task(tmp_path: Path) -> None:
    """Bots close a batch in another task, and possibly twice."""
    async with batch_of(Simulator(FAST_PROFILE), tmp_path) as batch:
        await run(batch)
        async with anyio.create_task_group() as group:
            group.start_soon(batch.aclose)
        await batch.aclose()
        with pytest.raises(ClientClosed, match="closed"):
            await run(batch)


async def test_two_rows_with_one_key_are_one_charge(tmp_path: Path) -> None:
    """The second row with the same key fails and is not submitted."""
    simulator = Simulator(FAST_PROFILE)
    row = RowKeys().row(GenerationRequest("fox"), key="k")
    async with batch_of(simulator, tmp_path) as batch:
        outcomes = [outcome async for outcome in batch.run([row, row])]
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Failed", "Succeeded"]
    assert len(simulator.charges) == 1


async def test_a_key_that_was_charged_for_another_prompt_is_rejected(tmp_path: Path) -> None:
    """The saved image is not of the new prompt, and the new one was not charged."""
    simulator = Simulator(FAST_PROFILE)
    for prompt, kind in (("fox", Succeeded), ("hare", Failed)):
        async with batch_of(simulator, tmp_path) as batch:
            outcomes = await run(batch, [RowKeys().row(GenerationRequest(prompt), key="k")])
        assert isinstance(outcomes[prompt], kind)
    assert [charge.prompt for charge in simulator.charges] == ["fox"]


async def test_rows_may_come_from_an_async_generator_one_by_one(tmp_path: Path) -> None:
    """A row is submitted without waiting for the next one."""
    simulator = Simulator(FAST_PROFILE)
    came = anyio.Event()

    async def rows() -> AsyncIterator[str]:
        yield "first"
        await came.wait()
        yield "second"

    async with batch_of(simulator, tmp_path) as batch:
        prompts = []
        async for outcome in batch.run(rows()):
            prompts.append(outcome.request.prompt)
            came.set()
    assert prompts == ["first", "second"]


# --- unknown rows ---------------------------------------------------------------------------------------------------


async def test_a_lost_response_is_unknown_until_it_is_resolved(tmp_path: Path) -> None:
    """The row is never resubmitted unless the user resubmits, abandons or binds it."""
    simulator = Simulator(FAST_PROFILE)
    intercept = nth_post(lambda n: lost() if n in (3, 5, 7) else None)
    async with batch_of(simulator, tmp_path, intercept) as batch:
        outcomes = await run(batch, max_in_flight=1)
    unknown = [name for name, outcome in outcomes.items() if isinstance(outcome, Unknown)]
    assert len(unknown) == 3
    async with batch_of(simulator, tmp_path) as batch:
        again = await run(batch)
        assert kinds(again) == kinds(outcomes)
        assert all(again[name].replayed for name in unknown)
        records = await batch.unknown_rows()
        assert [record.prompt for record in records] == unknown
        async with client_of(simulator) as client:
            foreign = await client.submit("by hand")
        await batch.resubmit(records[0].key)
        await batch.abandon(records[1].key)
        mine = next(outcome.task for outcome in again.values() if isinstance(outcome, Succeeded))
        with pytest.raises(LedgerError, match=f"task {mine.task_id} belongs to row"):
            await batch.bind(records[2].key, mine.task_id)
        await batch.bind(records[2].key, foreign.task_id)
        with pytest.raises(LedgerError):
            await batch.abandon(records[2].key)
    async with batch_of(simulator, tmp_path) as batch:
        final = await run(batch)
    assert isinstance(final[unknown[0]], Succeeded)
    assert isinstance(final[unknown[1]], Failed)
    bound = final[unknown[2]]
    assert isinstance(bound, Succeeded)
    assert bound.task.task_id == foreign.task_id


async def test_an_early_outage_costs_three_rows_and_not_all(tmp_path: Path) -> None:
    """Submits go one at a time until one is accepted, and stop if the service is down."""
    simulator = Simulator(FAST_PROFILE)
    posts: list[int] = []

    def gateway(number: int) -> WireResponse:
        posts.append(number)
        return response(502, body=b"<html>Bad Gateway</html>")

    async with batch_of(simulator, tmp_path, nth_post(gateway)) as batch:
        outcomes, cause = await run_until_stopped(batch)
    assert isinstance(cause, SubmissionUnknown)
    assert kinds(outcomes) == ["Unknown"] * 3
    assert len(posts) == 3
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch)) == ["Succeeded"] * 9 + ["Unknown"] * 3


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_a_lost_task_is_not_submitted_again(tmp_path: Path) -> None:
    """The task was charged, so its row becomes unknown and keeps the id."""
    simulator = Simulator(SLOW)
    async with batch_of(simulator, tmp_path) as batch:
        with anyio.move_on_after(0.3):
            await run(batch, ["fox"])
    other = Simulator(FAST_PROFILE)
    async with batch_of(other, tmp_path) as batch:
        outcomes = await run(batch, ["fox"])
        (record,) = await batch.unknown_rows()
    outcome = outcomes["fox"]
    assert isinstance(outcome, Unknown)
    assert record.task_id == outcome.error.task_id == simulator.charges[0].task_id
    assert other.charges == []


# --- errors that stop a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rejection", "error"),
    [
        pytest.param(rejected(401, 1, "Invalid API key"), AuthenticationError, id="key-revoked"),
        pytest.param(rejected(402, 1, "payment"), InsufficientCredits, id="credits-402"),
        pytest.param(rejected(400, 1, "insufficient credit"), InsufficientCredits, id="credits-400"),
        pytest.param(rejected(200, 7, "Insufficient balance"), InsufficientCredits, id="credits-200"),
        pytest.param(rejected(403, 1, "quota exceeded"), InsufficientCredits, id="credits-403"),
    ],
)
async def test_a_rejected_key_or_an_empty_account_stops_the_submits(
    tmp_path: Path, rejection: WireResponse, error: type[Exception]
) -> None:
    """Charged images are saved, and the next run submits the rest."""
    simulator = Simulator(FAST_PROFILE)
    reject = nth_post(lambda n: rejection if n >= 4 else None)

    def intercept(request: WireRequest) -> WireResponse | ExchangeError | None:
        if request.url.endswith("/api/user"):
            return response(200, {"code": 0, "data": {"credit": "0"}})
        return reject(request)

    async with batch_of(simulator, tmp_path, intercept) as batch:
        outcomes, cause = await run_until_stopped(batch)
    assert isinstance(cause, error)
    assert kinds(outcomes) == ["Succeeded"] * 4
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)
    assert len(simulator.charges) == len(FOXES)


async def test_the_budget_holds_and_may_be_raised_later(tmp_path: Path) -> None:
    """The budget counts all runs and submits in flight, and no submit could exceed it."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path, budget=Decimal("2.7")) as batch:
        outcomes, cause = await run_until_stopped(batch)
        funds = batch.progress().budget
    assert isinstance(cause, BudgetExceeded)
    assert (funds.spent, funds.reserved, funds.remaining) == (Decimal("2.5"), Decimal(0), Decimal("0.2"))
    assert len(simulator.charges) == len(outcomes) == 5
    async with batch_of(simulator, tmp_path, budget=Decimal("2.7")) as batch:
        _, cause = await run_until_stopped(batch)
    assert len(simulator.charges) == 5
    assert "2.5" in str(cause)
    async with batch_of(simulator, tmp_path, budget=Decimal(6)) as batch:
        assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)


async def test_possible_charges_are_reserved(tmp_path: Path) -> None:
    """An unknown row, and a submit that was resubmitted, reserve their price."""
    simulator = Simulator(FAST_PROFILE)
    responses: dict[int, WireResponse | ExchangeError] = {1: lost(), 3: rejected(500, 1, "internal error")}
    for number in range(2):
        async with batch_of(simulator, tmp_path, nth_post(responses.get) if not number else None) as batch:
            await run(batch, max_in_flight=1)
            funds = batch.progress().budget
        assert (funds.spent, funds.reserved) == (Decimal("5.5"), Decimal(1))
    manifest = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert sum(line["possible_duplicates"] for line in manifest) == 1


async def test_a_run_without_a_known_price_stops_after_one_image(tmp_path: Path) -> None:
    """Without a price the budget cannot be enforced, and the error says so."""
    simulator = Simulator(FAST_PROFILE)

    class WithoutPrice(InterceptingTransport):
        async def send(self, request: WireRequest, **options: Any) -> WireResponse:  # noqa: ANN401 - passed on
            received = await super().send(request, **options)
            return attrs.evolve(received, body=re.sub(rb'"consumed": ?"[^"]*"', b'"consumed": null', received.body))

    async with (
        simulator.client(wrap=lambda transport: WithoutPrice(transport, lambda _: None)) as client,
        Batch.open(tmp_path, client, budget=Decimal(100)) as batch,
    ):
        _, cause = await run_until_stopped(batch)
    assert "the price of google/gempix2 is not known" in str(cause)
    assert "--max-price" in str(cause)
    assert len(simulator.charges) == 1


async def test_a_full_disk_stops_the_submits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops, and once there is space, the next run downloads what is charged."""
    simulator = Simulator(FAST_PROFILE)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr("nanobanana_async.images.files.write_new", full)
        async with batch_of(simulator, tmp_path) as batch:
            outcomes, cause = await run_until_stopped(batch, max_in_flight=3)
    assert (outcomes, isinstance(cause, ImageError)) == ({}, True)
    assert len(simulator.charges) <= 3
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)
    assert len(simulator.charges) == len(FOXES)


@pytest.mark.parametrize("broken", ["submitting", "submitted", "succeeded", "saved"])
async def test_a_ledger_that_cannot_be_written_stops_the_run(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No submit follows the first failed write; unrecorded ids are logged; nothing is charged twice."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        ledger = batch._ledger  # noqa: SLF001 - writes fail at a known step, which a full disk cannot do
        move, begin, end_attempt = ledger.transition, ledger.begin_attempt, ledger.end_attempt
        record_final = ledger.record_final

        def fail_at(step: str) -> None:
            if step == broken and len(simulator.charges) >= 4:
                ledger._failure = "no space left on device"  # noqa: SLF001 - a disk that fails at one moment

        async def failing_move(key: str, state: RowState, **facts: object) -> None:
            fail_at(state)
            await move(key, state, **facts)  # type: ignore[arg-type]

        async def failing_begin(key: str, **options: Any) -> None:  # noqa: ANN401 - passed through
            fail_at("submitting")
            await begin(key, **options)

        async def failing_end(key: str, end: AttemptEnd, **options: Any) -> None:  # noqa: ANN401 - passed through
            fail_at("submitted")
            await end_attempt(key, end, **options)

        async def failing_final(key: str, task: Task, reason_kind: ReasonKind | None) -> None:
            fail_at("succeeded")
            await record_final(key, task, reason_kind)

        ledger.record_final = failing_final  # type: ignore[method-assign]
        ledger.transition, ledger.begin_attempt = failing_move, failing_begin  # type: ignore[method-assign]
        ledger.end_attempt = failing_end  # type: ignore[method-assign]
        _, cause = await run_until_stopped(batch, max_in_flight=2)
    assert isinstance(cause, LedgerError)
    assert len(simulator.charges) <= 4 + 2
    async with batch_of(simulator, tmp_path) as batch:
        recorded = {entry.task_id for entry in await rows_of(batch)}
        assert all(charge.task_id in recorded or charge.task_id in caplog.text for charge in simulator.charges)
        await run(batch)
    assert len({charge.prompt for charge in simulator.charges}) == len(simulator.charges)


# --- transient errors -----------------------------------------------------------------------------------------------


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_half_an_hour_without_a_network_costs_only_time(tmp_path: Path) -> None:
    """After refused connections in mid-run, every row ends saved and charged once."""
    simulator = Simulator(SLOW)

    posts = 0

    def intercept(request: WireRequest) -> ExchangeError | None:
        nonlocal posts
        posts += request.method == "POST"
        down = 20 < anyio.current_time() - began_s < 1820
        refused_here = ExchangeError("ConnectError: refused", phase=lost().phase.CONNECT)
        return refused_here if down and request.method == "POST" else None

    began_s = anyio.current_time()
    async with batch_of(simulator, tmp_path, intercept, polling=PollPolicy()) as batch:
        outcomes = await run(batch, [f"fox {number}" for number in range(30)], max_in_flight=4)
    assert kinds(outcomes) == ["Succeeded"] * 30
    assert len(simulator.charges) == 30
    assert posts < 150


@pytest.mark.slow
@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_a_network_that_does_not_come_back_ends_the_run_after_an_hour(tmp_path: Path) -> None:
    """The run raises the network error, and the other rows stay ready."""
    simulator = Simulator(SLOW)
    nothing = ExchangeError("ConnectError: refused", phase=lost().phase.CONNECT)
    async with batch_of(simulator, tmp_path, nth_post(lambda n: nothing if n >= 4 else None)) as batch:
        began_s = anyio.current_time()
        outcomes, cause = await run_until_stopped(batch)
        assert 3600 < anyio.current_time() - began_s < 4000
    assert isinstance(cause, NotSent)
    assert kinds(outcomes) == ["Succeeded"] * 4
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)


@pytest.mark.slow
@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_a_gateway_outage_makes_few_rows_unknown(tmp_path: Path) -> None:
    """Each submit without a response may be charged, so fewer are sent until one is accepted."""
    simulator = Simulator(SLOW)
    began_s = anyio.current_time()

    def intercept(request: WireRequest) -> WireResponse | None:
        down = 20 < anyio.current_time() - began_s < 920
        return response(502, body=b"<html></html>") if down and request.method == "POST" else None

    async with batch_of(simulator, tmp_path, intercept, polling=PollPolicy()) as batch:
        outcomes = await run(batch, [f"fox {number}" for number in range(100)], max_in_flight=10)
    assert kinds(outcomes).count("Unknown") <= 15
    assert kinds(outcomes).count("Succeeded") >= 85


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_a_new_task_that_is_invisible_after_a_restart_is_waited_for(tmp_path: Path) -> None:
    """The age of the task is known from the ledger, so a 404 means that it is not visible yet."""
    simulator = Simulator(SimulatorProfile(median_s=40, sigma=0, visibility_delay_s=25))
    async with batch_of(simulator, tmp_path) as batch:
        with anyio.move_on_after(1):
            await run(batch, ["fox"])
    assert len(simulator.charges) == 1
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch, ["fox"])) == ["Succeeded"]
    assert len(simulator.charges) == 1


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_a_row_that_times_out_is_waited_for_by_the_next_run(tmp_path: Path) -> None:
    """The task is charged and keeps running."""
    simulator = Simulator(SimulatorProfile(median_s=100, sigma=0, visibility_delay_s=0))
    async with batch_of(simulator, tmp_path) as batch:
        outcomes = await run(batch, ["fox"], timeout_s=50)
        assert kinds(outcomes) == ["Failed"]
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch, ["fox"])) == ["Succeeded"]
    assert len(simulator.charges) == 1


async def test_an_expired_image_url_is_queried_again(tmp_path: Path) -> None:
    """The URL is queried once; if that fails, the row fails and the next run retries."""
    simulator = Simulator(FAST_PROFILE)
    gone = [1, 2]  # downloads that get a 410

    def intercept(request: WireRequest) -> WireResponse | None:
        if "/files/" in request.url and gone:
            gone.pop()
            return response(410, body=b"gone")
        return None

    for expected in ("Failed", "Succeeded"):
        async with batch_of(simulator, tmp_path, intercept, retry=RetryPolicy(attempts=1)) as batch:
            assert kinds(await run(batch, ["fox"])) == [expected]
    assert len(simulator.charges) == 1


async def test_submits_wait_while_downloads_queue(tmp_path: Path) -> None:
    """While more images wait than are downloaded at once, submits wait."""
    simulator = Simulator(FAST_PROFILE, delay_s=0.05)
    stuck, saving = anyio.Event(), 0

    class Slow:
        async def put(self, name: str, data: bytes) -> SavedImage:
            nonlocal saving
            saving += 1
            await stuck.wait()
            return SavedImage(path=tmp_path / name, sha256="", size_bytes=len(data))

    rows = [f"fox {number}" for number in range(60)]
    limits = attrs.evolve(FAST_LIMITS, max_submits=4, max_downloads=16)
    async with (
        simulator.client(limits=limits) as client,
        Batch.open(tmp_path, client, image_store=Slow()) as batch,
        anyio.create_task_group() as group,
    ):
        group.start_soon(run, batch, rows)
        while saving < client.limits.max_downloads:
            await anyio.sleep(0.01)
        await anyio.sleep(0.2)
        charged = len(simulator.charges)
        stuck.set()
    assert charged < 60
    assert len(simulator.charges) == 60


async def test_closing_a_batch_takes_a_bounded_time(tmp_path: Path) -> None:
    """A service that never responds does not keep the program from ending."""
    simulator = Simulator(FAST_PROFILE, delay_s=3600)
    posted = anyio.Event()

    def intercept(_: WireRequest) -> None:
        posted.set()

    async with client_of(simulator, intercept, timeouts=Timeouts(submit_s=0.3, close_s=0.5)) as client:
        began_s = anyio.current_time()
        async with Batch.open(tmp_path, client) as batch, anyio.create_task_group() as group:
            group.start_soon(run, batch, ["fox"])
            await posted.wait()
            group.cancel_scope.cancel()
        assert anyio.current_time() - began_s < 5
    async with batch_of(simulator, tmp_path) as batch:
        (record,) = await batch.unknown_rows()
    assert record.prompt == "fox"
