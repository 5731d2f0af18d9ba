"""Simulate many tasks against a schedule without a clock: number of polls and delay."""

import heapq
import math
import statistics
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from random import Random
from typing import TypeAlias

from nanobanana_async import PollPolicy
from nanobanana_async.tracking.schedule import PollSchedule

Draw: TypeAlias = Callable[[Random], float]


@cache
def lognormal(median_s: float, sigma: float) -> Draw:
    """Return draws from a distribution with one peak."""
    return lambda rng: median_s * math.exp(sigma * rng.gauss(0, 1))


def bimodal(rng: Random) -> float:
    """Return one draw from a distribution with two peaks."""
    return lognormal(12, 0.2)(rng) if rng.random() < 0.7 else lognormal(60, 0.25)(rng)


def simulate(policy: PollPolicy, draw: Draw, tasks: int, *, seed: int = 1) -> tuple[list[int], list[float]]:
    """Return the polls of each task and its delay in seconds, with up to 200 concurrent tasks."""
    rng, schedule = Random(seed), PollSchedule(policy, Random(seed + 1))
    polls: list[int] = []
    delays_s: list[float] = []
    started = 0
    due: list[tuple[float, int, float, float, float, int]] = []

    def start(now_s: float) -> None:
        nonlocal started
        interval_s = schedule.jittered_s(schedule.next_poll_in_s("m", 0.0, 0))
        heapq.heappush(due, (now_s + interval_s, started, now_s, draw(rng), 0.0, 0))
        started += 1

    for number in range(min(200, tasks)):
        start(number * 0.02)
    while due:
        now_s, number, submitted_at_s, latency_s, last_s, taken = heapq.heappop(due)
        age_s = now_s - submitted_at_s
        schedule.observe("m", last_s, age_s, done=age_s >= latency_s)
        if age_s < latency_s:
            interval_s = schedule.jittered_s(schedule.next_poll_in_s("m", age_s, taken + 1))
            heapq.heappush(due, (now_s + interval_s, number, submitted_at_s, latency_s, age_s, taken + 1))
            continue
        polls.append(taken + 1)
        delays_s.append(age_s - latency_s)
        if started < tasks:
            start(now_s)
    return polls, delays_s


@cache
def _fixed(draw: Draw, tasks: int) -> list[tuple[float, float]]:
    rng = Random(1)
    ages_s = [draw(rng) for _ in range(tasks)]
    model = []
    for k in range(12):
        interval_s = 1.25**k
        polls = [math.ceil(age_s / interval_s) for age_s in ages_s]
        late_s = [n * interval_s - age_s for n, age_s in zip(polls, ages_s, strict=True)]
        model.append((statistics.fmean(polls), statistics.fmean(late_s)))
    return model


def fixed_polls(draw: Draw, mean_s: float, tasks: int) -> float:
    """Return the polls per task of the fixed interval with that mean delay."""
    for (polls, late_s), (fewer, later_s) in pairwise(_fixed(draw, tasks)):
        if late_s <= mean_s <= later_s:
            share = math.log(mean_s / late_s) / math.log(later_s / late_s)
            return math.exp((1 - share) * math.log(polls) + share * math.log(fewer))
    raise AssertionError(f"no fixed interval was tried near a mean delay of {mean_s:.2f} s")
