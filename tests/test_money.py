"""Ways past the promise that were met in the field. The ids are those of the collection of cases: M1 to M11, B4, B5."""

import json
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Literal

import anyio
import attrs
import pytest

from nanobanana_async import (
    Batch,
    BudgetExceeded,
    ConfigurationError,
    Failed,
    GenerationRequest,
    ImageError,
    InsufficientCredits,
    InvalidRequest,
    NanoBananaClient,
    NanoBananaError,
    Outcome,
    RateLimited,
    RowState,
    SavedImage,
    SubmissionUnknown,
    Succeeded,
    Unknown,
    WireRequest,
    WireResponse,
)
from nanobanana_async.batch.rows import RowKeys
from nanobanana_async.simulator import FAST_PROFILE, Simulator, SimulatorProfile
from tests.batches import FOXES, SLOW, batch_of, kinds, nth_post, rows_of, run
from tests.fakes import rejected, response

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time, pytest.mark.usefixtures("no_threads")]

PRICES = {"1k": Decimal("0.1"), "2k": Decimal("0.5"), "4k": Decimal("1.2")}
PORTAL = response(302, body=b"", location="https://login.portal.example/")


SIZES = attrs.evolve(FAST_PROFILE, size_prices=PRICES)


def sized(size: str | None, count: int) -> list[GenerationRequest]:
    """Return requests of one size."""
    return [GenerationRequest(f"{size} {number}", image_size=size) for number in range(count)]


def spent(simulator: Simulator) -> Decimal:
    """Return what the service has charged."""
    return sum((charge.credits for charge in simulator.charges), Decimal(0))


def manifest(folder: Path) -> list[dict[str, object]]:
    """Return the lines of the manifest."""
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


async def run_anyhow(batch: Batch, rows: Iterable[object] = FOXES) -> tuple[list[Outcome], NanoBananaError | None]:
    """Run the batch to its end, and return the outcomes and why it stopped, if it did."""
    outcomes: list[Outcome] = []
    try:
        async for outcome in batch.run(rows):  # type: ignore[arg-type]
            outcomes.append(outcome)  # noqa: PERF401 - those before an error are kept
    except NanoBananaError as exc:
        return outcomes, exc
    return outcomes, None


async def test_m1_a_failed_task_that_costs_nothing_teaches_no_price(tmp_path: Path) -> None:
    """M1: after a failed task at 0 credits the rest still goes one at a time, within the budget."""
    simulator = Simulator(attrs.evolve(FAST_PROFILE, failed_tasks=0.3, failed_charge="zero"), seed=3)
    async with batch_of(simulator, tmp_path, budget=Decimal(2)) as batch:
        _, cause = await run_anyhow(batch, [f"fox {number}" for number in range(60)])
        assert batch.progress().budget.remaining == Decimal(0)
    assert isinstance(cause, BudgetExceeded)
    assert spent(simulator) == Decimal(2)


async def test_m2_a_price_belongs_to_a_model_and_a_size(tmp_path: Path) -> None:
    """M2: a 1k image of 0.1 says nothing about eighty 4k images of 1.2."""
    simulator = Simulator(SIZES)
    async with batch_of(simulator, tmp_path, budget=Decimal(10)) as batch:
        _, cause = await run_anyhow(batch, [*sized("1k", 1), *sized("4k", 80)])
    assert isinstance(cause, BudgetExceeded)
    assert spent(simulator) <= Decimal(10)


