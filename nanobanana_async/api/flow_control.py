"""`FlowControl`: when the next request may be sent, given the responses to the earlier ones."""

import contextlib
from collections.abc import Callable
from random import SystemRandom
from typing import Final

import anyio

from nanobanana_async.api.rate_limit import AdaptiveRateLimiter, retry_after_s
from nanobanana_async.api.retry import RetryQuota
from nanobanana_async.policies import Limits, RetryPolicy
from nanobanana_async.protocols import RequestKind, WireResponse

_OUTAGE_AFTER_ERRORS: Final = 3
"""Consecutive requests without a response that count as an outage of the service."""


class FlowControl:
    """The rate limiter, the retry quota and the back-off of one client, shared by all of its API requests.

    *on_throttle* is called with the seconds for which requests are paused after a 429.
    """

    def __init__(
        self, limits: Limits, retry: RetryPolicy, on_throttle: Callable[[float], None] = lambda _: None
    ) -> None:
        self._on_throttle = on_throttle
        self.retry: Final = retry
        self._rng = SystemRandom()
        self._limiter = AdaptiveRateLimiter(limits.requests_per_s, limits.burst)
        self._quota = RetryQuota()
        self._submit_turn = anyio.Lock(fast_acquire=True)
        self._consecutive_throttles = 0
        self._consecutive_errors = 0

    async def acquire(self, kind: RequestKind) -> None:
        """Return when one request may be sent. Cancelling gives up the place in the queue.

        Submits wait for the limiter one at a time. Otherwise the tracker, which waits there once for all tasks, would
        get one turn in seventeen while submits wait.
        """
        async with self._submit_turn if kind is RequestKind.SUBMIT else contextlib.nullcontext():
            await self._limiter.acquire()

    @property
    def polls_per_s(self) -> float:
        """Queries that may be sent per second: the limiter's rate, or half of it while submits wait."""
        return self._limiter.rate * (0.5 if self._submit_turn.locked() else 1.0)

    def observe(self, response: WireResponse | None, sent_s: float) -> None:
        """Adapt the rate to a response to a request sent at *sent_s*, or to its absence."""
        asked_s = None if response is None else retry_after_s(response.headers)
        if response is not None and (response.status == 429 or (response.status == 503 and asked_s is not None)):
            if self._limiter.record_throttle(sent_s):
                self._consecutive_throttles += 1
            backoff_s = self.retry.initial_s + self.retry.backoff_s(self._consecutive_throttles, self._rng)
            self._limiter.pause(asked_s or backoff_s)
            self._on_throttle(asked_s or backoff_s)
        elif response is None or response.status >= 500:
            self._consecutive_errors += 1
            if self._consecutive_errors >= _OUTAGE_AFTER_ERRORS:
                self._limiter.record_throttle(sent_s)
        else:
            self._consecutive_errors = 0
            if response.status < 400:
                self._consecutive_throttles = 0
                self._quota.release()
                self._limiter.record_success()

    def may_retry(self, attempts: int) -> bool:
        """Return whether attempts are left after *attempts*, and take the retry from the quota."""
        return attempts < self.retry.attempts and self._quota.acquire()

    async def back_off(self, attempts: int, deadline_s: float) -> bool:
        """Sleep before the next attempt. Return False at once if it could not begin before the deadline."""
        backoff_s = self.retry.backoff_s(attempts, self._rng)
        if anyio.current_time() + max(backoff_s, self._limiter.pause_left_s) >= deadline_s:
            return False
        await anyio.sleep(backoff_s)
        return True
