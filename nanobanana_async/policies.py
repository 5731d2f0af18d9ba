"""Frozen policy values and their arithmetic. Seconds throughout. No I/O, no clock of their own."""

from random import Random
from typing import Final, Literal, TypeAlias

import attrs
from attrs.validators import ge, gt, in_, le, lt

Resubmit: TypeAlias = Literal["never", "envelope", "server-errors", "always"]

RESUBMIT_LEVELS: Final[tuple[Resubmit, ...]] = ("never", "envelope", "server-errors", "always")
"""From the safest to the boldest: each level sends again in all cases of the ones before it."""


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often something is tried, and which unanswered submits are sent again."""

    attempts: int = attrs.field(default=3, validator=[ge(1), le(10)])
    """Tries in all, the first included."""
    first_s: float = attrs.field(default=0.5, validator=gt(0))
    """Upper bound of the first pause; it doubles with each further one."""
    cap_s: float = attrs.field(default=8.0, validator=gt(0))
    """Upper bound of any pause."""
    resubmit: Resubmit = attrs.field(default="envelope", validator=in_(RESUBMIT_LEVELS))
    """When a submit that may have been paid is sent again.

    `"envelope"`: only after the vendor's own JSON error with a 5xx status, as its documentation advises.
    `"server-errors"`: after any 5xx, gateways included. `"always"`: also after time-outs and lost connections.
    `"never"`: not at all. Requests that provably never arrived are sent again under every setting.
    """

    def pause_s(self, tries: int, rng: Random) -> float:
        """Return the pause after *tries* failed tries: full jitter, uniform in [0, min(cap, first * 2^(tries-1))].

        Source: "Exponential Backoff And Jitter", AWS Architecture Blog; full jitter sends the fewest calls.
        """
        return rng.uniform(0.0, min(self.cap_s, self.first_s * 2.0 ** min(tries - 1, 32)))

    def resends(self, level: Resubmit) -> bool:
        """Tell whether this policy sends again what only *level* and bolder ones would."""
        return RESUBMIT_LEVELS.index(self.resubmit) >= RESUBMIT_LEVELS.index(level)


@attrs.frozen(kw_only=True)
class PollPolicy:
    """How often one unfinished task is asked about.

    The first look comes `first_s` after the submit; the pauses after it start at `pause_s`, grow by `factor`, and
    end at `cap_s`. Pictures usually take 8 to 60 seconds.
    """

    first_s: float = attrs.field(default=8.0, validator=gt(0))
    pause_s: float = attrs.field(default=2.5, validator=gt(0))
    factor: float = attrs.field(default=1.3, validator=[ge(1), le(10)])
    cap_s: float = attrs.field(default=10.0, validator=gt(0))
    jitter: float = attrs.field(default=0.2, validator=[ge(0), lt(1)])
    """Largest deviation as a share of the pause: 0.2 means +/-20 %."""


@attrs.frozen(kw_only=True)
class Limits:
    """How much is on the wire at once, and how fast it goes out."""

    submits: int = attrs.field(default=16, validator=ge(1))
    """Submits in flight. Each may carry up to four reference images."""
    polls: int = attrs.field(default=64, validator=ge(1))
    """Queries in flight, whatever the number of tasks."""
    downloads: int = attrs.field(default=16, validator=ge(1))
    """Pictures on their way to memory or disk."""
    requests_per_s: float = attrs.field(default=100.0, validator=gt(0))
    """API requests (submits and queries together) per second, averaged."""
    burst: int = attrs.field(default=20, validator=ge(1))
    """API requests that may leave at once after a quiet time."""
    image_bytes: int = attrs.field(default=50 * 2**20, validator=ge(1))
    """Largest picture that is downloaded."""
    reference_bytes: int = attrs.field(default=10 * 2**20, validator=ge(1))
    """Largest reference image that is sent (other clients of the service keep to 10 MB)."""


@attrs.frozen(kw_only=True)
class Timeouts:
    """How long things may take. None of them is infinite."""

    connect_s: float = attrs.field(default=10.0, validator=gt(0))
    submit_s: float = attrs.field(default=60.0, validator=gt(0))
    """One submit, its safe retries included, counted from when it may go out. An upload of four large reference
    images has to fit in it."""
    query_s: float = attrs.field(default=20.0, validator=gt(0))
    """One query or balance call, its retries included."""
    download_s: float = attrs.field(default=120.0, validator=gt(0))
    """One picture, its retries included, counted from its turn (`Limits.downloads`)."""
    task_s: float = attrs.field(default=900.0, validator=gt(0))
    """How long `generate`, `result`, `wait` and `updates` wait when they are not told, and how long a submit may wait
    for its turn. Minutes are possible."""
    close_s: float = attrs.field(default=10.0, validator=gt(0))
    """How long `aclose` spends on saying goodbye, beyond what a submit on the wire still needs."""
