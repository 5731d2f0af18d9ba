"""When to look at an unfinished task, and what its statuses and its absences mean. Pure."""

from random import Random
from typing import Final, Protocol

import attrs

from nanobanana_async.models import TaskStatus
from nanobanana_async.policies import PollPolicy

# A fresh id may answer 404 for 25-30 s, longer with reference images (several public clients allow for it).
NOT_FOUND_GRACE_S: Final = 60.0
"""For so long after our own submit, a 404 means "not visible yet"."""
VANISHED_LOOKS: Final = 3
VANISHED_AFTER_S: Final = 300.0
"""After the grace, a task is gone when so many looks over so long a time all answered 404. Not endless: an id that the
service has lost would be asked about until the deadline."""

_RANK: Final = {
    TaskStatus.UNKNOWN: -1,
    TaskStatus.PENDING: 0,
    TaskStatus.SUBMITTED: 1,
    TaskStatus.IN_PROGRESS: 2,
    TaskStatus.SUCCESS: 3,
    TaskStatus.FAILED: 3,
}


def newer(known: TaskStatus, seen: TaskStatus) -> TaskStatus:
    """Return the later of two statuses: stale news never moves a task backwards, and the first final one stays."""
    return max(known, seen, key=_RANK.__getitem__)


class Schedule(Protocol):
    """When to look at one unfinished task next."""

    def pause_s(self, model: str | None, age_s: float, looks: int) -> float:
        """Return the seconds from now to the next look.

        Args:
            model: What paints it; None when the task was submitted elsewhere.
            age_s: Seconds since the submit; infinity when it was submitted elsewhere and may have ended long ago.
            looks: Looks already taken.
        """
        ...


@attrs.frozen
class BackoffSchedule:
    """The pauses of a `PollPolicy`: a first look when pictures may be ready, then ever longer pauses, jittered."""

    policy: PollPolicy
    rng: Random = attrs.field(factory=Random)

    def pause_s(self, model: str | None, age_s: float, looks: int) -> float:  # noqa: ARG002 - the schedule's interface
        """Return `min(cap, pause * factor^(looks-1))` with jitter; before the first look, what is left of `first_s`."""
        policy = self.policy
        if looks == 0:
            pause_s = max(policy.first_s - age_s, 0.0)
        else:
            pause_s = min(policy.cap_s, policy.pause_s * policy.factor ** min(looks - 1, 64))
        return pause_s * self.rng.uniform(1 - policy.jitter, 1 + policy.jitter)


def has_vanished(late_looks: int, late_for_s: float) -> bool:
    """Tell whether a task is lost that answered 404 to *late_looks* looks over *late_for_s* seconds after the grace."""
    return late_looks >= VANISHED_LOOKS and late_for_s >= VANISHED_AFTER_S
