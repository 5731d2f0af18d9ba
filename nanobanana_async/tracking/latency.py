"""`LatencyModel`: learned latencies of tasks, and when polling an unfinished one is worth a request. Pure.

The method. Time since the submit is divided into bins, and each bin has a hazard: events over time at risk, as in a
life table. Every poll adds an observation. Polls only bracket the end of a task. A task that ended between two polls is
spread over the bins between them in proportion to the expectation (one step of Turnbull's self-consistency, JRSS B
1976). An unfinished task counts as time at risk, so tasks that are given up early, and slow ones still running, do not
bias the rest. A gamma prior per bin (pseudo-events over pseudo-time, the conjugate of a constant rate) is used until
there are data, and older observations decay.

When to poll: when the expected delay that a poll can end has reached the cost of a poll. That is the least t with
integral from a to t of P(done by s | unfinished at a) ds = cost. For a constant hazard h it is an interval of sqrt(2
cost / h), the law of optimum checking schedules (Keller, Management Science 21, 1974; Barlow, Hunter and Proschan, J.
SIAM 11, 1963), which needs the fewest polls for a given mean delay. The obvious rule, polling whenever P(done) has
grown by a fixed share, is as good for latencies with one peak, and needs a tenth more polls for two peaks
(`benchmarks/schedule.py`).
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, Self

_GROWTH: Final = 1.15
"""Ratio of the widths of neighbouring bins. Later bins can be wider."""
_FIRST_EDGE_S: Final = 1.0
_LAST_EDGE_S: Final = 1800.0
_EDGES: Final = (
    0.0,
    *(_FIRST_EDGE_S * _GROWTH**k for k in range(math.ceil(math.log(_LAST_EDGE_S / _FIRST_EDGE_S, _GROWTH)) + 1)),
    math.inf,
)
BINS: Final = len(_EDGES) - 1

# The prior: public clients report that 8 to 60 seconds are usual and minutes possible.
PRIOR_MEDIAN_S: Final = 20.0
_PRIOR_SIGMA: Final = 0.8
_PRIOR_TASKS: Final = 4.0
"""Weight of the prior, in observed tasks."""
_DECAY_TASKS: Final = 512.0
"""Number of later tasks after which an observation has decayed to 1/e."""


def _prior() -> tuple[tuple[float, ...], tuple[float, ...]]:
    def unfinished(age_s: float) -> float:
        return 0.5 * math.erfc(math.log(age_s / PRIOR_MEDIAN_S) / _PRIOR_SIGMA / math.sqrt(2)) if age_s else 1.0

    events: list[float] = []
    at_risk_s: list[float] = []
    for start_s, end_s in pairwise(_EDGES[:-1]):
        before, after = unfinished(start_s), unfinished(end_s)
        events.append(_PRIOR_TASKS * (before - after))
        at_risk_s.append(_PRIOR_TASKS * (before + after) / 2 * (end_s - start_s))
    # Beyond the last edge the last bin continues: a hazard of zero would mean certainty.
    return (*events, events[-1]), (*at_risk_s, at_risk_s[-1])


_PRIOR_EVENTS, _PRIOR_AT_RISK_S = _prior()


class LatencyModel:
    """Learns from polls. Each poll updates a few bins."""

    def __init__(self) -> None:
        self._events = [0.0] * BINS
        self._at_risk_s = [0.0] * BINS
        self._observation_weight = 1.0
        """Weight of the next observation. Raising it decays all earlier ones at once."""
        self._slow_s: float | None = None

    def next_poll_in_s(self, age_s: float, cost_s: float, max_s: float) -> float:
        """Return the seconds until polling a task unfinished at *age_s* is worth *cost_s*; at most *max_s*."""
        unfinished, waited_s = 1.0, 0.0
        for k, start_s, end_s in _bins(age_s, age_s + max_s):
            rate, length_s = self._hazard(k), end_s - start_s
            after = unfinished * math.exp(-rate * length_s)
            waits_s = length_s - (unfinished - after) / rate
            if waited_s + waits_s >= cost_s:
                return start_s - age_s + _solve_delay(rate, unfinished, cost_s - waited_s, length_s)
            unfinished, waited_s = after, waited_s + waits_s
        return max_s

    def observe(self, since_s: float, age_s: float, *, done: bool) -> None:
        """Record that a task unfinished at *since_s* was polled at *age_s*, and whether it was finished by then."""
        if done:
            self._distribute_event(list(_bins(since_s, age_s)))
            self._decay()
        else:
            for k, start_s, end_s in _bins(since_s, age_s):
                self._at_risk_s[k] += self._observation_weight * (end_s - start_s)

    def median_s(self) -> float:
        """Return the age at which half of the tasks are finished."""
        return self.left_s(0.0, 0.5)

    def slow_s(self) -> float:
        """Return the age at which all but one in a thousand tasks are finished. Recomputed after each completion."""
        if self._slow_s is None:
            self._slow_s = self.left_s(0.0, 0.999)
        return self._slow_s

    def left_s(self, age_s: float, share: float) -> float:
        """Return the seconds until *share* of the tasks that are unfinished at *age_s* are finished."""
        left = -math.log1p(-share)
        for k, start_s, end_s in _bins(age_s, math.inf):
            rate = self._hazard(k)
            if left <= rate * (end_s - start_s):
                return start_s + left / rate - age_s
            left -= rate * (end_s - start_s)
        raise AssertionError("the last bin has no end")

    def seed(self) -> "LatencyModel":
        """Return a model that begins with the distribution of this one, with the weight of the prior."""
        total = math.fsum(self._events) / self._observation_weight
        share = min(1.0, _PRIOR_TASKS / total) if total else 1.0
        return self.load([value * share for value in self.dump()])

    def dump(self) -> tuple[float, ...]:
        """Return the observations as `2 * BINS` numbers."""
        return tuple(value / self._observation_weight for value in (*self._events, *self._at_risk_s))

    @classmethod
    def load(cls, numbers: Sequence[float]) -> Self:
        """Return the model that `dump` described.

        Raises:
            ValueError: The numbers do not describe a model.
        """
        if len(numbers) != 2 * BINS or not all(math.isfinite(value) and value >= 0 for value in numbers):
            raise ValueError(f"latency model: expected {2 * BINS} finite numbers >= 0")
        model = cls()
        model._events, model._at_risk_s = list(numbers[:BINS]), list(numbers[BINS:])
        return model

    def _hazard(self, k: int) -> float:
        """Return the completions per second at risk in bin *k*; never zero."""
        events = _PRIOR_EVENTS[k] * self._observation_weight + self._events[k]
        return (events / (_PRIOR_AT_RISK_S[k] * self._observation_weight + self._at_risk_s[k])) or 1e-12

    def _distribute_event(self, bins: list[tuple[int, float, float]]) -> None:
        """Distribute one completion over *bins*, in proportion to the expectation."""
        chances: list[float] = []
        unfinished = 1.0
        for k, start_s, end_s in bins:
            after = unfinished * math.exp(-self._hazard(k) * (end_s - start_s))
            chances.append(unfinished - after)
            unfinished = after
        total = math.fsum(chances)
        if not total:
            return  # two polls at the same time
        left = 1.0
        for (k, start_s, end_s), chance in zip(bins, chances, strict=True):
            share = chance / total
            self._events[k] += self._observation_weight * share
            self._at_risk_s[k] += self._observation_weight * (end_s - start_s) * (left - share / 2)
            left -= share

    def _decay(self) -> None:
        self._slow_s = None
        self._observation_weight *= 1 + 1 / _DECAY_TASKS
        if self._observation_weight > 1e100:
            self._events = [value / self._observation_weight for value in self._events]
            self._at_risk_s = [value / self._observation_weight for value in self._at_risk_s]
            self._observation_weight = 1.0


def _bins(start_s: float, end_s: float) -> Iterator[tuple[int, float, float]]:
    """Yield the parts of the time from *start_s* to *end_s*, each with the number of its bin."""
    k = bisect_right(_EDGES, start_s) - 1
    while start_s < end_s:
        stop_s = min(_EDGES[k + 1], end_s)
        yield k, start_s, stop_s
        start_s, k = stop_s, k + 1


def _solve_delay(rate: float, unfinished: float, waits_s: float, length_s: float) -> float:
    """Return the t in [0, *length_s*] with  t - unfinished * (1 - exp(-rate t)) / rate = *waits_s*.

    The left side is convex and increasing, so Newton's method from the right end does not overshoot.
    """
    time_s = length_s
    for _ in range(8):
        left = math.exp(-rate * time_s)
        slope = 1 - unfinished * left
        if slope < 1e-9:
            break
        step_s = (time_s - unfinished * (1 - left) / rate - waits_s) / slope
        time_s -= step_s
        if abs(step_s) < 1e-3:
            break
    return min(max(time_s, 0.0), length_s)
