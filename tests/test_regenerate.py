"""A request is submitted again after the ends that its policy names, within the budget, and never otherwise."""

import json
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from nanobanana_async import (
    AuthenticationError,
    BatchRow,
    BudgetExceeded,
    ExchangeError,
    Failed,
    GenerationRequest,
    MismatchKind,
    NanoBananaClient,
    NoImage,
    Outcome,
    OwnerLimits,
    Phase,
    ReasonKind,
    RegenerateOn,
    RegeneratePolicy,
    RowState,
    SqliteLedger,
    SubmissionUnknown,
    Succeeded,
    Task,
    TaskFailed,
    TaskStatus,
    Unknown,
    WireRequest,
    WireResponse,
)
from nanobanana_async.simulator import FAST_LIMITS, FAST_POLLING, FAST_PROFILE, Simulator
from nanobanana_async.simulator.in_memory import tiny_png
from nanobanana_async.simulator.server import SimulatorServer
from tests.batches import batch_of, client_of, kinds, nth_post, rows_of, run, run_until_stopped
from tests.commands import nanobanana
from tests.fakes import Intercept, InterceptingTransport, lost, rejected, state

pytestmark = pytest.mark.anyio

ONCE, TWICE = RegeneratePolicy(attempts=1), RegeneratePolicy(attempts=2)
EMPTY: dict[str, Any] = {"status": "success", "result": []}
BUSY = {"status": "failed", "status_reason": {"message": "internal error, please try again"}}
REFUSED = {"status": "failed", "status_reason": {"message": "blocked by the safety policy, please try again"}}
SILENT: dict[str, Any] = {"status": "failed", "status_reason": {"message": None}}
FOUR_K = GenerationRequest("fox", image_size="4k")


def ending(simulator: Simulator, *ends: dict[str, Any] | None) -> Intercept:
    """Return an interceptor that ends the nth charged task so; None leaves it to the simulator."""

    def intercept(request: WireRequest) -> WireResponse | None:
        for charge, end in zip(simulator.charges, ends, strict=False):
            if end is not None and request.method == "GET" and charge.task_id in request.url:
                fields = {"consumed": "0.500000", **end}
                return state(fields.pop("status"), charge.task_id, **fields)
        return None

    return intercept


def both(*intercepts: Intercept) -> Intercept:
    """Return an interceptor that asks each of *intercepts*."""
    return lambda request: next((found for one in intercepts if (found := one(request)) is not None), None)


def too_small(simulator: Simulator, *numbers: int) -> None:
    """Let the simulator deliver the nth charged images in another size."""
    submit = simulator.service._submit  # noqa: SLF001 - a rate would hit any image

    def flawed(*args: Any, **options: Any) -> Any:  # noqa: ANN401 - passed through
        simulator.service.profile = attrs.evolve(
            simulator.service.profile, wrong_sizes=float(len(simulator.charges) in numbers)
        )
        return submit(*args, **options)

    simulator.service._submit = flawed  # type: ignore[method-assign]  # noqa: SLF001 - see above


# --- single requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [EMPTY, BUSY])
async def test_by_default_nothing_is_charged_twice(end: dict[str, Any]) -> None:
    """Without a policy the end of the task is the end of the call."""
    simulator = Simulator()
    async with client_of(simulator, ending(simulator, end)) as client:
        with pytest.raises((NoImage, TaskFailed)):
            await client.generate("fox")
    assert len(simulator.charges) == 1


@pytest.mark.parametrize("end", [EMPTY, BUSY])
async def test_a_task_without_an_image_is_followed_by_another(end: dict[str, Any]) -> None:
    """The caller gets the image, and the service has charged two tasks."""
    simulator = Simulator()
    async with client_of(simulator, ending(simulator, end), regenerate=ONCE) as client:
        task = await client.generate("fox")
        assert client.statistics().reasons == {"empty" if end is EMPTY else "error": 1}
    assert [charge.task_id for charge in simulator.charges][1:] == [task.task_id]


