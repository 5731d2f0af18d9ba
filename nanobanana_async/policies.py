"""Frozen policies and their arithmetic. All times are seconds. No I/O and no clock."""

import enum
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from random import Random
from typing import Final, Literal, Self, TypeAlias

import attrs
from attrs.validators import ge, gt, in_, le, lt, optional

from nanobanana_async.models import ReasonKind, Task

ResubmitLevel: TypeAlias = Literal["never", "api-5xx", "any-5xx", "always"]

RESUBMIT_LEVELS: Final[tuple[ResubmitLevel, ...]] = ("never", "api-5xx", "any-5xx", "always")
"""Values of `RetryPolicy.resubmit`, from the safest up. Each level includes the cases of the ones before it."""


_DAY_S: Final = 86_400.0


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """Retry limits, and when a submit with an unknown outcome may be resubmitted.

    Attributes:
        attempts: Number of attempts, including the first.
        initial_s: Upper bound of the first wait. It doubles with each further wait.
        max_s: Upper bound of every wait.
        resubmit: When a submit that may have been charged is sent again. `"never"`: not at all. `"api-5xx"`:
            after the service's own JSON error with a 5xx status, as its documentation advises, and once after a
            408, 421 or 425 without such a body. `"any-5xx"`: after any 5xx, also from a gateway. `"always"`:
            also after timeouts and lost connections. Requests that did not reach the service are retried under
            every level.
    """

    attempts: int = attrs.field(default=3, validator=[ge(1), le(10)])
    initial_s: float = attrs.field(default=0.5, validator=gt(0))
    max_s: float = attrs.field(default=8.0, validator=gt(0))
    resubmit: ResubmitLevel = attrs.field(default="api-5xx", validator=in_(RESUBMIT_LEVELS))

    def backoff_s(self, attempts: int, rng: Random) -> float:
        """Return the wait after *attempts* failed attempts: uniform in [0, min(max_s, initial_s * 2^(attempts-1))].

        Source: "Exponential Backoff And Jitter", AWS Architecture Blog. Full jitter needs the fewest calls.
        """
        return rng.uniform(0.0, min(self.max_s, self.initial_s * 2.0 ** min(attempts - 1, 32)))

    def allows_resubmit(self, level: ResubmitLevel) -> bool:
        """Return whether this policy resubmits in the cases of *level*."""
        return RESUBMIT_LEVELS.index(self.resubmit) >= RESUBMIT_LEVELS.index(level)


class RegenerateOn(enum.StrEnum):
    """An end of a task after which another one may be submitted.

    Attributes:
        EMPTY: It succeeded and has no image.
        ERROR: It failed, and the service says that the error is its own.
        WRONG_SIZE: Its image has not the requested `image_size`.
    """

    EMPTY = "empty"
    ERROR = "error"
    WRONG_SIZE = "wrong-size"


def _to_ends(ends: Iterable[RegenerateOn | str]) -> frozenset[RegenerateOn]:
    return frozenset(map(RegenerateOn, ends))


@attrs.frozen(kw_only=True)
class RegeneratePolicy:
    """When a request is submitted again after its task has ended. Each such submit is charged again.

    It applies to `generate`, `generate_many` and batches, and not to `submit` and `stream`, which show each task.
    A refused prompt is not submitted again, nor a task that failed for an unknown reason.

    Attributes:
        attempts: Further submits of one request at most. The default, 0, charges nothing twice.
        on: The ends after which a request is submitted again.
        classify: Returns why a final task without an image has none; None uses `classify_reason`, which goes by the
            words of the service. It also sets `reason_kind` of errors.
    """

    attempts: int = attrs.field(default=0, validator=[ge(0), le(10)])
    on: frozenset[RegenerateOn] = attrs.field(default=frozenset(RegenerateOn), converter=_to_ends)
    classify: Callable[[Task], ReasonKind] | None = None

    def applies_to(self, kind: ReasonKind) -> bool:
        """Return whether a request is submitted again after a task that has no image for a reason of this *kind*."""
        ends = {ReasonKind.EMPTY: RegenerateOn.EMPTY, ReasonKind.ERROR: RegenerateOn.ERROR}
        return ends.get(kind) in self.on


