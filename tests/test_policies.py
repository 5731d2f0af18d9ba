"""Policies are frozen values that validate themselves."""

from multiprocessing import get_context
from random import Random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async import Limits, PollPolicy, RetryPolicy, Timeouts
from nanobanana_async.policies import RESUBMIT_LEVELS, ResubmitLevel
from nanobanana_async.tracking.schedule import PollSchedule


@pytest.mark.parametrize("policy", [Limits, PollPolicy, RetryPolicy, Timeouts])
def test_no_number_of_a_policy_may_be_negative(policy: type[attrs.AttrsInstance]) -> None:
    """An invalid number is an error on construction."""
    for field in attrs.fields(policy):
        if isinstance(field.default, int | float):
            with pytest.raises(ValueError, match=field.name):
                policy(**{field.name: -1})


def test_an_unknown_resubmit_level_is_rejected() -> None:
    """A misspelt level could cost money."""
    with pytest.raises(ValueError, match="resubmit"):
        RetryPolicy(resubmit="sometimes")  # type: ignore[arg-type]


@given(attempts=st.integers(1, 10_000), seed=st.integers())
def test_backoff_has_full_jitter_and_is_bounded(attempts: int, seed: int) -> None:
    """The wait is between zero and the maximum after any number of attempts."""
    policy = RetryPolicy(initial_s=0.5, max_s=8)
    assert 0 <= policy.backoff_s(attempts, Random(seed)) <= min(8, 0.5 * 2 ** min(attempts - 1, 10))


@pytest.mark.parametrize("level", RESUBMIT_LEVELS)
def test_each_resubmit_level_includes_the_ones_before_it(level: ResubmitLevel) -> None:
    """The levels are ordered from never to always."""
    policy = RetryPolicy(resubmit=level)
    assert [policy.allows_resubmit(other) for other in RESUBMIT_LEVELS] == [
        RESUBMIT_LEVELS.index(other) <= RESUBMIT_LEVELS.index(level) for other in RESUBMIT_LEVELS
    ]


@pytest.mark.parametrize("name", ["poll_cost_s", "min_interval_s", "max_interval_s"])
def test_no_interval_is_infinite(name: str) -> None:
    """An infinite interval would never poll the task again."""
    with pytest.raises(ValueError, match=name):
        PollPolicy(**{name: float("inf")})  # type: ignore[arg-type]  # all three are floats


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # with the threads of pytest-xdist, from 3.12 on
def test_g4_processes_that_were_forked_draw_different_waits() -> None:
    """G4: workers of one preloaded app would poll at the same moments."""
    schedule, processes = PollSchedule(PollPolicy()), get_context("fork")
    drawn = processes.SimpleQueue()
    workers = [processes.Process(target=lambda: drawn.put(schedule.jittered_s(10))) for _ in range(3)]
    for worker in workers:
        worker.start()
    waits = {drawn.get() for _ in workers}
    for worker in workers:
        worker.join()
    assert len(waits | {schedule.jittered_s(10)}) == 4


def test_g5_a_bot_has_a_minute_left_when_an_image_takes_too_long() -> None:
    """G5: the token of an interaction lives 900 s."""
    assert Timeouts().task_s <= 900 - 60