@pytest.mark.parametrize(("text_only", "failed_tasks"), [(0.5, 0.0), (0.0, 0.5)], ids=["empty", "failed"])
@pytest.mark.parametrize("charge", ["null", "missing"])
async def test_m3_b4_a_charge_that_is_not_stated_is_held(
    tmp_path: Path, text_only: float, failed_tasks: float, charge: Literal["null", "missing"]
) -> None:
    """M3, B4: failed and empty tasks without `consumed` count in budget, outcome, manifest and progress."""
    fails = attrs.evolve(FAST_PROFILE, text_only=text_only, failed_tasks=failed_tasks, failed_charge=charge)
    simulator = Simulator(fails, seed=1)
    async with batch_of(simulator, tmp_path, budget=Decimal(3)) as batch:
        outcomes, cause = await run_anyhow(batch, [f"fox {number}" for number in range(40)])
        status = batch.progress().budget
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    assert failed
    assert isinstance(cause, BudgetExceeded)
    assert all(outcome.may_be_charged for outcome in failed)
    assert status.spent + status.reserved + status.unpriced * Decimal("0.5") == spent(simulator) <= Decimal(3)
    assert sum(line["held_charges"] for line in manifest(tmp_path)) == len(failed)  # type: ignore[misc]


async def test_m3_without_a_price_the_run_asks_for_an_upper_bound(tmp_path: Path) -> None:
    """M3: one submit of unknown price that may have been charged stops the run, and `max_price` lets it go on."""
    simulator = Simulator(attrs.evolve(FAST_PROFILE, text_only=1.0))
    async with batch_of(simulator, tmp_path, budget=Decimal(3)) as batch:
        _, cause = await run_anyhow(batch)
    assert len(simulator.charges) == 1
    assert "pass --max-price CREDITS" in str(cause)
    async with batch_of(simulator, tmp_path, budget=Decimal(3), max_price=Decimal("0.5")) as batch:
        await run_anyhow(batch)
        assert batch.progress().budget.unpriced == 0
    assert spent(simulator) == Decimal(3)


@pytest.mark.parametrize("status", [408, 421, 425])
async def test_m4_a_408_after_the_charge_is_sent_again_once_and_counted(tmp_path: Path, status: int) -> None:
    """M4: it is never called "nothing was charged", and a second one leaves the row unknown."""
    simulator = Simulator(attrs.evolve(FAST_PROFILE, charged_timeouts=1.0))
    unprocessed = response(status, body=b"")
    async with batch_of(simulator, tmp_path) as batch:
        outcomes, _ = await run_anyhow(batch, ["fox"])
        (row,) = await rows_of(batch)
    (outcome,) = outcomes
    assert isinstance(outcome, Unknown)
    assert isinstance(outcome.error, SubmissionUnknown)
    assert len(simulator.charges) == row.possible_charges == 2
    assert outcome.error.possible_duplicates == row.possible_duplicates == 1
    async with batch_of(simulator, tmp_path) as batch:
        await batch.resubmit(row.key)
    async with batch_of(Simulator(FAST_PROFILE, seed=1), tmp_path, nth_post(lambda _: unprocessed)) as batch:
        await run_anyhow(batch, ["fox"])
        (row,) = await rows_of(batch)
    assert row.possible_charges == 3  # once per key, over all runs


@pytest.mark.parametrize(
    "words", ["white balance is off", "unbalanced brackets", "not enough detail", "insufficient light"]
)
async def test_m5_words_about_a_prompt_fail_its_row_only(tmp_path: Path, words: str) -> None:
    """M5: only a whole phrase says that the account is empty."""
    simulator = Simulator(FAST_PROFILE)
    intercept = nth_post(lambda n: rejected(400, 1, words) if n == 2 else None)
    async with batch_of(simulator, tmp_path, intercept) as batch:
        outcomes, cause = await run_anyhow(batch)
    assert cause is None
    (failed,) = (outcome for outcome in outcomes if isinstance(outcome, Failed))
    assert type(failed.error) is InvalidRequest
    assert not failed.may_be_charged