@pytest.mark.parametrize(
    ("end", "kind"), [(REFUSED, ReasonKind.REFUSED), (SILENT, ReasonKind.UNKNOWN)], ids=["refused", "silent"]
)
async def test_a_refused_task_and_one_without_a_reason_are_not_followed_by_another(
    end: dict[str, Any], kind: ReasonKind
) -> None:
    """A second charge would buy the same answer, as far as words can tell."""
    simulator = Simulator()
    async with client_of(simulator, ending(simulator, end), regenerate=TWICE) as client:
        with pytest.raises(TaskFailed) as caught:
            await client.generate("fox")
    assert (len(simulator.charges), caught.value.reason_kind) == (1, kind)


async def test_the_policy_names_the_ends() -> None:
    """An end that it does not name is final."""
    simulator = Simulator()
    policy = RegeneratePolicy(attempts=3, on={RegenerateOn.EMPTY})
    async with client_of(simulator, ending(simulator, BUSY), regenerate=policy) as client:
        with pytest.raises(TaskFailed):
            await client.generate("fox")
    assert len(simulator.charges) == 1


async def test_the_last_error_contains_the_earlier_tasks() -> None:
    """Each with its charge."""
    simulator = Simulator()
    async with client_of(simulator, ending(simulator, EMPTY, BUSY, EMPTY), regenerate=TWICE) as client:
        with pytest.raises(NoImage) as caught:
            await client.generate("fox")
    ids = [charge.task_id for charge in simulator.charges]
    assert [*(task.task_id for task in caught.value.earlier), caught.value.task_id] == ids
    assert len(ids) == 3


async def test_an_image_of_the_wrong_size_is_followed_by_another() -> None:
    """The caller gets the one of the right size."""
    simulator = Simulator()
    too_small(simulator, 0)
    async with client_of(simulator, regenerate=TWICE) as client:
        task = await client.generate(FOUR_K)
    assert [charge.task_id for charge in simulator.charges][1:] == [task.task_id]


async def test_an_image_of_the_wrong_size_is_better_than_none() -> None:
    """A later task without an image does not replace it."""
    simulator = Simulator()
    too_small(simulator, 0)
    async with client_of(simulator, ending(simulator, None, EMPTY, BUSY), regenerate=TWICE) as client:
        async for outcome in client.generate_many([FOUR_K]):
            assert isinstance(outcome, Succeeded)
            assert outcome.task.task_id == simulator.charges[0].task_id
            assert (outcome.attempts, outcome.consumed) == (3, Decimal("1.5"))


async def test_generate_many_states_attempts_and_their_cost() -> None:
    """Also for a request without an image."""
    simulator = Simulator()
    ends = ending(simulator, EMPTY, EMPTY, EMPTY, EMPTY)
    async with client_of(simulator, ends, regenerate=TWICE) as client:
        found = [outcome async for outcome in client.generate_many(["fox", "owl"], max_in_flight=1)]
    (lost_one,) = [one for one in found if isinstance(one, Failed)]
    (won,) = [one for one in found if isinstance(one, Succeeded)]
    assert (lost_one.attempts, lost_one.consumed) == (3, Decimal("1.5"))
    assert (won.attempts, won.consumed) == (2, Decimal("1.0"))


async def test_a_later_submit_that_was_not_sent_leaves_the_first_end() -> None:
    """It says more than the error of a submit that was not charged."""
    simulator = Simulator()
    refused = nth_post(lambda number: lost(Phase.CONNECT) if number else None)
    async with client_of(simulator, both(refused, ending(simulator, EMPTY)), regenerate=TWICE) as client:
        with pytest.raises(NoImage) as caught:
            await client.generate("fox")
    assert caught.value.task_id == simulator.charges[0].task_id


async def test_a_later_submit_of_unknown_outcome_is_raised_with_the_earlier_task() -> None:
    """It may have been charged, so the caller has to know."""
    simulator = Simulator()
    intercept = both(nth_post(lambda number: lost() if number == 1 else None), ending(simulator, EMPTY))
    async with client_of(simulator, intercept, regenerate=TWICE) as client:
        with pytest.raises(SubmissionUnknown) as caught:
            await client.generate("fox")
        assert [task.task_id for task in caught.value.earlier] == [simulator.charges[0].task_id]


