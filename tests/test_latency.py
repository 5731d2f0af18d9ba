"""Latencies are learned from polls, and determine when the next poll is worth its cost."""

import math
from bisect import bisect_right
from itertools import chain, pairwise
from random import Random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async import PollPolicy
from nanobanana_async.tracking.latency import _EDGES, BINS, PRIOR_MEDIAN_S, LatencyModel
from nanobanana_async.tracking.schedule import PollSchedule
from tests.latency_samples import Draw, bimodal, fixed_polls, lognormal, simulate

ages = st.floats(0, 3600)
costs = st.floats(0.01, 10)


def trained(*latencies_s: float, every_s: float = 1.0) -> LatencyModel:
    """Return a model that has observed tasks of these latencies at these polls."""
    model = LatencyModel()
    for latency_s in latencies_s:
        since_s = 0.0
        while since_s < latency_s:
            model.observe(since_s, since_s + every_s, done=since_s + every_s >= latency_s)
            since_s += every_s
    return model


def draws(draw: Draw, count: int, seed: int = 1) -> list[float]:
    """Return latencies."""
    rng = Random(seed)
    return [draw(rng) for _ in range(count)]


def test_the_prior_median_is_twenty_seconds() -> None:
    """Public clients of the service report it."""
    assert LatencyModel().median_s() == pytest.approx(PRIOR_MEDIAN_S, rel=0.02)


@pytest.mark.parametrize("median_s", [3.0, 10.0, 40.0, 150.0])
def test_the_median_is_learned_from_polls(median_s: float) -> None:
    """Polls only bracket the end of a task."""
    model = trained(*draws(lognormal(median_s, 0.5), 400))
    assert model.median_s() == pytest.approx(median_s, rel=0.15)


def test_unfinished_tasks_count() -> None:
    """Of a thousand tasks only the fast ones have ended after ten seconds, and the median is not theirs."""
    model = LatencyModel()
    for latency_s in draws(lognormal(20, 0.5), 1000):
        for since_s in range(10):
            if since_s < latency_s:
                model.observe(since_s, since_s + 1.0, done=since_s + 1 >= latency_s)
    assert model.median_s() > 15


def test_tasks_that_are_given_up_do_not_bias_the_rest() -> None:
    """Half of the tasks are tracked for fifteen seconds only."""
    model = LatencyModel()
    for number, latency_s in enumerate(draws(lognormal(20, 0.5), 2000)):
        last = 15 if number % 2 else 600
        for since_s in range(last):
            if since_s < latency_s:
                model.observe(since_s, since_s + 1.0, done=since_s + 1 >= latency_s)
    assert model.median_s() == pytest.approx(20, rel=0.15)


def test_old_observations_decay() -> None:
    """After a slow-down by three and two thousand tasks, the model has adapted."""
    model = trained(*draws(lognormal(10, 0.3), 1000), *draws(lognormal(30, 0.3), 2000))
    assert model.median_s() == pytest.approx(30, rel=0.15)


def test_learning_never_overflows() -> None:
    """Weights grow with every task and are rescaled."""
    model = LatencyModel()
    for _ in range(150_000):
        model.observe(9.0, 11.0, done=True)
    assert all(math.isfinite(value) for value in model.dump())
    assert model.median_s() < 12


def test_two_polls_at_the_same_time_are_not_observed() -> None:
    """A clock may stand still."""
    model = LatencyModel()
    model.observe(5.0, 5.0, done=True)
    assert model.dump() == LatencyModel().dump()


@given(age_s=ages, cost_s=costs, max_s=st.floats(0.5, 60))
def test_an_interval_is_positive_and_bounded(age_s: float, cost_s: float, max_s: float) -> None:
    """The bounds hold at any age."""
    assert 0 < LatencyModel().next_poll_in_s(age_s, cost_s, max_s) <= max_s


@given(age_s=ages, costs_s=st.tuples(costs, costs))
def test_a_higher_poll_cost_gives_a_longer_interval(age_s: float, costs_s: tuple[float, float]) -> None:
    """Pressure raises the cost, so it never shortens an interval."""
    model = LatencyModel()
    cheap, dear = (model.next_poll_in_s(age_s, cost_s, 1000) for cost_s in sorted(costs_s))
    assert cheap <= dear + 1e-3


@given(age_s=st.floats(0, 200), cost_s=costs)
def test_the_poll_comes_when_the_expected_delay_reaches_its_cost(age_s: float, cost_s: float) -> None:
    """The definition is checked by summing P(done) in hundredths of the interval."""
    model = LatencyModel()
    interval_s = model.next_poll_in_s(age_s, cost_s, 1e6)
    waited_s, unfinished, step_s = 0.0, 1.0, interval_s / 400
    for k in range(400):
        rate = model._hazard(  # noqa: SLF001 - the definition is in terms of the hazard
            bisect_right(_EDGES, age_s + (k + 0.5) * step_s) - 1
        )
        after = unfinished * math.exp(-rate * step_s)
        waited_s += step_s * (1 - (unfinished + after) / 2)
        unfinished = after
    assert waited_s == pytest.approx(cost_s, rel=0.03, abs=0.003)


def test_a_model_can_be_saved_and_restored() -> None:
    """A model is dumped as plain numbers."""
    model = trained(*draws(lognormal(12, 0.4), 100))
    again = LatencyModel.load(model.dump())
    assert len(model.dump()) == 2 * BINS
    assert again.median_s() == pytest.approx(model.median_s())
    assert again.next_poll_in_s(8, 0.3, 15) == pytest.approx(model.next_poll_in_s(8, 0.3, 15))


