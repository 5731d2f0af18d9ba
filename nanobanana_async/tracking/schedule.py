"""When to poll an unfinished task, and what its statuses and 404s mean. Pure."""

import enum
import math
from collections.abc import Mapping, Sequence
from functools import partial
from random import Random, SystemRandom
from typing import Final

import attrs

from nanobanana_async.models import Eta, TaskStatus
from nanobanana_async.policies import PollPolicy
from nanobanana_async.tracking.latency import PRIOR_MEDIAN_S, LatencyModel

# A new id may return 404 for 25-30 s, longer with reference images (several public clients allow for it).
NOT_FOUND_GRACE_S: Final = 60.0
"""Time after a submit in which a 404 means "not visible yet"."""
LOST_AFTER_POLLS: Final = 3
LOST_AFTER_S: Final = 300.0
"""After the grace time, a task is lost when `LOST_AFTER_POLLS` polls over this time all returned 404.

Without a bound, a lost task would be polled until the deadline.
"""
DEFAULT_AGE_S: Final = PRIOR_MEDIAN_S
"""Assumed age of a task submitted elsewhere, when it is first tracked."""

_MAX_MODELS: Final = 64
"""Bound on the number of models, which are free text and may come from a web form."""

_SIZES: Final = {"": 1, "1k": 1, "2k": 2, "4k": 3}

_STATUS_ORDER: Final = {
    TaskStatus.UNRECOGNIZED: -1,
    TaskStatus.PENDING: 0,
    TaskStatus.SUBMITTED: 1,
    TaskStatus.IN_PROGRESS: 2,
    TaskStatus.SUCCESS: 3,
    TaskStatus.FAILED: 3,
}


def latest_status(known: TaskStatus, seen: TaskStatus) -> TaskStatus:
    """Return the later of two statuses. A stale poll never moves a task backwards, and the first final status stays."""
    return max(known, seen, key=_STATUS_ORDER.__getitem__)


class Lost(enum.Enum):
    """The service no longer knows the task."""

    LOST = "lost"


@attrs.frozen
class Presence:
    """Whether the service knows a task."""

    last_found_s: float = -math.inf
    """When the service last returned it."""
    missing_since_s: float = math.inf
    """Time of the first unexpected 404 in a series; infinity if there is none."""
    missing_polls: int = 0

    def after_404(self, now_s: float, submitted_at_s: float) -> "Presence | Lost":
        """Return the presence after a 404. A new task, or one just seen, may be invisible for a while."""
        if now_s - max(submitted_at_s, self.last_found_s) <= NOT_FOUND_GRACE_S:
            return self
        since_s, polls = min(self.missing_since_s, now_s), self.missing_polls + 1
        if polls >= LOST_AFTER_POLLS and now_s - since_s >= LOST_AFTER_S:
            return Lost.LOST
        return Presence(self.last_found_s, since_s, polls)


NEVER_FOUND: Final = Presence()


@attrs.frozen
class PollHistory:
    """The polls of one task so far."""

    count: int = 0
    sent_s: float = -math.inf
    """When the last one was sent."""
    consecutive_errors: int = 0
    """Consecutive polls without a response."""
    last_error: str = ""
    """Text of the last error. An exception object would keep its response alive."""


NO_POLLS: Final = PollHistory()