@attrs.frozen(kw_only=True)
class StaticSchedule:
    """Poll intervals that do not depend on observed latencies: an initial one, then longer ones."""

    first_poll_s: float = attrs.field(validator=gt(0))
    initial_s: float = attrs.field(validator=gt(0))
    multiplier: float = attrs.field(validator=[ge(1), le(10)])


def _ge_min_interval(policy: "PollPolicy", _: object, value: float) -> None:
    if value < policy.min_interval_s:
        raise ValueError(f"max_interval_s: expected at least min_interval_s ({policy.min_interval_s:g}), got {value:g}")


@attrs.frozen(kw_only=True)
class PollPolicy:
    """How often one unfinished task is polled.

    By default the schedule is learned. The client observes the latency of each model and polls a task when the
    expected delay that a poll can avoid exceeds the cost of one request. Most images take 8 to 60 seconds. `fixed`
    and `backoff` return policies with intervals that are not learned.

    Attributes:
        poll_cost_s: Cost of one poll, in seconds of expected delay. A task is polled when its expected delay
            since the last poll reaches this value. Quadrupling it halves the polls and doubles the delay.
        min_interval_s: Shortest time between two polls of one task.
        max_interval_s: Longest time between two polls of one task. If more polls are due than
            `Limits.requests_per_s` allows, they also wait in a queue, the most overdue first.
        jitter: Largest relative deviation of an interval: 0.1 means +/-10 %.
        latency_models: Latency models of an earlier client, by model and image size, from
            `client.statistics().latency_models`. May be empty.
        static_schedule: Intervals that are not learned; see `fixed` and `backoff`. None selects the learned
            schedule.
    """

    poll_cost_s: float = attrs.field(default=0.21, validator=[gt(0), le(_DAY_S)])
    min_interval_s: float = attrs.field(default=0.5, validator=[gt(0), le(_DAY_S)])
    max_interval_s: float = attrs.field(default=15.0, validator=[gt(0), le(_DAY_S), _ge_min_interval])
    jitter: float = attrs.field(default=0.1, validator=[ge(0), lt(1)])
    latency_models: Mapping[str, Sequence[float]] = attrs.field(factory=dict[str, Sequence[float]], repr=False)
    static_schedule: StaticSchedule | None = None

    @classmethod
    def fixed(cls, interval_s: float, *, jitter: float = 0.1) -> Self:
        """Return a policy that polls every *interval_s* seconds, first one interval after the submit."""
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
        """Return a policy whose first poll comes *first_poll_s* after the submit.

        Later intervals start at *initial_s*, are multiplied by *multiplier* each time, and never exceed *max_s*.
        """
        schedule = StaticSchedule(first_poll_s=first_poll_s, initial_s=initial_s, multiplier=multiplier)
        return cls(min_interval_s=min(initial_s, max_s), max_interval_s=max_s, jitter=jitter, static_schedule=schedule)


@attrs.frozen(kw_only=True)
class Limits:
    """How many requests may be in flight, and at which rate they may be sent.

    Attributes:
        max_submits: Submits in flight at most. The client begins with 32 and adapts to the service.
        max_polls: Queries in flight, for any number of tasks.
        max_upload_bytes: Bodies of the submits in flight, with their reference images, together. A larger one is sent
            alone.
        max_downloads: Downloads in flight.
        requests_per_s: API requests per second on average, submits and queries together.
        burst: API requests that may be sent at once after an idle period.
        max_image_bytes: Largest image that is downloaded.
        max_download_bytes: Images that are downloaded and not yet stored, and responses with inline images,
            together. A larger one is received alone.
    """

    max_submits: int = attrs.field(default=256, validator=ge(1))
    max_polls: int = attrs.field(default=64, validator=ge(1))
    max_upload_bytes: int = attrs.field(default=256 * 2**20, validator=ge(1))
    max_downloads: int = attrs.field(default=64, validator=ge(1))
    requests_per_s: float = attrs.field(default=300.0, validator=gt(0))
    burst: int = attrs.field(default=30, validator=ge(1))
    max_image_bytes: int = attrs.field(default=64 * 2**20, validator=ge(1))
    max_download_bytes: int = attrs.field(default=256 * 2**20, validator=ge(1))