async def test_m5_an_empty_account_is_confirmed_before_it_stops_a_run(tmp_path: Path) -> None:
    """M5: while the balance says otherwise, only the row fails."""
    simulator = Simulator(FAST_PROFILE)
    intercept = nth_post(lambda n: rejected(400, 1, "insufficient funds of ideas") if n == 4 else None)
    async with batch_of(simulator, tmp_path, intercept) as batch:
        outcomes, cause = await run_anyhow(batch)
    assert cause is None
    assert Counter(type(outcome) for outcome in outcomes) == {Succeeded: len(FOXES) - 1, Failed: 1}
    poor = Simulator(attrs.evolve(FAST_PROFILE, balance=Decimal("1.2")), seed=1)
    async with batch_of(poor, tmp_path / "poor") as batch:
        _, cause = await run_anyhow(batch)
    assert isinstance(cause, InsufficientCredits)


async def test_m5_a_500_about_credit_is_not_sent_again_by_every_run(tmp_path: Path) -> None:
    """M5: a charged submit whose response is a 500 stays unknown, whatever the words."""
    simulator = Simulator(FAST_PROFILE)
    charged = 0

    def intercept(request: WireRequest) -> WireResponse | None:
        nonlocal charged
        charged += request.method == "POST"
        return rejected(500, 1, "insufficient credit") if request.method == "POST" else None

    for _ in range(3):
        async with batch_of(simulator, tmp_path, intercept) as batch:
            await run_anyhow(batch, ["fox"])
    assert charged == 3


async def test_m6_each_possible_charge_of_a_key_is_counted_over_all_runs(tmp_path: Path) -> None:
    """M6, B5: resubmits by policy, by `retry_failed` and by the user add up in ledger, outcome and manifest."""
    errors = Simulator(attrs.evolve(FAST_PROFILE, charged_errors=1.0))
    async with batch_of(errors, tmp_path) as batch:
        outcomes, _ = await run_anyhow(batch, ["fox"])
        (row,) = await rows_of(batch)
        await batch.resubmit(row.key)
    (outcome,) = outcomes
    assert isinstance(outcome, Unknown)
    assert (len(errors.charges), row.possible_duplicates) == (3, 2)
    assert "3 submits may each have been charged" in str(outcome.error)
    fails = Simulator(attrs.evolve(FAST_PROFILE, failed_tasks=1.0), seed=1)
    async with batch_of(fails, tmp_path) as batch:
        await run_anyhow(batch, ["fox"])
    fine = Simulator(FAST_PROFILE, seed=2)
    async with batch_of(fine, tmp_path) as batch:
        assert kinds(await run(batch, ["fox"], retry_failed=True)) == ["Succeeded"]
    (line,) = manifest(tmp_path)
    assert line["possible_duplicates"] == len(errors.charges) + len(fails.charges) + len(fine.charges) - 1 == 4


@pytest.mark.parametrize("answer", [PORTAL, response(403, body=b"<html>blocked</html>"), response(404, body=b"nginx")])
async def test_m9_another_server_s_answer_leaves_rows_ready(tmp_path: Path, answer: WireResponse) -> None:
    """M9: a captive portal, a firewall or a wrong path burns no rows, and the outage logic counts it."""
    simulator = Simulator(FAST_PROFILE)
    rows = [f"fox {number}" for number in range(40)]
    async with batch_of(simulator, tmp_path, nth_post(lambda n: answer if n >= 4 else None)) as batch:
        outcomes: list[Outcome] = []
        with anyio.move_on_after(600):
            outcomes, _ = await run_anyhow(batch, rows)
    async with batch_of(simulator, tmp_path) as batch:
        states = Counter(row.state for row in await rows_of(batch))
        assert states[RowState.FAILED] == 0
        assert states[RowState.UNKNOWN] <= 10  # a second such answer for the same row proves nothing
        assert Counter(map(type, outcomes))[Failed] == 0
        done = await run(batch, rows)
    assert Counter(kinds(done))["Succeeded"] == 40 - states[RowState.UNKNOWN]


async def test_m9_a_single_submit_raises_and_says_where_it_was_sent(tmp_path: Path) -> None:
    """M9: a redirect of a POST is not followed."""
    simulator = Simulator(attrs.evolve(FAST_PROFILE, captive_portals=1.0))
    async with simulator.client() as client:
        with pytest.raises(InvalidRequest, match=r"redirected to login\.portal\.example"):
            await client.generate("a fox")
    assert simulator.charges == []