@pytest.mark.parametrize("numbers", [[], [1.0] * 7, [math.nan] * 2 * BINS, [-1.0] * 2 * BINS, [math.inf] * 2 * BINS])
def test_invalid_numbers_are_rejected(numbers: list[float]) -> None:
    """A foreign file must not make a client poll without pause."""
    with pytest.raises(ValueError, match="latency model: expected"):
        LatencyModel.load(numbers)


@pytest.mark.parametrize("draw", [lognormal(20, 0.5), bimodal], ids=["lognormal", "bimodal"])
def test_a_learned_schedule_needs_fewer_polls_than_any_fixed_interval(draw: Draw) -> None:
    """At the same mean delay, the best fixed interval needs at least 1.3 times as many polls."""
    polls, delays_s = simulate(PollPolicy(), draw, 2500)
    assert fixed_polls(draw, fmean(delays_s), 2500) / fmean(polls) >= 1.3


@pytest.mark.parametrize("draw", [lognormal(20, 0.5), bimodal], ids=["lognormal", "bimodal"])
def test_the_first_fifty_tasks_are_no_worse_than_with_a_fixed_interval(draw: Draw) -> None:
    """The prior is good enough for the first tasks."""
    runs = [simulate(PollPolicy(), draw, 50, seed=seed) for seed in range(30)]
    polls, delays_s = (fmean(chain.from_iterable(column)) for column in zip(*runs, strict=True))
    assert fixed_polls(draw, delays_s, 2500) / polls >= 0.9


def test_each_model_name_has_a_latency_model_of_its_own() -> None:
    """Fast and slow models do not influence each other."""
    schedule = PollSchedule(PollPolicy())
    for _ in range(200):
        schedule.observe("quick", 4.0, 6.0, done=True)
        schedule.observe("slow", 58.0, 62.0, done=True)
        schedule.observe("slow", 0.0, 58.0, done=False)
    medians_s = schedule.median_latencies_s()
    assert medians_s["quick"] < 7
    assert medians_s["slow"] > 50
    assert schedule.next_poll_in_s("quick", 0.0, 0) < schedule.next_poll_in_s("slow", 0.0, 0)


def test_latency_models_can_be_passed_to_a_later_client() -> None:
    """`latency_models()` is a valid `PollPolicy.latency_models`."""
    schedule = PollSchedule(PollPolicy())
    for _ in range(200):
        schedule.observe("quick", 4.0, 6.0, done=True)
    later = PollSchedule(PollPolicy(latency_models=schedule.latency_models()))
    assert later.median_latencies_s() == pytest.approx(schedule.median_latencies_s())


def test_the_number_of_latency_models_is_bounded() -> None:
    """Model names may come from a web form."""
    schedule = PollSchedule(PollPolicy())
    for number in range(1000):
        schedule.observe(f"model-{number}", 4.0, 6.0, done=True)
    assert len(schedule.latency_models()) == 64
    assert "model-999" in schedule.latency_models()


@pytest.mark.parametrize("pressure", [1.0, 2.0, 4.0])
def test_pressure_lengthens_learned_intervals_in_proportion(pressure: float) -> None:
    """The proportion is exact for a constant hazard, and approximate otherwise."""
    schedule = PollSchedule(PollPolicy(max_interval_s=1000))
    interval_s = schedule.next_poll_in_s(None, 30.0, 1)
    assert schedule.next_poll_in_s(None, 30.0, 1, pressure) == pytest.approx(pressure * interval_s, rel=0.25)


def test_pressure_never_lengthens_an_interval_beyond_the_maximum() -> None:
    """Every task is polled at least once per `max_interval_s`."""
    assert PollSchedule(PollPolicy()).next_poll_in_s(None, 30.0, 1, 1e6) == PollPolicy().max_interval_s


def test_a_static_schedule_ignores_pressure() -> None:
    """A fixed interval stays fixed; its polls queue."""
    schedule = PollSchedule(PollPolicy.fixed(2.0))
    assert [schedule.next_poll_in_s("m", age_s, polls, 10.0) for age_s, polls in [(0, 0), (2, 1), (4, 2)]] == [
        2.0,
        2.0,
        2.0,
    ]


def test_a_backoff_schedule_grows_to_its_maximum() -> None:
    """The first intervals are as configured."""
    schedule = PollSchedule(PollPolicy.backoff(first_poll_s=8, initial_s=2, multiplier=2, max_s=10))
    assert [schedule.next_poll_in_s("m", 0.0, polls) for polls in range(5)] == [8.0, 2.0, 4.0, 8.0, 10.0]


@given(seed=st.integers(0, 1000))
def test_after_errors_intervals_double_and_half_is_random(seed: int) -> None:
    """The intervals grow up to the longest one."""
    policy = PollPolicy()
    schedule = PollSchedule(policy, Random(seed))
    for failures in range(1, 50):
        full_s = min(policy.max_interval_s, policy.min_interval_s * 2**failures)
        assert full_s / 2 <= schedule.backoff_s(failures) <= full_s


def test_the_default_cost_gives_growing_intervals() -> None:
    """The intervals of a slow task are listed for the reader."""
    schedule = PollSchedule(PollPolicy(jitter=0))
    polls_at_s: list[float] = []
    age_s = 0.0
    while age_s < 60:
        age_s += schedule.next_poll_in_s(None, age_s, len(polls_at_s))
        polls_at_s.append(age_s)
    assert polls_at_s[0] == pytest.approx(7.5, abs=1)
    assert all(2 < later - earlier < 5 for earlier, later in pairwise(polls_at_s))