async def test_an_owner_s_budget_ends_the_series(tmp_path: Path) -> None:
    """The first end is the outcome, and nothing more is sent."""
    simulator = Simulator()
    limits = OwnerLimits(budget=Decimal("0.9"), max_price=Decimal("0.5"))
    async with NanoBananaClient(
        "dk-test",
        transport=InterceptingTransport(simulator, ending(simulator, EMPTY)),
        limits=FAST_LIMITS,
        polling=FAST_POLLING,
        regenerate=TWICE,
        ledger=SqliteLedger(tmp_path),
        owner_limits=limits,
    ) as client:
        with pytest.raises(NoImage):
            await client.generate("fox", owner="ann")
    assert len(simulator.charges) == 1


async def test_tasks_that_others_have_replaced_are_not_resumed(tmp_path: Path) -> None:
    """After a restart, only the task that the caller has got is to be acknowledged."""
    simulator = Simulator()
    options: dict[str, Any] = {"limits": FAST_LIMITS, "polling": FAST_POLLING}
    transport = InterceptingTransport(simulator, ending(simulator, EMPTY, BUSY))
    async with NanoBananaClient(
        "dk-test", transport=transport, regenerate=TWICE, ledger=SqliteLedger(tmp_path), **options
    ) as client:
        task = await client.generate("fox")
    async with NanoBananaClient("dk-test", transport=simulator, ledger=SqliteLedger(tmp_path), **options) as client:
        assert [handle.task_id async for handle in client.resume()] == [task.task_id]
    assert len(simulator.charges) == 3


async def test_the_application_may_say_what_a_reason_means() -> None:
    """Its function also sets `reason_kind`. One that fails says nothing."""
    simulator = Simulator()

    def classify(task: Task) -> ReasonKind:
        if task.reason is None:
            raise RuntimeError("no words")
        return ReasonKind.ERROR

    ends = ending(simulator, REFUSED, SILENT)
    policy = RegeneratePolicy(attempts=5, classify=classify)
    async with client_of(simulator, ends, regenerate=policy) as client:
        with pytest.raises(TaskFailed) as caught:
            await client.generate("fox")
    assert (caught.value.reason_kind, len(simulator.charges)) == (ReasonKind.UNKNOWN, 2)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Decimal(90), Decimal(400)])
async def test_the_books_of_a_batch_agree_with_the_service_to_the_last_decimal(tmp_path: Path, budget: Decimal) -> None:
    """200 rows with flaws of all kinds: each attempt is counted, the budget holds, and refused rows are left alone."""
    profile = attrs.evolve(
        FAST_PROFILE,
        wrong_sizes=0.1,
        wrong_ratios=0.05,
        blank_images=0.05,
        truncated_images=0.02,
        refusals=0.05,
        empty_results=0.1,
        failed_tasks=0.05,
        failed_charge="price",
        size_prices={"1k": Decimal("0.500001"), "2k": Decimal("0.75"), "4k": Decimal("1.8")},
    )
    simulator = Simulator(profile, seed=5)
    rows = [
        BatchRow(
            key=str(number), request=GenerationRequest(f"image {number}", image_size=("1k", "2k", "4k")[number % 3])
        )
        for number in range(200)
    ]
    outcomes: list[Outcome] = []
    is_enough = budget > 300
    async with batch_of(simulator, tmp_path, budget=budget, max_price=Decimal("1.8"), regenerate=TWICE) as batch:
        with nullcontext() if is_enough else pytest.raises(BudgetExceeded):
            async for outcome in batch.run(rows):
                outcomes.append(outcome)  # noqa: PERF401 - the run may raise
        spent = batch.progress().budget.spent
        by_key = {row.key: row for row in await rows_of(batch)}
    charged = sum((charge.credits for charge in simulator.charges), Decimal(0))
    assert spent == charged <= budget
    assert sum((one.consumed or Decimal(0) for one in outcomes), Decimal(0)) == charged
    prompts = [charge.prompt for charge in simulator.charges]
    for prompt in set(prompts):
        made = [simulator.service.tasks[one.task_id].result_kind for one in simulator.charges if one.prompt == prompt]
        assert "refused" not in made[:-1]
    assert len(outcomes) == 200 or not is_enough
    assert max(map(prompts.count, prompts)) == 3 or not is_enough
    for outcome in outcomes:
        assert prompts.count(outcome.request.prompt) == outcome.attempts
        if isinstance(outcome, Failed) and isinstance(outcome.error, TaskFailed | NoImage):
            assert by_key[outcome.key].reason_kind is outcome.error.reason_kind
        if isinstance(outcome, Succeeded):
            assert by_key[outcome.key].state is RowState.SAVED
            assert by_key[outcome.key].task_id == outcome.task.task_id
            is_small = any(one.kind is MismatchKind.SIZE for one in outcome.files[0].mismatch)
            assert not is_small or outcome.attempts > 1 or not is_enough


