"""How long pictures take is learned from looks, and says when the next look pays."""

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
from tests.latency_samples import Draw, bimodal, fixed_looks, lognormal, simulate

ages = st.floats(0, 3600)
prices = st.floats(0.01, 10)


def taught(*latencies_s: float, every_s: float = 1.0) -> LatencyModel:
    """Return a curve that has seen tasks of these latencies, looked at every so often."""
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


def test_before_it_has_seen_anything_half_are_done_in_twenty_seconds() -> None:
    """That is what everybody who uses the service reports."""
    assert LatencyModel().median_s() == pytest.approx(PRIOR_MEDIAN_S, rel=0.02)


@pytest.mark.parametrize("median_s", [3.0, 10.0, 40.0, 150.0])
def test_the_median_of_what_was_seen_is_learned(median_s: float) -> None:
    """From looks that only bracket the end of a task."""
    model = taught(*draws(lognormal(median_s, 0.5), 400))
    assert model.median_s() == pytest.approx(median_s, rel=0.15)


def test_those_still_running_count() -> None:
    """A thousand begin together; after ten seconds only the quick ones have ended: the median is not theirs."""
    model = LatencyModel()
    for latency_s in draws(lognormal(20, 0.5), 1000):
        for since_s in range(10):
            if since_s < latency_s:
                model.observe(since_s, since_s + 1.0, done=since_s + 1 >= latency_s)
    assert model.median_s() > 15


def test_those_who_leave_early_do_not_bias_the_rest() -> None:
    """Half of the tasks are watched for fifteen seconds only."""
    model = LatencyModel()
    for number, latency_s in enumerate(draws(lognormal(20, 0.5), 2000)):
        last = 15 if number % 2 else 600
        for since_s in range(last):
            if since_s < latency_s:
                model.observe(since_s, since_s + 1.0, done=since_s + 1 >= latency_s)
    assert model.median_s() == pytest.approx(20, rel=0.15)


def test_what_was_seen_fades() -> None:
    """The service has become three times slower, and two thousand pictures later that is what is believed."""
    model = taught(*draws(lognormal(10, 0.3), 1000), *draws(lognormal(30, 0.3), 2000))
    assert model.median_s() == pytest.approx(30, rel=0.15)


def test_it_learns_for_ever_without_overflow() -> None:
    """Weights grow with every task, and are brought back before they get out of hand."""
    model = LatencyModel()
    for _ in range(150_000):
        model.observe(9.0, 11.0, done=True)
    assert all(math.isfinite(value) for value in model.dump())
    assert model.median_s() < 12


def test_two_looks_at_the_same_moment_teach_nothing() -> None:
    """A clock may stand still."""
    model = LatencyModel()
    model.observe(5.0, 5.0, done=True)
    assert model.dump() == LatencyModel().dump()


@given(age_s=ages, cost_s=prices, max_s=st.floats(0.5, 60))
def test_a_pause_is_positive_and_never_longer_than_allowed(age_s: float, cost_s: float, max_s: float) -> None:
    """Whatever the age."""
    assert 0 < LatencyModel().next_poll_in_s(age_s, cost_s, max_s) <= max_s


@given(age_s=ages, prices_s=st.tuples(prices, prices))
def test_a_dearer_look_comes_later(age_s: float, prices_s: tuple[float, float]) -> None:
    """Pressure, which raises the price, never makes anybody ask sooner."""
    model = LatencyModel()
    cheap, dear = (model.next_poll_in_s(age_s, cost_s, 1000) for cost_s in sorted(prices_s))
    assert cheap <= dear + 1e-3


@given(age_s=st.floats(0, 200), cost_s=prices)
def test_the_look_comes_when_the_expected_waiting_has_reached_its_price(age_s: float, cost_s: float) -> None:
    """Checked against the definition, by adding up P(done) in steps of a hundredth of the pause."""
    model = LatencyModel()
    interval_s = model.next_poll_in_s(age_s, cost_s, 1e6)
    waited_s, unfinished, step_s = 0.0, 1.0, interval_s / 400
    for k in range(400):
        rate = model._hazard(bisect_right(_EDGES, age_s + (k + 0.5) * step_s) - 1)
        after = unfinished * math.exp(-rate * step_s)
        waited_s += step_s * (1 - (unfinished + after) / 2)
        unfinished = after
    assert waited_s == pytest.approx(cost_s, rel=0.03, abs=0.003)


def test_a_curve_can_be_saved_and_restored() -> None:
    """As plain numbers."""
    model = taught(*draws(lognormal(12, 0.4), 100))
    again = LatencyModel.load(model.dump())
    assert len(model.dump()) == 2 * BINS
    assert again.median_s() == pytest.approx(model.median_s())
    assert again.next_poll_in_s(8, 0.3, 15) == pytest.approx(model.next_poll_in_s(8, 0.3, 15))


@pytest.mark.parametrize("numbers", [[], [1.0] * 7, [math.nan] * 2 * BINS, [-1.0] * 2 * BINS, [math.inf] * 2 * BINS])
def test_what_is_no_curve_is_refused(numbers: list[float]) -> None:
    """A file from elsewhere must not make a client look every nanosecond."""
    with pytest.raises(ValueError, match="latency model: expected"):
        LatencyModel.load(numbers)


