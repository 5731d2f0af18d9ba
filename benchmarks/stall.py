"""How long the event loop is blocked."""

import selectors
import time


class StallMeter(selectors.DefaultSelector):
    """A selector that records how long the loop does not return to it.

    It needs no timer: waking up every 20 ms would cost a client that mostly waits much CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._longest_s = 0.0
        self._left_s: float | None = None

    @property
    def longest_s(self) -> float:
        """The longest time between two selects, including the current one."""
        return self._longest_s if self._left_s is None else max(self._longest_s, time.perf_counter() - self._left_s)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See `selectors.BaseSelector.select`."""
        self._longest_s, self._left_s = self.longest_s, None
        events = super().select(timeout)
        self._left_s = time.perf_counter()
        return events