async def test_a_later_run_does_not_repeat_what_an_earlier_one_has_repeated(tmp_path: Path) -> None:
    """The attempts belong to the run. A failed row stays failed, and a saved one saved."""
    simulator = Simulator()
    ends = ending(simulator, EMPTY, EMPTY, None, EMPTY)
    too_small(simulator, 2)
    rows = [BatchRow(key="a", request=GenerationRequest("fox")), BatchRow(key="b", request=FOUR_K)]
    for replayed in (False, True):
        async with batch_of(simulator, tmp_path, ends, regenerate=ONCE) as batch:
            found = [outcome async for outcome in batch.run(rows, max_in_flight=1)]
            states = [row.state for row in await rows_of(batch)]
        failed, succeeded = found
        assert (type(failed), type(succeeded)) == (Failed, Succeeded)
        assert [outcome.replayed for outcome in found] == [replayed, replayed]
        assert states == [RowState.FAILED, RowState.SAVED]
        assert isinstance(succeeded, Succeeded)
        assert [one.kind for one in succeeded.files[0].mismatch] == [MismatchKind.SIZE]
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, NoImage | TaskFailed)
        assert failed.error.reason_kind is ReasonKind.EMPTY
    assert len(simulator.charges) == 4


async def test_a_row_stays_failed_if_its_second_submit_does_not_leave(tmp_path: Path) -> None:
    """The next run does not submit it: it was charged, and no second charge was asked for."""
    simulator = Simulator()
    refuse = nth_post(lambda number: rejected(401) if number else None)
    async with batch_of(simulator, tmp_path, both(refuse, ending(simulator, EMPTY)), regenerate=ONCE) as batch:
        ended, cause = await run_until_stopped(batch, ["fox"])
        assert (kinds(ended), type(cause)) == (["Failed"], AuthenticationError)
    async with batch_of(simulator, tmp_path) as batch:
        (outcome,) = (await run(batch, ["fox"])).values()
    assert isinstance(outcome, Failed)
    assert len(simulator.charges) == 1


async def test_a_second_submit_of_unknown_outcome_makes_the_row_unknown(tmp_path: Path) -> None:
    """Its image may exist, and its charge."""
    simulator = Simulator()
    intercept = both(nth_post(lambda number: lost() if number == 1 else None), ending(simulator, EMPTY))
    async with batch_of(simulator, tmp_path, intercept, regenerate=TWICE) as batch:
        (outcome,) = (await run(batch, ["fox"])).values()
        (row,) = await rows_of(batch)
    assert isinstance(outcome, Unknown)
    assert (row.state, row.total_consumed, row.possible_duplicates) == (RowState.UNKNOWN, Decimal("0.5"), 0)
    assert outcome.consumed == Decimal("0.5")


