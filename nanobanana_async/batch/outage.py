"""`OutageBackoff`: slow down submits while they fail, so that rows are not used up during an outage."""

import math
from random import Random
from typing import Final

GIVE_UP_AFTER_S: Final = 3600.0
"""How long a run that has worked before waits for the service to recover."""
_PROBE_AFTER_FAILURES: Final = 3
"""Consecutive failed submits that count as an outage of the service."""
_MAX_BACKOFF_S: Final = 300.0


class OutageBackoff:
    """Counts consecutive failures. Pure: the time is an argument."""

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng or Random()
        self._failures = 0
        self._since_s = math.inf
        self._has_worked = False

    @property
    def is_probing(self) -> bool:
        """Whether submits go one at a time: none was accepted yet, or the last ones failed."""
        return not self._has_worked or self._failures >= _PROBE_AFTER_FAILURES

    def record_success(self) -> None:
        """Record that a submit was accepted."""
        self._has_worked = True
        self._failures, self._since_s = 0, math.inf

    def record_failure(self, now_s: float) -> None:
        """Record a transient failure: no connection, no response, or an error of the service."""
        self._failures += 1
        self._since_s = min(self._since_s, now_s)

    def backoff_s(self) -> float:
        """Return the wait before the next submit: 0 at first, then doubling. Half of it is random."""
        if self._failures < _PROBE_AFTER_FAILURES:
            return 0.0
        return self._rng.uniform(0.5, 1.0) * min(_MAX_BACKOFF_S, 2.0 ** min(self._failures - _PROBE_AFTER_FAILURES, 32))

    def should_give_up(self, now_s: float, *, rate_limited: bool) -> bool:
        """Return whether to stop: nothing has worked for an hour, or ever, unless the service was *rate_limited*."""
        if self._failures < _PROBE_AFTER_FAILURES:
            return False
        return (not self._has_worked and not rate_limited) or now_s - self._since_s > GIVE_UP_AFTER_S