async def test_m10_another_service_is_refused(tmp_path: Path) -> None:
    """M10: charged tasks cannot be found there."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        await run(batch)
    async with NanoBananaClient("dk-test", base_url="http://other.test", transport=simulator) as client:
        with pytest.raises(ConfigurationError, match="this batch was charged at http"):
            async with Batch.open(tmp_path, client):
                pass


async def test_m10_another_account_is_refused_and_a_rotated_key_is_not(tmp_path: Path) -> None:
    """M10: a query of a known task tells. With `new_account` the batch goes on."""
    keys = attrs.evolve(FAST_PROFILE, keys=frozenset({"dk-1", "dk-2", "dk-3"}), accounts={"dk-3": "another"})
    simulator = Simulator(keys)
    async with batch_of(simulator, tmp_path) as batch:
        await run(batch)
    async with simulator.client(api_key="dk-2") as client, Batch.open(tmp_path, client) as batch:
        await run(batch)
    async with simulator.client(api_key="dk-3") as client:
        with pytest.raises(ConfigurationError, match=r"belongs to another account.*--new-account"):
            async with Batch.open(tmp_path, client):
                pass
    async with simulator.client(api_key="dk-3") as client, Batch.open(tmp_path, client, new_account=True) as batch:
        assert kinds(await run(batch, [*FOXES, "a hare"])) == ["Succeeded"] * 13
    assert len(simulator.charges) == 13


async def test_m10_an_unknown_row_with_an_id_is_looked_for_again(tmp_path: Path) -> None:
    """M10: a task that was lost at the wrong account is found at the right one."""
    slow = Simulator(SimulatorProfile(median_s=60, sigma=0, visibility_delay_s=0))
    async with batch_of(slow, tmp_path) as batch:
        with anyio.move_on_after(1):
            await run(batch, ["fox"])
    lost = Simulator(FAST_PROFILE, seed=1)
    async with batch_of(lost, tmp_path) as batch:
        assert kinds(await run(batch, ["fox"])) == ["Unknown"]
    await anyio.sleep(120)
    async with batch_of(slow, tmp_path) as batch:
        assert kinds(await run(batch, ["fox"])) == ["Succeeded"]
    assert (len(slow.charges), len(lost.charges)) == (1, 0)


async def test_a_429_is_never_a_possible_charge(tmp_path: Path) -> None:
    """A service that charges and says 429 is out of scope."""
    simulator = Simulator(attrs.evolve(FAST_PROFILE, rate_limited=1.0))
    async with simulator.client() as client:
        with pytest.raises(RateLimited):
            await client.generate("a fox", timeout_s=5)
    async with batch_of(simulator, tmp_path) as batch:
        with anyio.move_on_after(30):
            await run_anyhow(batch, ["fox"])
    async with batch_of(simulator, tmp_path) as batch:
        (row,) = await rows_of(batch)
    assert row.possible_charges == 0


async def test_unpriced_charges_of_an_earlier_run_stop_the_next_one(tmp_path: Path) -> None:
    """M3: with an upper bound several were let through. Without it, more than one of unknown price blocks all."""
    simulator = Simulator(attrs.evolve(SIZES, failed_tasks=1.0))
    async with batch_of(simulator, tmp_path, budget=Decimal(10), max_price=Decimal("1.2")) as batch:
        await run_anyhow(batch, sized("4k", 8))
    cheap = Simulator(SIZES, seed=1)
    async with batch_of(cheap, tmp_path, budget=Decimal(10)) as batch:
        _, cause = await run_anyhow(batch, sized("1k", 100))
    assert isinstance(cause, BudgetExceeded)
    assert spent(simulator) + spent(cheap) <= Decimal(10)


async def test_a_charge_keeps_its_price_when_its_row_is_edited(tmp_path: Path) -> None:
    """M2: a failed row with a key may get another size, and its earlier attempt was still of the first one."""
    large, small = (
        [RowKeys().row(GenerationRequest("fox", image_size=size), key=f"{number}") for number in range(7)]
        for size in ("4k", "1k")
    )
    simulator = Simulator(SIZES)
    async with batch_of(simulator, tmp_path, budget=Decimal(10)) as batch:
        await run_anyhow(batch, [*sized("1k", 1), *sized("4k", 1)])
    fails = Simulator(attrs.evolve(SIZES, failed_tasks=1.0), seed=1)
    async with batch_of(fails, tmp_path, budget=Decimal(10)) as batch:
        await run_anyhow(batch, large)
        before = batch.progress().budget
    async with batch_of(simulator, tmp_path, budget=Decimal(10)) as batch:
        outcomes = batch.run(small, retry_failed=True)
        with pytest.raises(BudgetExceeded):
            _ = [outcome async for outcome in outcomes]
        assert batch.progress().budget.reserved >= before.reserved == Decimal("8.4")
    assert spent(simulator) + spent(fails) <= Decimal(10)


@pytest.mark.parametrize("ends_rejected", [True, False])
async def test_a_429_after_a_possible_charge_begins_no_new_count(tmp_path: Path, ends_rejected: bool) -> None:  # noqa: FBT001 - a table
    """M6: the service's own 500 may have been charged, whatever the submit waits for, and whatever comes after it."""
    simulator = Simulator(FAST_PROFILE)
    answers = {1: rejected(500), 2: rejected(429, retry_after="1")}
    answers |= {3: rejected(400)} if ends_rejected else {3: rejected(429, retry_after="1")}
    posts: list[int] = []

    def respond(number: int) -> WireResponse | None:
        posts.append(number)
        return answers.get(number)

    intercept = nth_post(respond)
    async with batch_of(simulator, tmp_path, intercept) as batch:
        outcomes, _ = await run_anyhow(batch, ["fox", "hare"])
        rows = {row.prompt: row for row in await rows_of(batch)}
    (twice,) = (row for row in rows.values() if row.attempt > 1)
    kind = type(next(outcome for outcome in outcomes if outcome.key == twice.key))
    assert (kind, twice.possible_charges) == ((Unknown, 1) if ends_rejected else (Succeeded, 2))
    assert len(posts) <= 6


