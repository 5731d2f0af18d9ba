"""`AdaptiveLimit`: how many submits may be in flight, learned from their responses. Pure."""

import math
from collections import deque
from typing import Final

_START: Final = 32
_FLOOR: Final = 16
"""Smallest limit. A service that fails for all is the business of the breaker and of the outage back-off."""
_WINDOW: Final = 16
"""Responses in the share of errors."""
_MANY: Final = 1 / 8
"""Share of errors above which the service, and not the network, is at its limit."""
_SLOW_FACTOR: Final = 2.0
"""Mean response time, in multiples of the best one, above which more requests would only wait elsewhere."""
_BEST_GROWTH: Final = 1.01
"""By how much the best time is forgotten with each window, because services change."""
_SIZE_STEPS: Final = (65_536, 2**20, 2**23)
"""Bounds of the sizes whose response times are compared: an upload takes as long as its bytes."""


class AdaptiveLimit:
    """A limit between 16 and *maximum*, at first 32.

    While responses are good, it grows by one each, and so doubles per round: slow start. Once an eighth of the last 16
    responses are errors, it grows by one per round. Errors shrink it by half their share among the last 16 responses,
    at most once in 16 (DCTCP: Alizadeh et al., 2010), because halving per error would not survive 1 % of noise. It does
    not grow while responses take more than twice the best time of their size, by means over 16 of them (TCP Vegas:
    Brakmo et al., 1994). A 429 says nothing about concurrency. It concerns the rate limiter alone.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._value = float(min(maximum, _START))
        self._is_slow_start = True
        self._results: deque[bool] = deque(maxlen=_WINDOW)
        self._since_cut = 0
        """Responses since the last cut."""
        self._times: dict[int, _ResponseTimes] = {}
        """Response times by size."""

    @property
    def value(self) -> int:
        """The limit."""
        return int(self._value)

    def record(self, *, is_error: bool, elapsed_s: float, size_bytes: int) -> None:
        """Record the end of one request. *is_error* stands for a 5xx, or for no response."""
        self._results.append(is_error)
        self._since_cut += 1
        if not is_error:
            size = sum(size_bytes > step for step in _SIZE_STEPS)
            is_fast = self._times.setdefault(size, _ResponseTimes()).record(elapsed_s)
            if is_fast:
                self._value = min(self._maximum, self._value + (1 if self._is_slow_start else 1 / self._value))
            return
        share = sum(self._results) / len(self._results)
        if share > _MANY:
            self._is_slow_start = False
        if self._since_cut >= min(_WINDOW, self._value):
            self._value = max(min(self._maximum, _FLOOR), self._value * (1 - share / 2))
            self._since_cut = 0


class _ResponseTimes:
    """The response times of requests of one size."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_WINDOW)
        self._count = 0
        self._best_mean_s = math.inf

    def record(self, elapsed_s: float) -> bool:
        """Record a time. Return whether the last ones are near the best ones."""
        self._last.append(elapsed_s)
        self._count += 1
        if len(self._last) < _WINDOW:
            return True
        mean_s = sum(self._last) / _WINDOW
        if self._count % _WINDOW == 0:
            self._best_mean_s = min(mean_s, self._best_mean_s * _BEST_GROWTH)
        return mean_s <= _SLOW_FACTOR * self._best_mean_s
