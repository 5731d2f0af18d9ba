"""`OutageBackoff`: slow down what fails in a row, submits or downloads, so that no rows are used up in an outage."""

import math
from random import Random, SystemRandom
from typing import Final

GIVE_UP_AFTER_S: Final = 3600.0
"""How long a run that has worked before waits for the service to recover."""
_PROBE_AFTER_FAILURES: Final = 3
"""Consecutive failures that count as an outage."""
_MAX_BACKOFF_S: Final = 300.0


class OutageBackoff:
    """Counts consecutive failures. Pure: the time is an argument."""

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng or SystemRandom()
        self._failures = 0
        self._since_s = math.inf
        self._has_worked = False

    @property
    def is_probing(self) -> bool:
        """Whether submits go one at a time: none was accepted yet, or the last ones failed."""
        return not self._has_worked or self.is_down

    @property
    def is_down(self) -> bool:
        """Whether the last ones failed."""
        return self._failures >= _PROBE_AFTER_FAILURES

    def record_success(self) -> None:
        """Record that one has worked."""
        self._has_worked = True
        self._failures, self._since_s = 0, math.inf

    def record_failure(self, now_s: float) -> None:
        """Record a failure for a reason that others share: no connection, no response, or an error of the server."""
        self._failures += 1
        self._since_s = min(self._since_s, now_s)

    def backoff_s(self) -> float:
        """Return the wait before the next one: 0 at first, then doubling. Half of it is random."""
        if not self.is_down:
            return 0.0
        return self._rng.uniform(0.5, 1.0) * min(_MAX_BACKOFF_S, 2.0 ** min(self._failures - _PROBE_AFTER_FAILURES, 32))

    def should_give_up(self, now_s: float, *, rate_limited: bool) -> bool:
        """Return whether to stop: nothing has worked for an hour, or ever, unless the service was *rate_limited*."""
        if not self.is_down:
            return False
        return (not self._has_worked and not rate_limited) or now_s - self._since_s > GIVE_UP_AFTER_S
