"""`SimulatorProfile`: how the simulated service behaves."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Final, Literal

import attrs
from attrs.validators import and_, ge, gt, in_, le

ERRORS: Final = (
    "rate_limited",
    "server_errors",
    "lost_responses",
    "charged_errors",
    "charged_timeouts",
    "captive_portals",
)
"""Rates of responses to submits, in the order in which they are drawn."""
RESULTS: Final = {
    "failed_tasks": "failed",
    "text_only": "text",
    "inline_images": "inline",
    "refusals": "refused",
    "empty_results": "empty",
}
"""Kinds of results by the name of their rate, in the order in which they are drawn. Others are images."""
FLAWS: Final = ("wrong_sizes", "wrong_ratios", "blank_images", "truncated_images")
"""Rates of images that are not as requested, in the order in which they are drawn."""


def _rate() -> float:
    return attrs.field(default=0.0, validator=and_(ge(0), le(1)))


@attrs.frozen(kw_only=True)
class SimulatorProfile:
    """Behaviour of the simulated service. Rates are fractions of submits, in [0, 1].

    Attributes:
        median_s: Median of the lognormal latency of a task (the real service: 8 to 60 s).
        sigma: Spread of the latency: the standard deviation of its logarithm.
        visibility_delay_s: Time for which a new id returns 404 (the real service: up to 30 s).
        failed_tasks: Rate of tasks that end as failed.
        text_only: Rate of tasks that end as success, with text and without an image.
        inline_images: Rate of tasks whose image is a data URI.
        server_errors: Rate of submits that get the service's own 500 and are not charged.
        rate_limited: Rate of submits that get a 429 with Retry-After: 1.
        lost_responses: Rate of submits that are charged and get a gateway's 502.
        charged_errors: Rate of submits that are charged and get the service's own 500.
        charged_timeouts: Rate of submits that are charged and get a gateway's 408.
        captive_portals: Rate of submits that get a redirect to a login page and are not charged.
        unstated_charges: Rate of tasks with an image whose `consumed` is null.
        wrong_sizes: Rate of images of half the side of the requested size; for 1k, of twice the side.
        wrong_ratios: Rate of images that are square, or 16:9 if a square was requested or no ratio.
        blank_images: Rate of images of one colour.
        truncated_images: Rate of image files that end too early.
        refusals: Rate of tasks that end as failed, with a reason that refuses the prompt.
        empty_results: Rate of tasks that end as success, with neither image nor text.
        price: Price of an image, in credits.
        size_prices: Price by `image_size`; `price` for others.
        failed_charge: `consumed` of tasks without an image. They are charged, except with `"zero"`, which gives
            the credits back.
        balance: Credits of the account at first.
        keys: API keys that are accepted.
        accounts: Account by key, whose tasks only its own keys can query. Keys that are not listed share one.
    """

    median_s: float = attrs.field(default=20.0, validator=gt(0))
    sigma: float = attrs.field(default=0.5, validator=ge(0))
    visibility_delay_s: float = attrs.field(default=1.0, validator=ge(0))
    failed_tasks: float = _rate()
    text_only: float = _rate()
    inline_images: float = _rate()
    server_errors: float = _rate()
    rate_limited: float = _rate()
    lost_responses: float = _rate()
    charged_errors: float = _rate()
    charged_timeouts: float = _rate()
    captive_portals: float = _rate()
    unstated_charges: float = _rate()
    wrong_sizes: float = _rate()
    wrong_ratios: float = _rate()
    blank_images: float = _rate()
    truncated_images: float = _rate()
    refusals: float = _rate()
    empty_results: float = _rate()
    price: Decimal = Decimal("0.5")
    size_prices: Mapping[str, Decimal] = attrs.field(factory=dict[str, Decimal])
    failed_charge: Literal["null", "missing", "zero", "price"] = attrs.field(
        default="null", validator=in_(("null", "missing", "zero", "price"))
    )
    balance: Decimal = Decimal(100_000)
    keys: frozenset[str] = frozenset({"dk-test"})
    accounts: Mapping[str, str] = attrs.field(factory=dict[str, str])

    @classmethod
    def from_faults(cls, text: str, **settings: object) -> "SimulatorProfile":
        """Return a profile with rates from text such as `"failed_tasks=0.05,inline_images=0.2"`.

        Raises:
            ValueError: A name is unknown, or a rate is not a number in [0, 1].
        """
        known = (*ERRORS, *RESULTS, *FLAWS, "unstated_charges")
        rates: dict[str, float] = {}
        for part in filter(None, (item.strip() for item in text.split(","))):
            name, _, value = part.partition("=")
            if name not in known:
                raise ValueError(f"faults: expected one of {', '.join(sorted(known))}, got {name!r}")
            rates[name] = float(value or 1)
        return cls(**rates, **settings)  # type: ignore[arg-type]  # both are float fields
