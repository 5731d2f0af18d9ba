"""Polls per image against notice delay: the learned schedule, fixed intervals and backoff.

    python -m benchmarks.schedule [--tasks 4000] [--plot benchmarks/schedule.svg]

Pure arithmetic over the tracker's schedule, 200 tasks at a time, from a cold start. "x fixed" is the number of requests
of the best fixed interval with the same mean delay, relative to the schedule. Two schedules know the latencies: one
polls whenever P(done) has grown by a fifth. The other is the optimum, found by dynamic programming over polls at
multiples of 0.1 s.
"""

import argparse
import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Final

import attrs

from nanobanana_async import PollPolicy
from tests.latency_samples import Draw, bimodal, lognormal, simulate

GRAIN_S: Final = 0.1
COSTS_S: Final = (0.05, 0.1, 0.21, 0.5, 1.0, 2.0)
INTERVALS_S: Final = tuple(0.25 * 1.25**k for k in range(24))


LATENCIES: Final = {"lognormal, median 20 s": lognormal(20, 0.5), "bimodal, 12 s and 60 s": bimodal}


@attrs.frozen
class Outcome:
    """The result of a schedule."""

    polls: float
    mean_s: float
    p95_s: float

    @classmethod
    def of(cls, polls: Sequence[int], delays_s: Sequence[float]) -> "Outcome":
        """Summarize one run."""
        return cls(statistics.fmean(polls), statistics.fmean(delays_s), sorted(delays_s)[int(0.95 * len(delays_s))])


def run(policy: PollPolicy, draw: Draw, tasks: int, *, seed: int = 1) -> Outcome:
    """Simulate *tasks* tasks, 200 at a time."""
    return Outcome.of(*simulate(policy, draw, tasks, seed=seed))


def known(draw: Draw) -> list[float]:
    """Return the share of tasks that are finished, at multiples of `GRAIN_S`."""
    rng = Random(9)
    sample = sorted(draw(rng) for _ in range(20_000))
    return [bisect_left(sample, k * GRAIN_S) / len(sample) for k in range(int(sample[-1] / GRAIN_S) + 2)]


def score(polls_at_s: Sequence[float], draw: Draw) -> Outcome:
    """Return the result of polls at the same ages of every task."""
    rng = Random(5)
    ages = [draw(rng) for _ in range(20_000)]
    index = [min(bisect_left(polls_at_s, age), len(polls_at_s) - 1) for age in ages]
    return Outcome.of([i + 1 for i in index], [polls_at_s[i] - age for i, age in zip(index, ages, strict=True)])


def optimum(draw: Draw, cost_s: float) -> Outcome:
    """Return the schedule with the least cost * polls + delay for known latencies."""
    done = known(draw)
    size, reach = len(done), int(PollPolicy().max_interval_s / GRAIN_S)
    done += [1.0] * reach
    summed = [0.0]
    for share in done:
        summed.append(summed[-1] + share * GRAIN_S)
    cost, following = [0.0] * (size + reach), [0] * size
    for k in range(size - 1, -1, -1):
        cost[k], following[k] = min(
            (cost_s * (1 - done[k]) + summed[j] - summed[k] - done[k] * (j - k) * GRAIN_S + cost[j], j)
            for j in range(k + 1, k + reach)
        )
    polls_at_s, k = [], 0
    while k < size:
        k = following[k]
        polls_at_s.append(k * GRAIN_S)
    return score(polls_at_s, draw)


def by_share(draw: Draw, share: float) -> Outcome:
    """Return the schedule that polls whenever *share* of the unfinished tasks should be finished."""
    done = known(draw)
    reach = int(PollPolicy().max_interval_s / GRAIN_S)
    polls_at_s, k = [], 0
    while k < len(done):
        k = min(max(bisect_left(done, done[k] + share * (1 - done[k])), k + 5), k + reach)
        polls_at_s.append(k * GRAIN_S)
    return score(polls_at_s, draw)