async def test_a_row_of_an_earlier_run_is_only_waited_for(tmp_path: Path) -> None:
    """Its attempts were those of that run, and what the ledger knows of its request is not all of it."""
    simulator = Simulator(attrs.evolve(FAST_PROFILE, median_s=0.3))
    async with batch_of(simulator, tmp_path, regenerate=TWICE) as batch:
        with anyio.move_on_after(0.1):
            await run(batch, ["fox", "owl"])
    charged = len(simulator.charges)
    assert charged == 2
    ends = ending(simulator, EMPTY, EMPTY)
    async with batch_of(simulator, tmp_path, ends, regenerate=TWICE) as batch:
        outcomes = await run(batch, ["fox"])
        assert [row.state for row in await rows_of(batch)] == [RowState.FAILED, RowState.FAILED]
    assert kinds(outcomes) == ["Failed", "Failed"]
    assert len(simulator.charges) == charged


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_a_second_submit_waits_in_an_outage_like_a_first_one(tmp_path: Path) -> None:
    """Ten minutes without a network are a few dozen POSTs."""
    simulator = Simulator(attrs.evolve(FAST_PROFILE, median_s=5))
    posts = 0

    def refuse(number: int) -> ExchangeError | None:
        nonlocal posts
        posts += 1
        return lost(Phase.CONNECT) if number and anyio.current_time() < 600 else None

    async with batch_of(
        simulator, tmp_path, both(nth_post(refuse), ending(simulator, EMPTY)), regenerate=ONCE
    ) as batch:
        (outcome,) = (await run(batch, ["fox"])).values()
    assert isinstance(outcome, Succeeded)
    assert posts < 200
    assert len(simulator.charges) == 2


def test_a_charge_that_was_not_stated_counts_whatever_the_last_one_was() -> None:
    """The last task was free of charge, the one before may not have been."""
    task = Task(task_id="ta-1", status=TaskStatus.FAILED)
    free = attrs.evolve(task, task_id="ta-2", consumed=Decimal(0))
    error = TaskFailed("no", task=free)
    assert not Failed(key="k", request=FOUR_K, error=error).may_be_charged
    assert Failed(key="k", request=FOUR_K, error=error, earlier=(task,)).may_be_charged


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_nothing_is_submitted_again_for_which_there_is_no_time() -> None:
    """It would be charged, and its image would come too late."""
    simulator = Simulator(attrs.evolve(FAST_PROFILE, median_s=20, sigma=0))
    async with client_of(simulator, ending(simulator, EMPTY), regenerate=TWICE) as client:
        with pytest.raises(NoImage):
            await client.generate("fox", timeout_s=10)
    assert len(simulator.charges) == 1


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.other_clients
def test_the_commands_submit_again_and_state_the_whole_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused prompts excepted. Without the option nothing is submitted twice."""
    profile = attrs.evolve(FAST_PROFILE, empty_results=1.0, failed_charge="price")
    (tmp_path / "rows.txt").write_text("fox\nowl\n")
    quick = ("--poll", "0.05")
    with SimulatorServer(profile, render=tiny_png) as server:
        monkeypatch.setenv("DEFAPI_API_KEY", "dk-test")
        monkeypatch.setenv("DEFAPI_BASE_URL", server.url)
        one = nanobanana("generate", "fox", *quick, "-o", str(tmp_path), "--regenerate", "2", "--json")
        assert one.err.count("submitting again") == 2
        record = json.loads(one.out)
        assert (record["attempts"], record["reason_kind"]) == (3, "empty")
        two = nanobanana("generate", "fox", *quick, "-o", str(tmp_path), "--regenerate", "1")
        assert "0 images, 1 credits charged" in two.err
        rows, out = str(tmp_path / "rows.txt"), str(tmp_path / "out")
        three = nanobanana("batch", rows, *quick, "--out", out, "--regenerate", "1")
        assert "2 credits spent" in three.err
        assert "failed tasks by reason: 2 empty" in three.err
        assert len(server.charges) == 3 + 2 + 4
        nanobanana("generate", "fox", *quick, "-o", str(tmp_path))
        assert len(server.charges) == 3 + 2 + 4 + 1
