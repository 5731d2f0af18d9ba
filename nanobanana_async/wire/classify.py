"""What the outcome of a submit means: one table, read from the top. Pure.

A submit costs money and has no idempotency key, so this table decides who pays twice. It rests on measurement, not on
exception names: only failures up to the connect phase prove that the service saw nothing.
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
    """What became of a submit."""

    ACCEPTED = "accepted"
    """There is a task id: it is paid, and it is ours."""
    REJECTED = "rejected"
    """The service answered no: nothing is charged."""
    NOT_SENT = "not sent"
    """The service never worked on it."""
    UNKNOWN = "unknown"
    """It may have been paid, and no answer says so."""


class RetryRule(enum.Enum):
    """Whether sending it again is in order, attempts and time left allowing. Three are values of `ResubmitLevel`."""

    NO = "no"
    SAFE = "free"
    """It provably cannot pay twice."""
    ONCE = "once"
    """The same, but a second such answer is not a matter of luck."""
    AFTER_WAIT = "after wait"
    """When the service asked to slow down: after as long as it said."""
    API_5XX = "api-5xx"
    ANY_5XX = "any-5xx"
    ALWAYS = "always"

    @property
    def may_duplicate(self) -> bool:
        """Whether a repeat under this row counts as a possible duplicate."""
        return self in (RetryRule.API_5XX, RetryRule.ANY_5XX, RetryRule.ALWAYS)


@attrs.frozen(kw_only=True)
class SubmitExchange:
    """How one POST ended, as far as anybody can tell."""

    response: WireResponse | None = None
    """The reply, whole or cut; None when not even a status line came."""
    envelope: Envelope = attrs.field(factory=Envelope)
    """What the body of `reply` says."""
    failure: ExchangeError | None = None
    """Why the reply is not whole; None when it is."""

    @property
    def status(self) -> int:
        """The HTTP status of a whole reply; 0 when none came whole."""
        return self.response.status if self.response is not None and self.failure is None else 0

    @property
    def permanent(self) -> bool:
        """Whether the failure will be the same next time."""
        return self.failure is not None and self.failure.permanent

    @property
    def never_sent(self) -> bool:
        """Whether it failed before a byte of the request could have left."""
        return self.failure is not None and self.failure.phase is Phase.CONNECT


_Predicate: TypeAlias = Callable[[SubmitExchange], bool]


@attrs.frozen
class Rule:
    """One line of the table: the first whose test holds decides."""

    name: str
    verdict: Verdict
    retry: RetryRule
    matches: _Predicate


def _is_rejected(outcome: SubmitExchange) -> bool:
    """A whole, readable no of the vendor's own."""
    return outcome.failure is None and outcome.envelope.is_service_json and not outcome.envelope.ok


def _is_api_5xx(outcome: SubmitExchange) -> bool:
    """The vendor's application itself, and not a gateway that speaks JSON: its statuses, its numeric code."""
    return outcome.status in (500, 503) and _is_rejected(outcome) and outcome.envelope.code is not None


def _is_definite_refusal(outcome: SubmitExchange) -> bool:
    return outcome.response is not None and isinstance(
        to_api_error(outcome.response, outcome.envelope), AuthenticationError | InsufficientCredits
    )


RULES: Final = (
    Rule("task id", Verdict.ACCEPTED, RetryRule.NO, lambda o: o.envelope.task_id is not None),
    Rule("hopeless", Verdict.NOT_SENT, RetryRule.NO, lambda o: o.never_sent and o.permanent),
    Rule("never connected", Verdict.NOT_SENT, RetryRule.SAFE, lambda o: o.never_sent),
    Rule("reply lost or cut", Verdict.UNKNOWN, RetryRule.ALWAYS, lambda o: o.failure is not None),
    Rule("no access, no credit", Verdict.REJECTED, RetryRule.NO, _is_definite_refusal),
    # RFC 9110 (408, 421) and RFC 8470 (425): the server says that it did not process the request.
    Rule("not processed", Verdict.NOT_SENT, RetryRule.ONCE, lambda o: o.status in (408, 421, 425)),
    Rule("slow down", Verdict.REJECTED, RetryRule.AFTER_WAIT, lambda o: o.status == 429),
    Rule("vendor's own 5xx", Verdict.REJECTED, RetryRule.API_5XX, _is_api_5xx),
    Rule("gateway", Verdict.UNKNOWN, RetryRule.ANY_5XX, lambda o: o.status >= 500),
    Rule("redirect or 4xx", Verdict.REJECTED, RetryRule.NO, lambda o: o.status >= 300),
    Rule("code says no", Verdict.REJECTED, RetryRule.NO, _is_rejected),
    # 200 without an id, or with a body nobody can read: something happened, and very likely it was paid.
    Rule("no id", Verdict.UNKNOWN, RetryRule.NO, lambda _: True),
)


def classify(outcome: SubmitExchange) -> Rule:
    """Return the row that decides about *outcome*; the table is total."""
    return next(rule for rule in RULES if rule.matches(outcome))


def submit_error(outcome: SubmitExchange, rule: Rule, duplicates: int, base_url: str) -> NanoBananaError:
    """Return the public error for a submit that brought no task id."""
    detail = describe(outcome)
    if rule.verdict is Verdict.REJECTED and outcome.response is not None:
        error = to_api_error(outcome.response, outcome.envelope)
        error.possible_duplicates = duplicates
        return error
    if rule.verdict is Verdict.NOT_SENT and not duplicates:
        if outcome.permanent:
            return ConfigurationError(f"{base_url} cannot be reached like this: {detail}")
        return NotSent(f"the submit did not reach {base_url}, and nothing was charged: {detail}")
    return SubmissionUnknown(
        f"the submit may have been charged, and no task id is known: {detail}. Sending it again may pay twice; "
        "the balance before and after tells whether it was charged",
        status=outcome.response.status if outcome.response is not None else None,
        possible_duplicates=duplicates,
    )


def describe(outcome: SubmitExchange) -> str:
    """Return what is known of *outcome*, in words."""
    said = ""
    if outcome.response is not None:  # a gateway's page often begins with the status itself
        status = str(outcome.response.status)
        said = f"HTTP {status} {outcome.envelope.message.removeprefix(status).strip()}".strip()
    return "; ".join(filter(None, (str(outcome.failure or "").rstrip("."), said)))