@pytest.mark.parametrize("draw", [lognormal(20, 0.5), bimodal], ids=["lognormal", "bimodal"])
def test_a_learned_schedule_needs_fewer_looks_than_any_fixed_interval(draw: Draw) -> None:
    """At the same mean delay, the best fixed interval needs at least 1.3 times as many."""
    polls, delays_s = simulate(PollPolicy(), draw, 2500)
    assert fixed_looks(draw, fmean(delays_s), 2500) / fmean(polls) >= 1.3


@pytest.mark.parametrize("draw", [lognormal(20, 0.5), bimodal], ids=["lognormal", "bimodal"])
def test_the_very_first_fifty_tasks_are_no_worse_than_at_the_best_fixed_interval(draw: Draw) -> None:
    """The prior is good enough to begin with."""
    runs = [simulate(PollPolicy(), draw, 50, seed=seed) for seed in range(30)]
    polls, delays_s = (fmean(chain.from_iterable(column)) for column in zip(*runs, strict=True))
    assert fixed_looks(draw, delays_s, 2500) / polls >= 0.9


def test_a_model_has_a_curve_of_its_own() -> None:
    """Quick and slow models do not teach each other."""
    schedule = PollSchedule(PollPolicy())
    for _ in range(200):
        schedule.observe("quick", 4.0, 6.0, done=True)
        schedule.observe("slow", 58.0, 62.0, done=True)
        schedule.observe("slow", 0.0, 58.0, done=False)
    medians_s = schedule.median_latencies_s()
    assert medians_s["quick"] < 7
    assert medians_s["slow"] > 50
    assert schedule.next_poll_in_s("quick", 0.0, 0) < schedule.next_poll_in_s("slow", 0.0, 0)


def test_a_later_client_may_begin_with_what_an_earlier_one_has_learned() -> None:
    """`curves()` goes into `PollPolicy.latency_models`."""
    schedule = PollSchedule(PollPolicy())
    for _ in range(200):
        schedule.observe("quick", 4.0, 6.0, done=True)
    later = PollSchedule(PollPolicy(latency_models=schedule.latency_models()))
    assert later.median_latencies_s() == pytest.approx(schedule.median_latencies_s())


def test_any_number_of_model_names_keeps_a_bounded_number_of_curves() -> None:
    """They may come from a web form."""
    schedule = PollSchedule(PollPolicy())
    for number in range(1000):
        schedule.observe(f"model-{number}", 4.0, 6.0, done=True)
    assert len(schedule.latency_models()) == 64
    assert "model-999" in schedule.latency_models()


@pytest.mark.parametrize("pressure", [1.0, 2.0, 4.0])
def test_pressure_lengthens_learned_pauses_in_proportion(pressure: float) -> None:
    """Where the rate of completion is even; elsewhere roughly."""
    schedule = PollSchedule(PollPolicy(max_interval_s=1000))
    interval_s = schedule.next_poll_in_s(None, 30.0, 1)
    assert schedule.next_poll_in_s(None, 30.0, 1, pressure) == pytest.approx(pressure * interval_s, rel=0.25)


def test_pressure_never_lengthens_a_pause_beyond_the_longest() -> None:
    """Nobody is forgotten."""
    assert PollSchedule(PollPolicy()).next_poll_in_s(None, 30.0, 1, 1e6) == PollPolicy().max_interval_s


def test_a_schedule_laid_down_is_kept_under_pressure() -> None:
    """Who asks for every two seconds gets every two seconds, as far as the requests last."""
    schedule = PollSchedule(PollPolicy.fixed(2.0))
    assert [schedule.next_poll_in_s("m", age_s, polls, 10.0) for age_s, polls in [(0, 0), (2, 1), (4, 2)]] == [
        2.0,
        2.0,
        2.0,
    ]


def test_back_off_grows_to_its_cap() -> None:
    """From the first look on."""
    schedule = PollSchedule(PollPolicy.backoff(first_poll_s=8, initial_s=2, multiplier=2, max_s=10))
    assert [schedule.next_poll_in_s("m", 0.0, polls) for polls in range(5)] == [8.0, 2.0, 4.0, 8.0, 10.0]


@given(seed=st.integers(0, 1000))
def test_after_failures_pauses_double_and_are_left_to_chance_by_half(seed: int) -> None:
    """Up to the longest."""
    policy = PollPolicy()
    schedule = PollSchedule(policy, Random(seed))
    for failures in range(1, 50):
        full_s = min(policy.max_interval_s, policy.min_interval_s * 2**failures)
        assert full_s / 2 <= schedule.backoff_s(failures) <= full_s


def test_the_default_price_is_paid_in_growing_pauses() -> None:
    """From one poll to the next of a task that takes its time, for the reader to see."""
    schedule = PollSchedule(PollPolicy(jitter=0))
    looks_s: list[float] = []
    age_s = 0.0
    while age_s < 60:
        age_s += schedule.next_poll_in_s(None, age_s, len(looks_s))
        looks_s.append(age_s)
    assert looks_s[0] == pytest.approx(7.5, abs=1)
    assert all(2 < later - earlier < 5 for earlier, later in pairwise(looks_s))
