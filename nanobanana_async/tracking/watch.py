"""What the tracker keeps: one entry per task, one watch per waiter, and the figures it shows of itself."""

import math
from collections.abc import Mapping
from typing import Final

import attrs

from nanobanana_async._bell import Bell
from nanobanana_async.errors import NanoBananaError
from nanobanana_async.models import Task

CONFIRM_PAUSE_S: Final = 10.0
"""News is only a hint: anybody may send it. So often, and not oftener, it buys a query."""


@attrs.frozen(kw_only=True)
class Origin:
    """What is known of a task before it is first looked at."""

    submitted_at_s: float | None = None
    """When this client's submit was accepted, on the event loop's clock; None when it was submitted elsewhere."""
    model: str | None = None


@attrs.define(eq=False, weakref_slot=False)
class Entry:
    """One watched task. There may be a million of them, so it holds no container that it need not."""

    task_id: str
    model: str | None
    born_s: float
    """When it was submitted; a guess when that was elsewhere."""
    is_ours: bool
    """Whether this client submitted it, so that its age is known."""
    watches: "tuple[Watch, ...]" = ()
    due_s: float = math.inf
    """When it is next looked at; infinity while a look is under way."""
    wanted_per_s: float = 0.0
    """Looks per second it would like to have."""
    looks: int = 0
    asked_s: float = -math.inf
    """When the last look left."""
    confirm_s: float = -math.inf
    """When the last look that news has bought was, or is to be."""
    unfinished_s: float = 0.0
    """The age at which it was last seen unfinished."""
    task: Task | None = None
    """The last snapshot, never older in status than the one before."""
    error: NanoBananaError | None = None
    """What ended the watching, for all who wait."""
    trouble: NanoBananaError | None = None
    """What the last look met instead of an answer."""
    there_s: float = -math.inf
    """When it was last seen at the service."""
    late_since_s: float = math.inf
    """Since when it has answered 404 although it should be there; infinity while it has not."""
    late_looks: int = 0

    @property
    def is_final(self) -> bool:
        """Whether its last snapshot will never change again."""
        return self.task is not None and self.task.is_final

    def ring(self) -> None:
        """Wake all who wait."""
        for watch in self.watches:
            watch.ring()

    def plan_confirmation(self, now_s: float) -> bool:
        """Grant news a look at `confirm_s`; False when the last one it bought is too recent and one is planned."""
        if self.confirm_s > now_s:
            return False
        self.confirm_s = max(now_s, self.confirm_s + CONFIRM_PAUSE_S)
        return True


@attrs.define(eq=False, weakref_slot=False)
class Watch:
    """One who is interested in a task. Costs nothing but itself until `bell` is waited for."""

    entry: Entry
    due_s: float = math.inf
    """When its patience ends."""
    bell: Bell | None = None

    def ring(self) -> None:
        """Wake it."""
        if self.bell is not None:
            self.bell.ring()


@attrs.frozen(kw_only=True)
class Statistics:
    """How a client's tracker stands, at one moment."""

    watched: int
    """Tasks somebody waits for that are not final yet."""
    in_flight: int
    """Looks sent and not answered; never above `Limits.polls`."""
    overdue: int
    """Tasks whose look should have left by now: they queue for a slot or for the pacer."""
    overdue_s: float
    """How late the most delayed of them is, in seconds; 0.0 when none is."""
    pressure: float
    """How many times more looks are wanted than `Limits.requests_per_s` leaves room for; at least 1.0."""
    polls: int
    """Looks taken since the client was made."""
    wakes: int
    """Times the scheduler woke up since then."""
    median_s: Mapping[str, float]
    """Seconds in which half of the pictures are done, as learned, by model."""
    curves: Mapping[str, tuple[float, ...]] = attrs.field(repr=False)
    """All that was learned, by model, for `PollPolicy(curves=...)` of a later client. Plain numbers: JSON will do."""