@pytest.mark.parametrize("error", [ValueError("bad bucket"), RuntimeError("boom"), KeyError("k")])
async def test_a_store_that_fails_says_that_the_image_is_charged(tmp_path: Path, error: Exception) -> None:
    """Whatever a store raises, the outcome has the task id, and the next run stores the image."""
    simulator = Simulator(FAST_PROFILE)

    class Broken:
        async def put(self, name: str, data: bytes) -> SavedImage:
            raise error

    async with batch_of(simulator, tmp_path, image_store=Broken()) as batch:
        (outcome,), cause = await run_anyhow(batch, ["fox"])
    assert cause is None
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, ImageError)
    assert (outcome.error.task_id, outcome.may_be_charged) == (simulator.charges[0].task_id, True)
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch, ["fox"])) == ["Succeeded"]
    assert len(simulator.charges) == 1


async def test_f3_the_wait_for_the_first_price_is_part_of_the_progress(tmp_path: Path) -> None:
    """With a budget, one image at a time is sent until its price is known, which looks like a stall."""
    async with batch_of(Simulator(FAST_PROFILE), tmp_path, budget=Decimal(10)) as batch:
        seen = [batch.progress().is_learning_price async for _ in batch.run(FOXES)]
    assert not any(seen), "the price is known from the first image"
    async with (
        batch_of(Simulator(SLOW), tmp_path / "slow", budget=Decimal(10)) as batch,
        anyio.create_task_group() as group,
    ):
        group.start_soon(run, batch)
        with anyio.fail_after(5):
            while not batch.progress().is_learning_price:
                await anyio.sleep(0.01)
        group.cancel_scope.cancel()
