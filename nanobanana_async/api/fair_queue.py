"""`FairQueue`: submits that wait for a slot, one of each owner in turn, within the limits of each owner."""

import math
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

import anyio
import attrs

from nanobanana_async._concurrency.delay_queue import DelayQueue
from nanobanana_async._concurrency.slots import SlotWaiter, StartSoon, insert_in_order
from nanobanana_async.policies import OwnerLimits

LimitsOf: TypeAlias = Callable[[str], OwnerLimits]

NO_LIMITS: Final = OwnerLimits()
_MINUTE_S: Final = 60.0
_TIMER_SLACK_S: Final = 0.05
_COMPACT_EVERY: Final = 256


@attrs.define(eq=False, weakref_slot=False)
class _Owner:
    """One owner with submits that wait, are in flight, or were sent within the last minute."""

    name: str | None
    limits: OwnerLimits
    waiting: deque[SlotWaiter] = attrs.field(factory=deque[SlotWaiter])
    in_flight: int = 0
    sent_s: list[float] | None = None
    """Times of the last submits, as many as `per_minute`; None without that limit."""
    due_s: float = math.inf
    """When `per_minute` allows the next submit, if it waits for that."""
    is_in_turn: bool = False

    def drop_left(self) -> None:
        """Remove waiters that have left from the head."""
        while self.waiting and self.waiting[0].has_left:
            self.waiting.popleft()

    def is_full(self) -> bool:
        """Whether `max_in_flight` forbids another submit."""
        return self.limits.max_in_flight is not None and self.in_flight >= self.limits.max_in_flight

    def allowed_at_s(self) -> float:
        """Return when `per_minute` allows the next submit; -infinity if it always has."""
        if self.sent_s is None or len(self.sent_s) < (self.limits.per_minute or 0):
            return -math.inf
        return self.sent_s[0] + _MINUTE_S


class FairQueue:
    """A `WaitQueue` that takes owners in turn: one submit of each, then the next one of each.

    Submits without an owner share a turn. A submit in flight counts from its slot to `leave`. Waiting costs no timer:
    one serves all owners.

    Args:
        limits_of: Returns the limits of an owner.
        start_soon: Starts the shared timer in the background, once `per_minute` makes an owner wait.
    """

    def __init__(self, limits_of: LimitsOf, start_soon: StartSoon) -> None:
        self._limits_of = limits_of
        self._start_soon = start_soon
        self._owners: dict[str | None, _Owner] = {}
        self._turns: deque[_Owner] = deque()
        """Owners that have a waiting submit and may send it, in order."""
        self._rate_limited: DelayQueue[_Owner] = DelayQueue(_TIMER_SLACK_S)
        self._timer_started = False
        self._newest = 0
        """Largest number of a waiter so far."""
        self._on_change: Callable[[], None] = lambda: None

    def attach(self, on_change: Callable[[], None]) -> None:
        """See `WaitQueue.attach`."""
        self._on_change = on_change

    def limits(self, owner: str | None) -> OwnerLimits:
        """Return the limits of *owner*."""
        found = self._owners.get(owner)
        return found.limits if found is not None else self._new_limits(owner)

    def push(self, waiter: SlotWaiter) -> None:
        """See `WaitQueue.push`."""
        owner = self._owners.get(waiter.owner)
        if owner is None:
            limits = self._new_limits(waiter.owner)
            sent_s = None if limits.per_minute is None else list[float]()
            owner = self._owners[waiter.owner] = _Owner(waiter.owner, limits, sent_s=sent_s)
        insert_in_order(owner.waiting, waiter)
        if len(owner.waiting) % _COMPACT_EVERY == 0:  # those that have left behind one that waits
            owner.waiting = deque(waiting for waiting in owner.waiting if not waiting.has_left)
        is_back = waiter.number < self._newest
        self._newest = max(self._newest, waiter.number)
        self._take_turn(owner, is_first=is_back)

    def pop(self) -> SlotWaiter | None:
        """See `WaitQueue.pop`."""
        while self._turns:
            owner = self._turns.popleft()
            owner.is_in_turn = False
            owner.drop_left()
            if not owner.waiting:
                self._forget_idle(owner)
                continue
            waiter = owner.waiting.popleft()
            owner.in_flight += 1
            if owner.sent_s is not None:
                owner.sent_s.append(anyio.current_time())
                del owner.sent_s[: -(owner.limits.per_minute or 1)]
            self._take_turn(owner)
            return waiter
        return None

    def leave(self, waiter: SlotWaiter) -> None:
        """End the submit of *waiter*, and of the task that it has led to. A second call has no effect."""
        owner = self._owners.get(waiter.owner)
        if not waiter.acquired or owner is None:
            return
        waiter.acquired = False
        owner.in_flight -= 1
        self._take_turn(owner)
        self._forget_idle(owner)
        self._on_change()

    def give_back(self, waiter: SlotWaiter) -> None:
        """End the submit of *waiter*, which was not accepted and does not count as sent."""
        owner = self._owners.get(waiter.owner)
        if waiter.acquired and owner is not None and owner.sent_s:
            owner.sent_s.pop()
        self.leave(waiter)

    def position(self, waiter: SlotWaiter) -> int:
        """Return how many submits leave before *waiter* does, plus 1. Owners above their limits do not count.

        Without a place in the queue, it is the position that *waiter* would get. O(owners + submits of its own).
        """
        mine = self._owners.get(waiter.owner)
        ahead = 0
        for other in mine.waiting if mine is not None else ():
            if other is waiter:
                break
            ahead += not other.has_left
        position, is_before = ahead + 1, True
        for owner in self._turns:
            if owner is mine:
                is_before = False
            else:
                position += min(len(owner.waiting), ahead + 1 if is_before else ahead)
        return position

    def _new_limits(self, owner: str | None) -> OwnerLimits:
        return NO_LIMITS if owner is None else self._limits_of(owner)

    def _take_turn(self, owner: _Owner, *, is_first: bool = False) -> None:
        """Add *owner* to the turns, at the front if *is_first*, if it has a submit that may be sent now."""
        owner.drop_left()
        if owner.is_in_turn or not owner.waiting or owner.is_full():
            return
        allowed_at_s = owner.allowed_at_s()
        if allowed_at_s > anyio.current_time():
            self._wake_at(owner, allowed_at_s)
        else:
            owner.is_in_turn = True
            if is_first:
                self._turns.appendleft(owner)
            else:
                self._turns.append(owner)

    def _forget_idle(self, owner: _Owner) -> None:
        """Forget an owner without submits. One with `per_minute` is kept until a minute after its last submit."""
        if owner.waiting or owner.in_flight or owner.is_in_turn:
            return
        if owner.sent_s and (idle_at_s := owner.sent_s[-1] + _MINUTE_S) > anyio.current_time():
            self._wake_at(owner, idle_at_s)
        else:
            self._owners.pop(owner.name, None)

    def _wake_at(self, owner: _Owner, due_s: float) -> None:
        self._rate_limited.schedule(owner, due_s)
        if not self._timer_started:
            self._timer_started = True
            self._start_soon(self._end_rate_limits)

    async def _end_rate_limits(self) -> None:
        while True:
            await self._rate_limited.wait_due()
            owner = self._rate_limited.pop()
            self._take_turn(owner)
            self._forget_idle(owner)
            self._on_change()
