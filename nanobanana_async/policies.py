"""Frozen policy values and their arithmetic. Seconds throughout. No I/O, no clock of their own."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Final, Literal, Self, TypeAlias

import attrs
from attrs.validators import ge, gt, in_, le, lt

ResubmitLevel: TypeAlias = Literal["never", "api-5xx", "any-5xx", "always"]

RESUBMIT_LEVELS: Final[tuple[ResubmitLevel, ...]] = ("never", "api-5xx", "any-5xx", "always")
"""From the safest to the boldest: each level sends again in all cases of the ones before it."""


_DAY_S: Final = 86_400.0


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often something is tried, and which unanswered submits are sent again."""

    attempts: int = attrs.field(default=3, validator=[ge(1), le(10)])
    """Tries in all, the first included."""
    initial_s: float = attrs.field(default=0.5, validator=gt(0))
    """Upper bound of the first pause; it doubles with each further one."""
    max_s: float = attrs.field(default=8.0, validator=gt(0))
    """Upper bound of any pause."""
    resubmit: ResubmitLevel = attrs.field(default="api-5xx", validator=in_(RESUBMIT_LEVELS))
    """When a submit that may have been paid is sent again.

    `"api-5xx"`: only after the vendor's own JSON error with a 5xx status, as its documentation advises.
    `"any-5xx"`: after any 5xx, gateways included. `"always"`: also after time-outs and lost connections.
    `"never"`: not at all. Requests that provably never arrived are sent again under every setting.
    """

    def backoff_s(self, attempts: int, rng: Random) -> float:
        """Return the pause after *tries* failed tries: full jitter, uniform in [0, min(cap, first * 2^(tries-1))].

        Source: "Exponential Backoff And Jitter", AWS Architecture Blog; full jitter sends the fewest calls.
        """
        return rng.uniform(0.0, min(self.max_s, self.initial_s * 2.0 ** min(attempts - 1, 32)))

    def allows_resubmit(self, level: ResubmitLevel) -> bool:
        """Tell whether this policy sends again what only *level* and bolder ones would."""
        return RESUBMIT_LEVELS.index(self.resubmit) >= RESUBMIT_LEVELS.index(level)


@attrs.frozen(kw_only=True)
class StaticSchedule:
    """Pauses that do not depend on what was seen: a first one, and then ever longer ones."""

    first_poll_s: float = attrs.field(validator=gt(0))
    initial_s: float = attrs.field(validator=gt(0))
    multiplier: float = attrs.field(validator=[ge(1), le(10)])


@attrs.frozen(kw_only=True)
class PollPolicy:
    """How often one unfinished task is asked about.

    As it stands, the schedule is learned: how long pictures take is noted for each model, and a task is looked at when
    that is worth a request. Pictures usually take 8 to 60 seconds. `fixed` and `backoff` give schedules that do not
    follow what is learned.
    """

    poll_cost_s: float = attrs.field(default=0.21, validator=[gt(0), le(_DAY_S)])
    """What one look is worth: it is taken when the seconds that the picture may have been waiting, times the chance
    that it is, add up to this. Four times the price halves the looks and doubles the delay."""
    min_interval_s: float = attrs.field(default=0.5, validator=[gt(0), le(_DAY_S)])
    """Shortest pause between two looks at one task."""
    max_interval_s: float = attrs.field(default=15.0, validator=[gt(0), le(_DAY_S)])
    """Longest pause, whatever was learned. When more looks are due than `Limits.requests_per_s` leaves room for, they
    queue besides, the longest overdue first."""
    jitter: float = attrs.field(default=0.1, validator=[ge(0), lt(1)])
    """Largest deviation as a share of the pause: 0.1 means +/-10 %."""
    latency_models: Mapping[str, Sequence[float]] = attrs.field(factory=dict, repr=False)
    """What an earlier client has learned, by model: `client.statistics().curves`. None of it has to be there."""
    static_schedule: StaticSchedule | None = None
    """Pauses that are not learned; see `fixed` and `backoff`."""

    @max_interval_s.validator
    def _check_max(self, _: object, value: float) -> None:
        if value < self.min_interval_s:
            raise ValueError(
                f"max_interval_s: must not be less than min_interval_s ({self.min_interval_s:g}), got {value:g}"
            )

    @classmethod
    def fixed(cls, interval_s: float, *, jitter: float = 0.1) -> Self:
        """Return a policy that looks every *pause_s* seconds, the first time so long after the submit."""
        return cls.backoff(
            first_poll_s=interval_s, initial_s=interval_s, multiplier=1.0, max_s=interval_s, jitter=jitter
        )

    @classmethod
    def backoff(
        cls,
        *,
        first_poll_s: float = 8.0,
        initial_s: float = 2.5,
        multiplier: float = 1.3,
        max_s: float = 10.0,
        jitter: float = 0.2,
    ) -> Self:
        """Return a policy whose first look comes *first_s* after the submit.

        The pauses after it start at *pause_s*, grow by *factor* and end at *cap_s*.
        """
        schedule = StaticSchedule(first_poll_s=first_poll_s, initial_s=initial_s, multiplier=multiplier)
        return cls(min_interval_s=min(initial_s, max_s), max_interval_s=max_s, jitter=jitter, static_schedule=schedule)


@attrs.frozen(kw_only=True)
class Limits:
    """How much is on the wire at once, and how fast it goes out."""

    max_submits: int = attrs.field(default=16, validator=ge(1))
    """Submits in flight. Each may carry up to four reference images."""
    max_polls: int = attrs.field(default=64, validator=ge(1))
    """Queries in flight, whatever the number of tasks."""
    max_downloads: int = attrs.field(default=16, validator=ge(1))
    """Pictures on their way to memory or disk."""
    requests_per_s: float = attrs.field(default=300.0, validator=gt(0))
    """API requests (submits and queries together) per second, averaged."""
    burst: int = attrs.field(default=30, validator=ge(1))
    """API requests that may leave at once after a quiet time."""
    max_image_bytes: int = attrs.field(default=50 * 2**20, validator=ge(1))
    """Largest picture that is downloaded."""
    max_reference_bytes: int = attrs.field(default=10 * 2**20, validator=ge(1))
    """Largest reference image that is sent (other clients of the service keep to 10 MB)."""


@attrs.frozen(kw_only=True)
class Timeouts:
    """How long things may take. None of them is infinite."""

    connect_s: float = attrs.field(default=10.0, validator=gt(0))
    submit_s: float = attrs.field(default=60.0, validator=gt(0))
    """One submit, its safe retries included, counted from when it may go out. An upload of four large reference
    images has to fit in it."""
    query_s: float = attrs.field(default=20.0, validator=gt(0))
    """One query or balance call, its retries included."""
    download_s: float = attrs.field(default=120.0, validator=gt(0))
    """One picture, its retries included, counted from its turn (`Limits.max_downloads`)."""
    task_s: float = attrs.field(default=900.0, validator=gt(0))
    """How long `generate`, `result`, `wait` and `updates` wait when they are not told, and how long a submit may wait
    for its turn. Minutes are possible."""
    recovery_s: float = attrs.field(default=600.0, validator=ge(0))
    """How long a submit with a callback waits for one when its own answer was lost: it may tell the task id."""
    close_s: float = attrs.field(default=10.0, validator=gt(0))
    """How long `aclose` spends on saying goodbye, beyond what a submit on the wire still needs."""
