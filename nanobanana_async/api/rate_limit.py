"""Rate limiter: when a request may be sent."""

import math
import re
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC
from decimal import Decimal
from email.utils import parsedate_to_datetime
from random import Random, SystemRandom
from typing import Final

import anyio

from nanobanana_async.protocols import WireResponse
from nanobanana_async.wire.body import parse_json

MAX_RETRY_AFTER_S: Final = 300.0
"""Upper bound of a Retry-After, against absurd values."""


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a response asks to wait, in [0, 300]; None if it has no valid Retry-After.

    A date is compared with the response's own `Date`, so a wrong local clock has no effect (RFC 9110, 10.2.3).
    """
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", value, re.ASCII):
        return min(float(value), MAX_RETRY_AFTER_S)
    then, now = _parse_http_date(value), _parse_http_date(headers.get("date", ""))
    if then is None:
        return None
    return min(max(then - (time.time() if now is None else now), 0.0), MAX_RETRY_AFTER_S)


def _parse_http_date(text: str) -> float | None:
    try:
        parsed = parsedate_to_datetime(text)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        return None


def asked_wait_s(response: WireResponse) -> float | None:
    """Return the seconds that a response asks to wait, in its header or as `retry_after` in its JSON; else None."""
    if (header_s := retry_after_s(response.headers)) is not None or len(response.body) > _MAX_BODY_BYTES:
        return header_s
    try:
        document = parse_json(response.body)
    except (ValueError, RecursionError):
        return None
    parts = [document, *(document.values() if isinstance(document, dict) else ())]
    for part in parts:
        value = part.get("retry_after") if isinstance(part, dict) else None
        if isinstance(value, int | Decimal | str) and not isinstance(value, bool):
            return retry_after_s({"retry-after": str(value)})
    return None


class AdaptiveRateLimiter:
    """Allows *rate* requests per second, at most *burst* at once, and none during a pause.

    Callers are served in FIFO order: the first one sleeps, the others wait for it. The bucket is one number, the time
    at which it will be full again (generic cell rate algorithm, ITU-T I.371).

    After a 429 the rate becomes 0.9 of what was accepted per second lately, or half of itself if nothing was. Then it
    grows by 3 % per second; after less than a second of responses, which say little, it doubles per second.
    Requests that were under way together cut it once. With 20 allowed requests per second, in fixed windows and in a
    token bucket, at response times of 0.05 to 0.8 s, 95 % and more of them are used, and at most 2.4 % of the requests
    are throttled after ten seconds (`tests/test_throttling.py`). Below the maximum rate, intervals are random by a
    tenth, so that clients that were throttled together do not stay in step.
    """

    def __init__(self, rate: float, burst: int, rng: Random | None = None) -> None:
        self._max_rate = rate
        self._min_rate = min(rate, _MIN_RATE)
        self._burst_tolerance_s = (burst - 1) / rate
        self._rng = rng or SystemRandom()
        self._tat_s = -math.inf
        self._paused_until_s = -math.inf
        self._cut_at_s = -math.inf
        self._rate_after_cut = rate
        self._is_early = False
        """Whether the last cut came before a second of responses, so that it says little about the service."""
        self._accepted_s: deque[float] = deque()
        """Times of the requests that were accepted in the last three seconds."""
        self._is_outage = False
        """Whether the rate was cut by failures, so that it grows with successes and not with time."""
        self._accepting_since_s = -math.inf
        """When the first request was accepted after a rest."""
        self._lock = anyio.Lock(fast_acquire=True)

    @property
    def rate(self) -> float:
        """Current rate in requests per second."""
        if self._cut_at_s == -math.inf:
            return self._max_rate
        if self._is_outage:
            return self._rate_after_cut
        growth_per_s = max(_MIN_GROWTH_PER_S, (_EARLY_GROWTH if self._is_early else _GROWTH) * self._rate_after_cut)
        return min(self._max_rate, self._rate_after_cut + growth_per_s * (anyio.current_time() - self._cut_at_s))

    async def acquire(self) -> None:
        """Return when one request may be sent. Cancelling gives up the place in the queue without delaying others."""
        async with self._lock:
            # Checked again after each sleep, because a pause may have begun meanwhile.
            while (wait_s := self._tat_s - self._burst_tolerance_s - anyio.current_time()) > _ROUNDING_S:  # noqa: ASYNC110 - the condition is the clock
                await anyio.sleep(wait_s + self._coalesce_s)
            self.take(anyio.current_time())

    def is_ready(self, now_s: float) -> bool:
        """Return whether a request may be sent at once, because none waits."""
        return not self._lock.locked() and self._tat_s - self._burst_tolerance_s - now_s <= _ROUNDING_S

    def take(self, now_s: float) -> None:
        """Count a request that is sent now, which `is_ready` allowed."""
        self._tat_s = max(self._tat_s, now_s) + self._interval_s()

    @property
    def _coalesce_s(self) -> float:
        """How long permissions are collected and then given together, which saves CPU (see `DelayQueue`)."""
        return min(_COALESCE_S, self._burst_tolerance_s / 2) if self.rate == self._max_rate else 0.0

    def _interval_s(self) -> float:
        rate = self.rate
        return 1 / rate if rate == self._max_rate else self._rng.uniform(1 - _JITTER, 1 + _JITTER) / rate

    def pause(self, seconds: float) -> None:
        """Block all requests for *seconds*, then start without a burst."""
        self._paused_until_s = max(self._paused_until_s, anyio.current_time() + seconds)
        self._tat_s = max(self._tat_s, self._paused_until_s + self._burst_tolerance_s)

    def record_accepted(self) -> None:
        """Record a request that was not throttled."""
        now_s = anyio.current_time()
        if self._is_outage:
            self._rate_after_cut = min(self._max_rate, self._rate_after_cut + _INCREASE_PER_SUCCESS)
            self._is_outage = self._rate_after_cut < self._max_rate
        if not self._accepted_s or self._accepted_s[-1] <= now_s - _MEMORY_S:
            self._accepting_since_s = now_s
        self._accepted_s.append(now_s)
        while self._accepted_s[0] <= now_s - _MEMORY_S:
            self._accepted_s.popleft()

    def record_failure(self, sent_s: float) -> None:
        """Record one of several failures in a row, to a request sent at *sent_s*, and halve the rate.

        Then each success raises it a little, so that it recovers by a factor of e in ten seconds.
        """
        if sent_s > self._cut_at_s:
            self._rate_after_cut = max(min(self._max_rate, _MIN_OUTAGE_RATE), self.rate / 2)
            self._cut_at_s, self._is_outage = anyio.current_time(), True

    def record_throttle(self, sent_s: float) -> bool:
        """Record a 429 to a request sent at *sent_s*. Return whether it has cut the rate."""
        if sent_s <= self._cut_at_s:
            return False
        now_s, rate = anyio.current_time(), self.rate
        accepted_per_s = self._accepted_per_s(now_s)
        self._is_early = not accepted_per_s or now_s - self._accepting_since_s < 1
        self._rate_after_cut = max(self._min_rate, min(rate, _CUT * accepted_per_s) if accepted_per_s else rate / 2)
        self._cut_at_s = now_s
        self._is_outage = False
        self._tat_s = max(self._tat_s, now_s + self._burst_tolerance_s + 1 / self._rate_after_cut)  # no burst
        return True

    def _accepted_per_s(self, now_s: float) -> float:
        """Return the larger of the last second and the mean of three. With fixed windows, a second may miss a burst."""
        if not self._accepted_s or self._accepted_s[-1] <= now_s - _MEMORY_S:
            return 0.0
        recent = [at_s for at_s in self._accepted_s if at_s > now_s - _MEMORY_S]
        span_s = max(_MIN_SPAN_S, now_s - self._accepting_since_s)
        last = sum(at_s > now_s - 1 for at_s in recent) / min(1.0, span_s)
        return max(last, len(recent) / min(_MEMORY_S, span_s))


_ROUNDING_S: Final = 1e-6
_COALESCE_S: Final = 0.1
_MIN_RATE: Final = 0.5
_CUT: Final = 0.9
_MEMORY_S: Final = 3.0
_MIN_SPAN_S: Final = 0.25
"""Shortest time over which accepted requests are counted."""
_GROWTH: Final = 0.03
"""Growth of the rate per second, as a fraction of the rate after the last cut."""
_EARLY_GROWTH: Final = 1.0
"""The same after an early cut."""
_MIN_GROWTH_PER_S: Final = 0.2
"""Least growth of the rate per second, in requests per second."""
_INCREASE_PER_SUCCESS: Final = 0.1
"""Growth of the rate per success after an outage, in requests per second."""
_MIN_OUTAGE_RATE: Final = 1.0
_JITTER: Final = 0.1
_MAX_BODY_BYTES: Final = 65_536
