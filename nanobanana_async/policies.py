"""Frozen policy values and their arithmetic. Seconds throughout. No I/O, no clock of their own."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Final, Literal, Self, TypeAlias

import attrs
from attrs.validators import ge, gt, in_, le, lt

ResubmitLevel: TypeAlias = Literal["never", "envelope", "server-errors", "always"]

RESUBMIT_LEVELS: Final[tuple[ResubmitLevel, ...]] = ("never", "envelope", "server-errors", "always")
"""From the safest to the boldest: each level sends again in all cases of the ones before it."""


_DAY_S: Final = 86_400.0


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often something is tried, and which unanswered submits are sent again."""

    attempts: int = attrs.field(default=3, validator=[ge(1), le(10)])
    """Tries in all, the first included."""
    first_s: float = attrs.field(default=0.5, validator=gt(0))
    """Upper bound of the first pause; it doubles with each further one."""
    cap_s: float = attrs.field(default=8.0, validator=gt(0))
    """Upper bound of any pause."""
    resubmit: ResubmitLevel = attrs.field(default="envelope", validator=in_(RESUBMIT_LEVELS))
    """When a submit that may have been paid is sent again.

    `"envelope"`: only after the vendor's own JSON error with a 5xx status, as its documentation advises.
    `"server-errors"`: after any 5xx, gateways included. `"always"`: also after time-outs and lost connections.
    `"never"`: not at all. Requests that provably never arrived are sent again under every setting.
    """

    def pause_s(self, tries: int, rng: Random) -> float:
        """Return the pause after *tries* failed tries: full jitter, uniform in [0, min(cap, first * 2^(tries-1))].

        Source: "Exponential Backoff And Jitter", AWS Architecture Blog; full jitter sends the fewest calls.
        """
        return rng.uniform(0.0, min(self.cap_s, self.first_s * 2.0 ** min(tries - 1, 32)))

    def resends(self, level: ResubmitLevel) -> bool:
        """Tell whether this policy sends again what only *level* and bolder ones would."""
        return RESUBMIT_LEVELS.index(self.resubmit) >= RESUBMIT_LEVELS.index(level)


@attrs.frozen(kw_only=True)
class StaticSchedule:
    """Pauses that do not depend on what was seen: a first one, and then ever longer ones."""

    first_s: float = attrs.field(validator=gt(0))
    pause_s: float = attrs.field(validator=gt(0))
    factor: float = attrs.field(validator=[ge(1), le(10)])


@attrs.frozen(kw_only=True)
class PollPolicy:
    """How often one unfinished task is asked about.

    As it stands, the schedule is learned: how long pictures take is noted for each model, and a task is looked at when
    that is worth a request. Pictures usually take 8 to 60 seconds. `fixed` and `backoff` give schedules that do not
    follow what is learned.
    """

    look_price_s: float = attrs.field(default=0.21, validator=[gt(0), le(_DAY_S)])
    """What one look is worth: it is taken when the seconds that the picture may have been waiting, times the chance
    that it is, add up to this. Four times the price halves the looks and doubles the delay."""
    min_s: float = attrs.field(default=0.5, validator=[gt(0), le(_DAY_S)])
    """Shortest pause between two looks at one task."""
    max_s: float = attrs.field(default=15.0, validator=[gt(0), le(_DAY_S)])
    """Longest pause, whatever was learned. When more looks are due than `Limits.requests_per_s` leaves room for, they
    queue besides, the longest overdue first."""
    jitter: float = attrs.field(default=0.1, validator=[ge(0), lt(1)])
    """Largest deviation as a share of the pause: 0.1 means +/-10 %."""
    curves: Mapping[str, Sequence[float]] = attrs.field(factory=dict, repr=False)
    """What an earlier client has learned, by model: `client.statistics().curves`. None of it has to be there."""
    ladder: StaticSchedule | None = None
    """Pauses that are not learned; see `fixed` and `backoff`."""

    @max_s.validator
    def _check_max(self, _: object, value: float) -> None:
        if value < self.min_s:
            raise ValueError(f"max_s: must not be less than min_s ({self.min_s:g}), got {value:g}")

    @classmethod
    def fixed(cls, pause_s: float, *, jitter: float = 0.1) -> Self:
        """Return a policy that looks every *pause_s* seconds, the first time so long after the submit."""
        return cls.backoff(first_s=pause_s, pause_s=pause_s, factor=1.0, cap_s=pause_s, jitter=jitter)

    @classmethod
    def backoff(
        cls,
        *,
        first_s: float = 8.0,
        pause_s: float = 2.5,
        factor: float = 1.3,
        cap_s: float = 10.0,
        jitter: float = 0.2,
    ) -> Self:
        """Return a policy whose first look comes *first_s* after the submit.

        The pauses after it start at *pause_s*, grow by *factor* and end at *cap_s*.
        """
        ladder = StaticSchedule(first_s=first_s, pause_s=pause_s, factor=factor)
        return cls(min_s=min(pause_s, cap_s), max_s=cap_s, jitter=jitter, ladder=ladder)


@attrs.frozen(kw_only=True)
class Limits:
    """How much is on the wire at once, and how fast it goes out."""

    submits: int = attrs.field(default=16, validator=ge(1))
    """Submits in flight. Each may carry up to four reference images."""
    polls: int = attrs.field(default=64, validator=ge(1))
    """Queries in flight, whatever the number of tasks."""
    downloads: int = attrs.field(default=16, validator=ge(1))
    """Pictures on their way to memory or disk."""
    requests_per_s: float = attrs.field(default=300.0, validator=gt(0))
    """API requests (submits and queries together) per second, averaged."""
    burst: int = attrs.field(default=30, validator=ge(1))
    """API requests that may leave at once after a quiet time."""
    image_bytes: int = attrs.field(default=50 * 2**20, validator=ge(1))
    """Largest picture that is downloaded."""
    reference_bytes: int = attrs.field(default=10 * 2**20, validator=ge(1))
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
    """One picture, its retries included, counted from its turn (`Limits.downloads`)."""
    task_s: float = attrs.field(default=900.0, validator=gt(0))
    """How long `generate`, `result`, `wait` and `updates` wait when they are not told, and how long a submit may wait
    for its turn. Minutes are possible."""
    recovery_s: float = attrs.field(default=600.0, validator=ge(0))
    """How long a submit with a callback waits for one when its own answer was lost: it may tell the task id."""
    close_s: float = attrs.field(default=10.0, validator=gt(0))
    """How long `aclose` spends on saying goodbye, beyond what a submit on the wire still needs."""
