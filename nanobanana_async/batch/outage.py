"""`OutageBackoff`: how a run behaves while submits meet trouble. Rows are not burnt on a service that is down."""

import math
from random import Random
from typing import Final

GIVE_UP_AFTER_S: Final = 3600.0
"""For so long a run that has worked before waits for the service to come back."""
_PROBE_AFTER_FAILURES: Final = 3
"""So many submits in a row may fail before it is taken for trouble of the service, not of the rows."""
_MAX_BACKOFF_S: Final = 300.0


class OutageBackoff:
    """Counts failures in a row. Pure: time is an argument."""

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng or Random()
        self._failures = 0
        self._since_s = math.inf
        self._has_worked = False

    @property
    def is_probing(self) -> bool:
        """Whether submits should go one at a time: none was accepted yet, or the last ones failed."""
        return not self._has_worked or self._failures >= _PROBE_AFTER_FAILURES

    def record_success(self) -> None:
        """Note that a submit was accepted."""
        self._has_worked = True
        self._failures, self._since_s = 0, math.inf

    def record_failure(self, now_s: float) -> None:
        """Note that one met trouble that may pass: no connection, no answer, an error of the service's own."""
        self._failures += 1
        self._since_s = min(self._since_s, now_s)

    def backoff_s(self) -> float:
        """Return how long to wait before the next submit: 0 at first, then doubling, half of it left to chance."""
        if self._failures < _PROBE_AFTER_FAILURES:
            return 0.0
        return self._rng.uniform(0.5, 1.0) * min(_MAX_BACKOFF_S, 2.0 ** min(self._failures - _PROBE_AFTER_FAILURES, 32))

    def should_give_up(self, now_s: float, *, rate_limited: bool) -> bool:
        """Tell whether to stop: nothing has worked for an hour, or ever, unless the service just *was_busy*."""
        if self._failures < _PROBE_AFTER_FAILURES:
            return False
        return (not self._has_worked and not rate_limited) or now_s - self._since_s > GIVE_UP_AFTER_S