class PollSchedule:
    """The poll intervals of a `PollPolicy`, learned or static, and the observations."""

    def __init__(self, policy: PollPolicy, rng: Random | None = None) -> None:
        self.policy: Final = policy
        self._rng = rng or SystemRandom()
        self._prior = LatencyModel()
        self._latency_models = {model: _load_model(model, numbers) for model, numbers in policy.latency_models.items()}

    def _latency(self, kind: str | None) -> LatencyModel:
        """Return the model of this kind of request, else that of the nearest image size, else the prior."""
        found = self._latency_models.get(kind or "")
        if found is not None or kind is None:
            return found or self._prior
        near = [one for one in self._latency_models if _model(one) == _model(kind)]
        return self._latency_models[min(near, key=partial(_size_distance, kind))] if near else self._prior

    def eta(self, kind: str | None, age_s: float, pressure: float = 1.0) -> Eta:
        """Return the time left of a task unfinished at *age_s*. Under *pressure*, the delay of polls is added."""
        latency_model = self._latency(kind)
        median_s, p90_s = (latency_model.left_s(age_s, share) for share in (0.5, 0.9))
        delay_s = 0.0
        if pressure > 1:
            usual_s, longer_s = (self.next_poll_in_s(kind, age_s + median_s, 1, one) for one in (1.0, pressure))
            delay_s = longer_s - usual_s
        return Eta(median_s=median_s + delay_s / 2, p90_s=p90_s + delay_s)

    def is_slow(self, kind: str, age_s: float) -> bool:
        """Return whether fewer than one task in a thousand is unfinished at *age_s*."""
        return age_s > self._latency(kind).slow_s()

    def next_poll_in_s(self, kind: str | None, age_s: float, polls: int, pressure: float = 1.0) -> float:
        """Return the seconds from now to the next poll, before jitter.

        Args:
            kind: `latency_kind` of the request; None if it is not known.
            age_s: Seconds since the submit.
            polls: Polls already sent.
            pressure: Demand for polls divided by the allowed rate. A learned schedule multiplies the poll cost by its
                square, which lengthens intervals in proportion. A static schedule does not change. Its polls queue.
        """
        policy = self.policy
        if policy.static_schedule is None:
            cost_s = policy.poll_cost_s * pressure * pressure
            latency_model = self._latency(kind)
            if polls == 0:  # it is only known to have been unfinished at age 0
                return max(latency_model.next_poll_in_s(0.0, cost_s, policy.max_interval_s) - age_s, 0.0)
            return max(latency_model.next_poll_in_s(age_s, cost_s, policy.max_interval_s), policy.min_interval_s)
        if polls == 0:
            return max(policy.static_schedule.first_poll_s - age_s, 0.0)
        return min(
            policy.max_interval_s,
            policy.static_schedule.initial_s * policy.static_schedule.multiplier ** min(polls - 1, 64),
        )

    def jittered_s(self, interval_s: float) -> float:
        """Return *interval_s* spread by `PollPolicy.jitter`, so that tasks of one moment are not polled together."""
        return interval_s * self._rng.uniform(1 - self.policy.jitter, 1 + self.policy.jitter)

    def backoff_s(self, failures: int) -> float:
        """Return the wait after *failures* consecutive polls, of any tasks, without a response.

        It doubles up to `max_interval_s`, and its upper half is random.
        """
        policy = self.policy
        return self._rng.uniform(0.5, 1.0) * min(
            policy.max_interval_s, policy.min_interval_s * 2.0 ** min(failures, 32)
        )

    def observe(self, kind: str, since_s: float, age_s: float, *, done: bool) -> None:
        """Record that a task unfinished at age *since_s* was polled at *age_s*, and whether it was finished."""
        latency_model = self._latency_models.get(kind)
        if latency_model is None:
            latency_model = self._latency(kind).seed()
            if len(self._latency_models) >= _MAX_MODELS:
                del self._latency_models[next(iter(self._latency_models))]
            self._latency_models[kind] = latency_model
        latency_model.observe(since_s, age_s, done=done)

    def median_latencies_s(self) -> Mapping[str, float]:
        """Return the age at which half of the tasks are finished, by `latency_kind`."""
        return {model: latency_model.median_s() for model, latency_model in self._latency_models.copy().items()}

    def latency_models(self) -> Mapping[str, tuple[float, ...]]:
        """Return the observations by `latency_kind`, for `PollPolicy.latency_models` of a later client."""
        return {model: latency_model.dump() for model, latency_model in self._latency_models.copy().items()}


def latency_kind(model: str, image_size: str | None) -> str:
    """Return which tasks share a latency model: those of one model and image size, such as `"google/gempix2@4k"`."""
    return model if image_size is None else f"{model}@{image_size}"


def _model(kind: str) -> str:
    return kind.partition("@")[0]


def _size_distance(kind: str, other: str) -> int:
    """Return how many sizes lie between two kinds. Without a size it is the smallest."""
    one, two = (_SIZES.get(name.partition("@")[2], 1) for name in (kind, other))
    return abs(one - two)


def _load_model(model: str, numbers: Sequence[float]) -> LatencyModel:
    try:
        return LatencyModel.load(numbers)
    except (ValueError, TypeError, OverflowError) as exc:
        raise ValueError(
            f"latency_models: expected a value of `statistics().latency_models` for {model!r}: {exc}"
        ) from None