@attrs.frozen(kw_only=True)
class ReferencePolicy:
    """How reference images are sent.

    Attributes:
        max_bytes: Largest reference image that is sent. Other clients of the service use 10 MB.
        max_side_px: Longest side that is sent; None means any. Only `"shrink"` looks at it.
        on_too_large: `"error"` raises `ImageError`. `"shrink"` makes each image fit with Pillow (extra `images`):
            turned upright, in sRGB, and small enough. HEIC is read where pillow-heif is installed.
        upload: Called with the bytes of each reference that is no URL. It returns a public URL, which is sent
            instead of the data. It is called for each request again. What it raises becomes an `ImageError`.
    """

    max_bytes: int = attrs.field(default=10 * 2**20, validator=ge(1))
    max_side_px: int | None = attrs.field(default=None, validator=optional(ge(64)))
    on_too_large: Literal["error", "shrink"] = attrs.field(default="error", validator=in_(("error", "shrink")))
    upload: Callable[[bytes], Awaitable[str]] | None = None


def _check_credits(_: object, field: "attrs.Attribute[Decimal | None]", value: Decimal | None) -> None:
    if not isinstance(value, Decimal | None):
        raise TypeError(f"{field.name}: expected Decimal, got {value!r}")
    if value is not None and not (value.is_finite() and value > 0):
        raise ValueError(f"{field.name}: expected more than 0 credits, got {value}")


@attrs.frozen(kw_only=True)
class OwnerLimits:
    """What each owner of submits may use, such as one user of a bot. None means no limit.

    Attributes:
        max_in_flight: Tasks of one owner that are submitted and not final, in this process. Further submits
            wait. A task counts until it is final, for at most `Timeouts.task_s`. The client polls it also if
            nothing waits for it.
        per_minute: Submits of one owner in any 60 seconds, in this process. Further submits wait.
        budget: Credits that one owner may spend, in all processes that share the ledger. Needs a ledger. A
            submit that could exceed it raises `BudgetExceeded`. Submits in flight, and those that may have been
            charged, count at the largest price seen for their model and image size.
        max_price: Upper bound of a price that was not seen yet. Without it, an owner with a budget has one
            submit of unknown price.
    """

    max_in_flight: int | None = attrs.field(default=None, validator=optional(ge(1)))
    per_minute: int | None = attrs.field(default=None, validator=optional(ge(1)))
    budget: Decimal | None = attrs.field(default=None, validator=_check_credits)
    max_price: Decimal | None = attrs.field(default=None, validator=_check_credits)


@attrs.frozen(kw_only=True)
class Timeouts:
    """Time limits. All of them are finite.

    Attributes:
        connect_s: One attempt to connect.
        submit_s: One submit with its safe retries, counted from when it may be sent. It includes the upload of
            reference images.
        query_s: One query or balance call with its retries.
        download_s: One download with its retries, counted from when it gets a slot (`Limits.max_downloads`).
        task_s: Default timeout of `generate`, `result`, `wait` and `updates`, and longest wait of a submit for
            its slot. An interaction with a Discord bot lasts 900 s, which leaves it a minute to say something.
        recovery_s: How long a submit whose response was lost waits for its callback, which contains the task
            id. After that it raises `SubmissionUnknown`, and a later callback is recorded in the ledger and
            passed to `on_orphan`.
        close_s: Extra time `aclose()` may take after submits in flight have finished.
    """

    connect_s: float = attrs.field(default=10.0, validator=[gt(0), lt(math.inf)])
    submit_s: float = attrs.field(default=60.0, validator=[gt(0), lt(math.inf)])
    query_s: float = attrs.field(default=20.0, validator=[gt(0), lt(math.inf)])
    download_s: float = attrs.field(default=120.0, validator=[gt(0), lt(math.inf)])
    task_s: float = attrs.field(default=840.0, validator=[gt(0), lt(math.inf)])
    recovery_s: float = attrs.field(default=30.0, validator=[ge(0), lt(math.inf)])
    close_s: float = attrs.field(default=10.0, validator=[gt(0), lt(math.inf)])
