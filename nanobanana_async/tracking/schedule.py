"""When to look at an unfinished task, and what its statuses and its absences mean. Pure."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Final

from nanobanana_async.models import TaskStatus
from nanobanana_async.policies import PollPolicy
from nanobanana_async.tracking.latency import PRIOR_MEDIAN_S, LatencyModel

# A fresh id may answer 404 for 25-30 s, longer with reference images (several public clients allow for it).
NOT_FOUND_GRACE_S: Final = 60.0
"""For so long after our own submit, a 404 means "not visible yet"."""
LOST_AFTER_POLLS: Final = 3
LOST_AFTER_S: Final = 300.0
"""After the grace, a task is gone when so many looks over so long a time all answered 404. Not endless: an id that the
service has lost would be asked about until the deadline."""
DEFAULT_AGE_S: Final = PRIOR_MEDIAN_S
"""How old a task submitted elsewhere is taken to be when we first hear of it: in the thick of it."""

_MAX_MODELS: Final = 64
"""Model names are free strings, and may come from a web form."""

_STATUS_ORDER: Final = {
    TaskStatus.UNRECOGNIZED: -1,
    TaskStatus.PENDING: 0,
    TaskStatus.SUBMITTED: 1,
    TaskStatus.IN_PROGRESS: 2,
    TaskStatus.SUCCESS: 3,
    TaskStatus.FAILED: 3,
}


def latest_status(known: TaskStatus, seen: TaskStatus) -> TaskStatus:
    """Return the later of two statuses: stale news never moves a task backwards, and the first final one stays."""
    return max(known, seen, key=_STATUS_ORDER.__getitem__)


def is_lost(missing_polls: int, missing_s: float) -> bool:
    """Tell whether a task is lost that answered 404 to *late_looks* looks over *late_for_s* seconds after the grace."""
    return missing_polls >= LOST_AFTER_POLLS and missing_s >= LOST_AFTER_S


class PollSchedule:
    """The pauses of a `PollPolicy`, learned or laid down, and what is learned meanwhile."""

    def __init__(self, policy: PollPolicy, rng: Random | None = None) -> None:
        self.policy: Final = policy
        self._rng = rng or Random()
        self._prior = LatencyModel()
        self._latency_models = {model: _load_model(model, numbers) for model, numbers in policy.latency_models.items()}

    def next_poll_in_s(self, model: str | None, age_s: float, polls: int, pressure: float = 1.0) -> float:
        """Return the seconds from now to the next look, before jitter.

        Args:
            model: What paints it; None when nobody here knows.
            age_s: Seconds since the submit.
            polls: Polls already sent.
            pressure: How many times more looks are wanted than may be sent. A learned schedule raises the price of a
                look with its square, which lengthens pauses in proportion and keeps them at their best. One laid
                down is kept, and its looks queue.
        """
        policy = self.policy
        if policy.static_schedule is None:
            cost_s = policy.poll_cost_s * pressure * pressure
            latency_model = self._latency_models.get(model or "", self._prior)
            if polls == 0:  # nobody knows that it was unfinished later than at its birth
                return max(latency_model.next_poll_in_s(0.0, cost_s, policy.max_interval_s) - age_s, 0.0)
            return max(latency_model.next_poll_in_s(age_s, cost_s, policy.max_interval_s), policy.min_interval_s)
        if polls == 0:
            return max(policy.static_schedule.first_poll_s - age_s, 0.0)
        return min(
            policy.max_interval_s,
            policy.static_schedule.initial_s * policy.static_schedule.multiplier ** min(polls - 1, 64),
        )

    def jittered_s(self, interval_s: float) -> float:
        """Return *pause_s* spread by `PollPolicy.jitter`, so that what began together does not stay together."""
        return interval_s * self._rng.uniform(1 - self.policy.jitter, 1 + self.policy.jitter)

    def backoff_s(self, failures: int) -> float:
        """Return the pause after *failures* looks in a row, at whatever tasks, that brought no answer.

        Doubles up to `max_s`, and the upper half of it is left to chance: nobody comes back together.
        """
        policy = self.policy
        return self._rng.uniform(0.5, 1.0) * min(
            policy.max_interval_s, policy.min_interval_s * 2.0 ** min(failures, 32)
        )

    def observe(self, model: str, since_s: float, age_s: float, *, done: bool) -> None:
        """Note that a task unfinished at age *since_s* was looked at again at *age_s*, and whether it was done."""
        latency_model = self._latency_models.get(model)
        if latency_model is None:
            if len(self._latency_models) >= _MAX_MODELS:
                del self._latency_models[next(iter(self._latency_models))]
            latency_model = self._latency_models[model] = LatencyModel()
        latency_model.observe(since_s, age_s, done=done)

    def median_latencies_s(self) -> Mapping[str, float]:
        """Return the age at which half of the pictures are done, by model."""
        return {model: latency_model.median_s() for model, latency_model in self._latency_models.items()}

    def latency_models(self) -> Mapping[str, tuple[float, ...]]:
        """Return what was learned, by model, for `PollPolicy.latency_models` of a later client."""
        return {model: latency_model.dump() for model, latency_model in self._latency_models.items()}


def _load_model(model: str, numbers: Sequence[float]) -> LatencyModel:
    try:
        return LatencyModel.load(numbers)
    except (ValueError, TypeError, OverflowError) as exc:
        raise ValueError(f"curves: what is given for {model!r} is not what `statistics().curves` gave: {exc}") from None
