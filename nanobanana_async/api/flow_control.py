"""`FlowControl`: when the next request may be sent, given the responses to the earlier ones."""

import contextlib
from collections.abc import Callable
from random import SystemRandom
from typing import Final

import anyio

from nanobanana_async._concurrency.byte_budget import ByteBudget
from nanobanana_async.api.concurrency import AdaptiveLimit
from nanobanana_async.api.rate_limit import AdaptiveRateLimiter, asked_wait_s
from nanobanana_async.api.retry import RetryQuota
from nanobanana_async.policies import Limits, RetryPolicy
from nanobanana_async.protocols import RequestKind, WireResponse

_OUTAGE_AFTER_ERRORS: Final = 3
"""Consecutive requests without a usable response that count as an outage of the service."""
_PAUSE_ABOVE_S: Final = 5.0
_MAX_ENCODING_BYTES: Final = 64 * 2**20
_FIRST_SUBMIT_S: Final = 1.0
"""Assumed duration of a submit before the first one: 0.8 s over TLS and three round trips of 0.12 s, measured."""
_SMOOTHING: Final = 0.1
"""Weight of the last submit in the smoothed duration."""
"""Retry-After above which all requests of the kind wait, and not only the one that received it."""


class FlowControl:
    """The rate limiters, the retry quota and the back-off of one client, shared by all of its API requests.

    Submits and queries have a limiter each, under a total: four queries per image would not fit beside the submits in
    one rate. *on_throttle* is called with the seconds that a 429 costs.
    """

    def __init__(
        self, limits: Limits, retry: RetryPolicy, on_throttle: Callable[[float], None] = lambda _: None
    ) -> None:
        self._on_throttle = on_throttle
        self.retry: Final = retry
        self._rng = SystemRandom()
        self._total = AdaptiveRateLimiter(limits.requests_per_s, limits.burst)
        self._limiters = {
            kind: AdaptiveRateLimiter(limits.requests_per_s, limits.burst)
            for kind in (RequestKind.SUBMIT, RequestKind.READ)
        }
        self.uploads: Final = ByteBudget(limits.max_upload_bytes)
        """Memory for the bodies of submits."""
        self.encoding: Final = ByteBudget(_MAX_ENCODING_BYTES)
        """Bodies that are being encoded, which takes three times their size for a moment."""
        self._in_flight = AdaptiveLimit(limits.max_submits)
        self.on_limit: Callable[[int], None] = lambda _: None
        """Called with `max_submits` after it may have changed."""
        self._quota = RetryQuota()
        self._consecutive_errors = 0
        self._submit_s = _FIRST_SUBMIT_S
        """Smoothed duration of a submit."""
        self._submit_turn = anyio.Lock(fast_acquire=True)

    async def acquire(self, kind: RequestKind) -> None:
        """Return when one request may be sent. Cancelling gives up the place in the queue.

        Submits wait for the limiter one at a time. Otherwise the tracker, which waits there once for all tasks, would
        get one turn in seventeen while submits wait.
        """
        async with self._submit_turn if kind is RequestKind.SUBMIT else contextlib.nullcontext():
            await self._limiters[kind].acquire()
            await self._total.acquire()

    def acquire_nowait(self, kind: RequestKind) -> bool:
        """Return whether one request may be sent at once, and count it. This spares a poll two locks and a timer."""
        now_s = anyio.current_time()
        limiters = (self._limiters[kind], self._total)
        if is_ready := all(limiter.is_ready(now_s) for limiter in limiters):
            for limiter in limiters:
                limiter.take(now_s)
        return is_ready

    @property
    def polls_per_s(self) -> float:
        """Queries that may be sent per second: at most half of the total while submits wait."""
        return min(self._limiters[RequestKind.READ].rate, self._total.rate * (0.5 if self._submit_turn.locked() else 1))

    def line_s(self, position: int) -> float:
        """Return the seconds until the submit at *position* in line has ended, as far as the last ones tell."""
        interval_s: float = max(self._submit_s / self.max_submits, 1 / self._limiters[RequestKind.SUBMIT].rate)
        return position * interval_s

    @property
    def max_submits(self) -> int:
        """Submits that may be in flight at present."""
        return self._in_flight.value

    def observe_submit(self, response: WireResponse | None, sent_s: float, size_bytes: int) -> float | None:
        """Adapt rate and number of submits to the end of one with a body of *size_bytes*. See `observe`."""
        wait_s = self.observe(RequestKind.SUBMIT, response, sent_s)
        if wait_s is None:
            is_error = response is None or response.status >= 500
            self._submit_s += _SMOOTHING * (anyio.current_time() - sent_s - self._submit_s)
            self._in_flight.record(is_error=is_error, elapsed_s=anyio.current_time() - sent_s, size_bytes=size_bytes)
            self.on_limit(self._in_flight.value)
        return wait_s

    def observe(self, kind: RequestKind, response: WireResponse | None, sent_s: float) -> float | None:
        """Adapt the rate to a response to a request sent at *sent_s*, or to its absence.

        Return the seconds after which the request may be sent again if it was throttled: a 429, or for a query a 503
        with a stated wait. Otherwise None.
        """
        limiter = self._limiters[kind]
        if response is None or not self._is_throttled(kind, response):
            self._observe_usual(kind, response, sent_s)
            return None
        asked_s = asked_wait_s(response)
        has_cut = limiter.record_throttle(sent_s)
        wait_s = asked_s if asked_s is not None else self._rng.uniform(0.5, 1.5) / limiter.rate
        if asked_s is not None and asked_s > _PAUSE_ABOVE_S:
            limiter.pause(asked_s)
        if has_cut:
            self._on_throttle(wait_s)
        return wait_s

    def _observe_usual(self, kind: RequestKind, response: WireResponse | None, sent_s: float) -> None:
        """Adapt to a response that is no throttling, or to its absence."""
        if response is None or response.status >= 500:
            self._consecutive_errors += 1
            # Submits have their own measures: the number in flight, and the back-off of a batch.
            if kind is RequestKind.READ and self._consecutive_errors >= _OUTAGE_AFTER_ERRORS:
                self._limiters[kind].record_failure(sent_s)
            return
        self._consecutive_errors = 0
        self._limiters[kind].record_accepted()
        if response.status < 400:
            self._quota.release()

    @staticmethod
    def _is_throttled(kind: RequestKind, response: WireResponse) -> bool:
        is_busy = kind is RequestKind.READ and response.status == 503
        return response.status == 429 or (is_busy and asked_wait_s(response) is not None)

    def may_retry(self, attempts: int) -> bool:
        """Return whether attempts are left after *attempts*, and take the retry from the quota."""
        return attempts < self.retry.attempts and self._quota.acquire()

    async def back_off(self, attempts: int, deadline_s: float) -> bool:
        """Sleep before the next attempt. Return False at once if it could not begin before the deadline."""
        backoff_s = self.retry.backoff_s(attempts, self._rng)
        if anyio.current_time() + backoff_s >= deadline_s:
            return False
        await anyio.sleep(backoff_s)
        return True