def fixed_polls(model: Sequence[Outcome], mean_s: float) -> float:
    """Return the polls of the fixed interval with that mean delay, interpolated on logarithmic scales."""
    for one, other in pairwise(model):
        if one.mean_s <= mean_s <= other.mean_s:
            share = math.log(mean_s / one.mean_s) / math.log(other.mean_s / one.mean_s)
            return math.exp((1 - share) * math.log(one.polls) + share * math.log(other.polls))
    raise ValueError(f"no fixed interval was measured near a mean delay of {mean_s:.2f} s")


def first_fifty(draw: Draw, model: Sequence[Outcome]) -> float:
    """Return the relative number of requests of the best fixed interval for the first fifty tasks."""
    runs = [run(PollPolicy(), draw, 50, seed=seed) for seed in range(100, 200)]
    mean_s = statistics.fmean(run.mean_s for run in runs)
    return fixed_polls(model, mean_s) / statistics.fmean(run.polls for run in runs)


def plot(points: dict[str, dict[str, list[Outcome]]], file: Path) -> None:
    """Plot polls against delay, one panel per distribution."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "nanobanana"  # the same file each time
    import matplotlib.pyplot as plt

    styles = {"fixed": "o-", "backoff": "s", "learned": "D-", "optimum": "--"}
    colours = {"fixed": "#8a8f98", "backoff": "#c2762b", "learned": "#1769aa", "optimum": "#3c9d5b"}
    figure, panels = plt.subplots(1, len(points), figsize=(10, 4.2), sharey=True)
    for panel, (name, series) in zip(panels, points.items(), strict=True):
        for label, outcomes in series.items():
            ordered = sorted(outcomes, key=lambda outcome: outcome.mean_s)
            x, y = [o.mean_s for o in ordered], [o.polls for o in ordered]
            panel.plot(x, y, styles[label], label=label, color=colours[label], markersize=4)
        panel.set(xscale="log", yscale="log", xlim=(0.4, 6), ylim=(2, 30), xlabel="mean notice delay, s", title=name)
        panel.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
        panel.set_yticks([2, 3, 5, 10, 20, 30], ["2", "3", "5", "10", "20", "30"])
        panel.minorticks_off()
        panel.grid(color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("polls per image")
    panels[-1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=4000)
    parser.add_argument("--plot", type=Path, help="an SVG to write; needs the extra `bench`")
    options = parser.parse_args()
    points: dict[str, dict[str, list[Outcome]]] = {}
    for name, draw in LATENCIES.items():
        print(f"\n{name:24} {'polls':>6} {'mean s':>7} {'p95 s':>6} {'x fixed':>8}")
        fixed = [run(PollPolicy.fixed(s, jitter=0), draw, options.tasks) for s in INTERVALS_S]

        def show(label: str, outcome: Outcome, curve: Sequence[Outcome] = fixed) -> None:
            ratio = fixed_polls(curve, outcome.mean_s) / outcome.polls
            print(f"{label:24} {outcome.polls:6.2f} {outcome.mean_s:7.2f} {outcome.p95_s:6.2f} {ratio:7.2f}x")

        for interval_s in (1.0, 2.0, 5.0):
            show(f"fixed {interval_s:g} s", run(PollPolicy.fixed(interval_s, jitter=0), draw, options.tasks))
        backoff = run(PollPolicy.backoff(), draw, options.tasks)
        show("backoff 8, 2.5 x 1.3", backoff)
        learned = [run(PollPolicy(poll_cost_s=p), draw, options.tasks) for p in COSTS_S]
        for cost_s, outcome in zip(COSTS_S, learned, strict=True):
            default = " (default)" if cost_s == PollPolicy().poll_cost_s else ""
            show(f"learned {cost_s:g} s{default}", outcome)
        show("P(done) + 0.2 (known)", by_share(draw, 0.2))
        best = [optimum(draw, cost_s) for cost_s in COSTS_S]
        show("optimum (known)", best[2])
        print(f"the first 50 tasks: {first_fifty(draw, fixed):.2f}x fixed")
        points[name] = {"fixed": fixed, "backoff": [backoff], "learned": learned, "optimum": best}
    if options.plot:
        plot(points, options.plot)


if __name__ == "__main__":
    main()
