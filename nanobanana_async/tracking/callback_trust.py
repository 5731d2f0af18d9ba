"""`CallbackTrust`: whether polls may be rare because callbacks come."""

import logging
from typing import Final

_log: Final = logging.getLogger("nanobanana_async")
_DISTRUST_AFTER: Final = 3
"""Consecutive missed callbacks after which polling no longer relies on them, until one arrives."""


class CallbackTrust:
    """Counts callbacks that came and that did not. Until the first one, tasks are polled as if there were none."""

    def __init__(self) -> None:
        self._has_come = False
        self._missed = 0

    @property
    def is_given(self) -> bool:
        """Whether the last callbacks came."""
        return self._has_come and self._missed < _DISTRUST_AFTER

    def record_callback(self) -> None:
        """Record that a callback came."""
        self._has_come, self._missed = True, 0

    def record_missed(self, url: str) -> None:
        """Record that a poll has found the end of a task whose callback at *url* did not come. The third is logged."""
        self._missed += 1
        if self._missed == _DISTRUST_AFTER:
            _log.warning(
                "no callback came for the last %d tasks, which polls have found; polling continues. Check that %s can "
                "be reached from the internet, and that all workers have its secret and a forward",
                self._missed,
                url,
            )
