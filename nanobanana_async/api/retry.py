"""Circuit breaker and retry quota: whether a request may be sent again."""

import copy
import math
from typing import Final

import anyio

from nanobanana_async.errors import ApiError


class CircuitBreaker:
    """Blocks submits after a definite rejection: a refused key or an empty account.

    Transient errors do not open it. The retry quota handles those better. While it is open, one submit per
    `PROBE_INTERVAL_S` is sent as a probe, because a rejection is not charged.
    """

    PROBE_INTERVAL_S: Final = 30.0

    def __init__(self) -> None:
        self._cause: ApiError | None = None
        self._open_until_s = -math.inf

    def check(self) -> None:
        """Raise the cause without sending a request, while the breaker is open."""
        if self._cause is None:
            return
        now_s = anyio.current_time()
        if now_s < self._open_until_s:
            raise copy.copy(self._cause)
        self._open_until_s = now_s + self.PROBE_INTERVAL_S

    def trip(self, cause: ApiError) -> None:
        """Open the breaker: block submits that have not been sent."""
        self._cause = copy.copy(cause)
        self._open_until_s = anyio.current_time() + self.PROBE_INTERVAL_S

    def reset(self) -> None:
        """Close the breaker: a submit was accepted."""
        self._cause = None


class RetryQuota:
    """A token bucket for retries that successes refill. In a total outage, traffic tends to 1.0x instead of 3.0x.

    A retry costs `COST` tokens, and a success returns one. Source: the retry quota of the AWS SDKs ("standard" mode),
    with sizes of our own. One quota is shared by all requests that are safe to retry.
    """

    CAPACITY: Final = 100
    COST: Final = 5

    def __init__(self) -> None:
        self._tokens = self.CAPACITY

    def acquire(self) -> bool:
        """Take the tokens for one retry. Return False if too few are left."""
        if self._tokens < self.COST:
            return False
        self._tokens -= self.COST
        return True

    def release(self) -> None:
        """Return one token after a success."""
        self._tokens = min(self.CAPACITY, self._tokens + 1)
