"""`OutageBackoff`: how a run behaves while submits meet trouble. Rows are not burnt on a service that is down."""

import math
from random import Random
from typing import Final

PATIENCE_S: Final = 3600.0
"""For so long a run that has worked before waits for the service to come back."""
_TOLERATED: Final = 3
"""So many submits in a row may fail before it is taken for trouble of the service, not of the rows."""
_LONGEST_S: Final = 300.0


class OutageBackoff:
    """Counts failures in a row. Pure: time is an argument."""

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng or Random()
        self._failures = 0
        self._since_s = math.inf
        self._has_worked = False

    @property
    def is_needed(self) -> bool:
        """Whether submits should go one at a time: none was accepted yet, or the last ones failed."""
        return not self._has_worked or self._failures >= _TOLERATED

    def worked(self) -> None:
        """Note that a submit was accepted."""
        self._has_worked = True
        self._failures, self._since_s = 0, math.inf

    def failed(self, now_s: float) -> None:
        """Note that one met trouble that may pass: no connection, no answer, an error of the service's own."""
        self._failures += 1
        self._since_s = min(self._since_s, now_s)

    def pause_s(self) -> float:
        """Return how long to wait before the next submit: 0 at first, then doubling, half of it left to chance."""
        if self._failures < _TOLERATED:
            return 0.0
        return self._rng.uniform(0.5, 1.0) * min(_LONGEST_S, 2.0 ** min(self._failures - _TOLERATED, 32))

    def is_hopeless(self, now_s: float, *, was_busy: bool) -> bool:
        """Tell whether to stop: nothing has worked for an hour, or ever, unless the service just *was_busy*."""
        if self._failures < _TOLERATED:
            return False
        return (not self._has_worked and not was_busy) or now_s - self._since_s > PATIENCE_S
