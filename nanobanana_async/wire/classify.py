"""The meaning of each outcome of a submit: one table, read from the top. Pure.

A submit may be charged and has no idempotency key, so this table decides whether an account is charged twice. It rests
on measurement, not on exception names: only failures up to the connect phase prove that the service received nothing.
"""

import enum
from collections.abc import Callable
from typing import Final, TypeAlias

import attrs

from nanobanana_async.errors import (
    AuthenticationError,
    ConfigurationError,
    InsufficientCredits,
    NanoBananaError,
    NotSent,
    SubmissionUnknown,
)
from nanobanana_async.protocols import ExchangeError, Phase, WireResponse
from nanobanana_async.wire.codec import Envelope, to_api_error


class Verdict(enum.Enum):
    """What a submit has led to."""

    ACCEPTED = "accepted"
    """The task id is known: the task is charged."""
    REJECTED = "rejected"
    """The service rejected the request: nothing is charged."""
    NOT_SENT = "not sent"
    """The service did not process the request: nothing is charged."""
    UNKNOWN = "unknown"
    """The request may have been charged, but no response confirmed it."""


class RetryRule(enum.Enum):
    """Whether a retry is allowed, if attempts and time are left. Three members are values of `ResubmitLevel`."""

    NO = "no"
    SAFE = "free"
    """A retry cannot cause a second charge."""
    ONCE = "once"
    """A retry cannot cause a second charge, but a second such response is not a coincidence."""
    AFTER_WAIT = "after wait"
    """Retry after the wait that the service asked for."""
    API_5XX = "api-5xx"
    ANY_5XX = "any-5xx"
    ALWAYS = "always"

    @property
    def may_duplicate(self) -> bool:
        """Whether a retry under this rule counts as a possible duplicate."""
        return self in (RetryRule.API_5XX, RetryRule.ANY_5XX, RetryRule.ALWAYS)


@attrs.frozen(kw_only=True)
class SubmitExchange:
    """The outcome of one POST, as far as it is known."""

    response: WireResponse | None = None
    """The response, complete or truncated; None if no status line arrived."""
    envelope: Envelope = attrs.field(factory=Envelope)
    """The decoded body of `response`."""
    failure: ExchangeError | None = None
    """Why the response is incomplete; None if it is complete."""

    @property
    def status(self) -> int:
        """HTTP status of a complete response; 0 if there is none."""
        return self.response.status if self.response is not None and self.failure is None else 0

    @property
    def permanent(self) -> bool:
        """Whether a retry would fail in the same way."""
        return self.failure is not None and self.failure.permanent

    @property
    def never_sent(self) -> bool:
        """Whether it failed before a byte of the request could be sent."""
        return self.failure is not None and self.failure.phase is Phase.CONNECT


_Predicate: TypeAlias = Callable[[SubmitExchange], bool]


@attrs.frozen
class Rule:
    """One line of the table. The first one that matches decides."""

    name: str
    verdict: Verdict
    retry: RetryRule
    matches: _Predicate


def _is_rejected(outcome: SubmitExchange) -> bool:
    """Return whether it is a complete error response of the service."""
    return outcome.failure is None and outcome.envelope.is_service_json and not outcome.envelope.ok


def _is_api_5xx(outcome: SubmitExchange) -> bool:
    """Return whether a 5xx comes from the service's application rather than from a gateway that returns JSON."""
    return outcome.status in (500, 503) and _is_rejected(outcome) and outcome.envelope.code is not None


def _is_definite_refusal(outcome: SubmitExchange) -> bool:
    return outcome.response is not None and isinstance(
        to_api_error(outcome.response, outcome.envelope), AuthenticationError | InsufficientCredits
    )


RULES: Final = (
    Rule("task id", Verdict.ACCEPTED, RetryRule.NO, lambda o: o.envelope.task_id is not None),
    Rule("permanent connect error", Verdict.NOT_SENT, RetryRule.NO, lambda o: o.never_sent and o.permanent),
    Rule("never connected", Verdict.NOT_SENT, RetryRule.SAFE, lambda o: o.never_sent),
    Rule("response lost or cut", Verdict.UNKNOWN, RetryRule.ALWAYS, lambda o: o.failure is not None),
    Rule("no access, no credit", Verdict.REJECTED, RetryRule.NO, _is_definite_refusal),
    # RFC 9110 (408, 421) and RFC 8470 (425): the server states that it did not process the request.
    Rule("not processed", Verdict.NOT_SENT, RetryRule.ONCE, lambda o: o.status in (408, 421, 425)),
    Rule("slow down", Verdict.REJECTED, RetryRule.AFTER_WAIT, lambda o: o.status == 429),
    Rule("service's own 5xx", Verdict.REJECTED, RetryRule.API_5XX, _is_api_5xx),
    Rule("gateway", Verdict.UNKNOWN, RetryRule.ANY_5XX, lambda o: o.status >= 500),
    Rule("redirect or 4xx", Verdict.REJECTED, RetryRule.NO, lambda o: o.status >= 300),
    Rule("code says no", Verdict.REJECTED, RetryRule.NO, _is_rejected),
    # A 200 without an id, or with a body that cannot be decoded: it was very likely charged.
    Rule("no id", Verdict.UNKNOWN, RetryRule.NO, lambda _: True),
)


def classify(outcome: SubmitExchange) -> Rule:
    """Return the rule that applies to *outcome*. One always does."""
    return next(rule for rule in RULES if rule.matches(outcome))


def submit_error(outcome: SubmitExchange, rule: Rule, duplicates: int, base_url: str) -> NanoBananaError:
    """Return the public error for a submit without a task id."""
    detail = describe(outcome)
    if rule.verdict is Verdict.REJECTED and outcome.response is not None:
        error = to_api_error(outcome.response, outcome.envelope)
        error.possible_duplicates = duplicates
        return error
    if rule.verdict is Verdict.NOT_SENT and not duplicates:
        if outcome.permanent:
            return ConfigurationError(f"{base_url} cannot be reached: {detail}")
        return NotSent(f"submit did not reach {base_url}; nothing was charged: {detail}")
    return SubmissionUnknown(
        f"submit outcome unknown: {detail}. It may have been charged. Compare your balance to find out; submitting "
        "again may charge you twice.",
        status=outcome.response.status if outcome.response is not None else None,
        possible_duplicates=duplicates,
    )


def describe(outcome: SubmitExchange) -> str:
    """Return a one-line description of *outcome*."""
    message = ""
    if outcome.response is not None:  # a gateway's page often begins with the status
        status = str(outcome.response.status)
        message = f"HTTP {status} {outcome.envelope.message.removeprefix(status).strip()}".strip()
    return "; ".join(filter(None, (str(outcome.failure or "").rstrip("."), message)))
