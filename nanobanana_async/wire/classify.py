"""The meaning of each outcome of a submit: one table, read from the top. Pure.

A submit may be charged and has no idempotency key, so this table decides whether an account is charged twice. It rests
on measurement, not on exception names: only failures up to the connect phase prove that the service received nothing.
"""

import enum
from collections.abc import Callable
from typing import Final, TypeAlias

import attrs

from nanobanana_async.errors import (
    ApiError,
    AuthenticationError,
    ConfigurationError,
    InsufficientCredits,
    NanoBananaError,
    NotSent,
    SubmissionUnknown,
)
from nanobanana_async.protocols import ExchangeError, Phase, Verdict, WireResponse
from nanobanana_async.wire.codec import Envelope, to_api_error


class RetryRule(enum.Enum):
    """Whether a retry is allowed, if attempts and time are left. Three members are values of `ResubmitLevel`."""

    NO = "no"
    SAFE = "free"
    """A retry cannot cause a second charge."""
    AFTER_WAIT = "after wait"
    """Retry after the wait that the service asked for. It cannot cause a second charge."""
    ONCE = "once"
    """RFC 9110 says that the request was not processed. Retry once, unless the policy never resubmits."""
    API_5XX = "api-5xx"
    ANY_5XX = "any-5xx"
    ALWAYS = "always"


@attrs.frozen(kw_only=True)
class SubmitExchange:
    """The outcome of one POST, as far as it is known."""

    response: WireResponse | None = None
    """The response, complete or truncated; None if no status line arrived."""
    envelope: Envelope = attrs.field(factory=Envelope)
    """The decoded body of `response`."""
    failure: ExchangeError | None = None
    """Why the response is incomplete; None if it is complete."""
    is_doubted: bool = False
    """Whether an earlier POST of the same request ended under a doubtful rule."""

    @property
    def status(self) -> int:
        """HTTP status of a complete response; 0 if there is none."""
        return self.response.status if self.response is not None and self.failure is None else 0

    @property
    def is_permanent(self) -> bool:
        """Whether a retry would fail in the same way."""
        return self.failure is not None and self.failure.permanent

    @property
    def was_never_sent(self) -> bool:
        """Whether it failed before a byte of the request could be sent."""
        return self.failure is not None and self.failure.phase is Phase.CONNECT

    @property
    def is_rejection(self) -> bool:
        """Whether it is a complete error response of the service."""
        return self.failure is None and self.envelope.is_service_json and not self.envelope.ok

    @property
    def is_api_5xx(self) -> bool:
        """Whether a 5xx comes from the service's application rather than from a gateway that returns JSON."""
        return self.status in (500, 503) and self.is_rejection and self.envelope.code is not None


_Predicate: TypeAlias = Callable[[SubmitExchange], bool]


@attrs.frozen
class Rule:
    """One line of the table. The first one that matches decides."""

    name: str
    verdict: Verdict
    retry: RetryRule
    matches: _Predicate
    is_doubtful: bool = False
    """Whether the response proves too little to trust a second one for the same request."""


def refusal(exchange: SubmitExchange) -> ApiError | None:
    """Return the error if the service refused the key, or said that the account is empty. Otherwise None.

    A status of 5xx says nothing about the account, whatever its words.
    """
    if exchange.response is None or exchange.status >= 500:
        return None
    error = to_api_error(exchange.response, exchange.envelope)
    return error if isinstance(error, AuthenticationError | InsufficientCredits) else None


# Statuses of RFC 9110 (408, 421) and RFC 8470 (425) with which a server states that it did not process the request. A
# gateway with a time limit sends them after the application has begun, too.
_NOT_PROCESSED: Final = (408, 421, 425)

RULES: Final = (
    Rule("task id", Verdict.ACCEPTED, RetryRule.NO, lambda e: e.envelope.task_id is not None),
    Rule("permanent connect error", Verdict.NOT_CHARGED, RetryRule.NO, lambda e: e.was_never_sent and e.is_permanent),
    Rule("never connected", Verdict.NOT_CHARGED, RetryRule.SAFE, lambda e: e.was_never_sent),
    Rule("response lost or cut", Verdict.UNKNOWN, RetryRule.ALWAYS, lambda e: e.failure is not None),
    Rule("slow down", Verdict.NOT_CHARGED, RetryRule.AFTER_WAIT, lambda e: e.status == 429),
    Rule("no access, no credit", Verdict.NOT_CHARGED, RetryRule.NO, lambda e: refusal(e) is not None),
    Rule(
        "not processed by the service",
        Verdict.UNKNOWN,
        RetryRule.NO,
        lambda e: e.status in _NOT_PROCESSED and e.envelope.is_service_json,
    ),
    Rule("not processed again", Verdict.UNKNOWN, RetryRule.NO, lambda e: e.status in _NOT_PROCESSED and e.is_doubted),
    Rule("not processed", Verdict.UNKNOWN, RetryRule.ONCE, lambda e: e.status in _NOT_PROCESSED, is_doubtful=True),
    Rule("service's own 5xx", Verdict.UNKNOWN, RetryRule.API_5XX, lambda e: e.is_api_5xx),
    Rule("gateway", Verdict.UNKNOWN, RetryRule.ANY_5XX, lambda e: e.status >= 500),
    Rule("rejected", Verdict.REJECTED, RetryRule.NO, lambda e: e.is_rejection or e.status == 413),
    # A firewall, a captive portal or a wrong base URL: the request did not get as far as the service.
    Rule("another server again", Verdict.UNKNOWN, RetryRule.NO, lambda e: e.status >= 300 and e.is_doubted),
    Rule("another server", Verdict.NOT_CHARGED, RetryRule.NO, lambda e: e.status >= 300, is_doubtful=True),
    # A 200 without an id, or with a body that cannot be decoded: it was very likely charged.
    Rule("no id", Verdict.UNKNOWN, RetryRule.NO, lambda _: True),
)


def classify(exchange: SubmitExchange) -> Rule:
    """Return the rule that applies to *exchange*. One always does."""
    return next(rule for rule in RULES if rule.matches(exchange))


def submit_error(exchange: SubmitExchange, possible_charges: int, base_url: str) -> NanoBananaError:
    """Return the public error for a submit without a task id.

    *possible_charges* is the number of its POSTs, *exchange* included, that may have been charged.
    """
    detail = describe(exchange)
    if possible_charges:
        what, again = ("It may", "twice")
        if possible_charges > 1:
            what, again = f"{possible_charges} submits may each", "again"
        return SubmissionUnknown(
            f"submit outcome unknown: {detail}. {what} have been charged. Compare your balance to find out; submitting "
            f"again may charge you {again}.",
            status=exchange.response.status if exchange.response is not None else None,
            possible_duplicates=possible_charges - 1,
        )
    if exchange.response is not None:
        return to_api_error(exchange.response, exchange.envelope)
    if exchange.is_permanent:
        return ConfigurationError(f"{base_url} cannot be reached: {detail}")
    return NotSent(f"submit did not reach {base_url}; nothing was charged: {detail}")


def describe(exchange: SubmitExchange) -> str:
    """Return a one-line description of *exchange*."""
    message = ""
    if exchange.response is not None:  # a gateway's page often begins with the status
        status = str(exchange.response.status)
        code = "" if exchange.envelope.code is None else f" (code {exchange.envelope.code})"
        message = f"HTTP {status} {exchange.envelope.message.removeprefix(status).strip()}".strip() + code
    return "; ".join(filter(None, (str(exchange.failure or "").rstrip("."), message)))
