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
from nanobanana_async.wire.codec import Envelope, refusal


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
    FREE = "free"
    """It provably cannot pay twice."""
    ONCE = "once"
    """The same, but a second such answer is not a matter of luck."""
    AFTER_WAIT = "after wait"
    """When the service asked to slow down: after as long as it said."""
    ENVELOPE = "envelope"
    SERVER_ERRORS = "server-errors"
    ALWAYS = "always"

    @property
    def may_pay_twice(self) -> bool:
        """Whether a repeat under this row counts as a possible duplicate."""
        return self in (RetryRule.ENVELOPE, RetryRule.SERVER_ERRORS, RetryRule.ALWAYS)


@attrs.frozen(kw_only=True)
class SubmitExchange:
    """How one POST ended, as far as anybody can tell."""

    reply: WireResponse | None = None
    """The reply, whole or cut; None when not even a status line came."""
    envelope: Envelope = attrs.field(factory=Envelope)
    """What the body of `reply` says."""
    failure: ExchangeError | None = None
    """Why the reply is not whole; None when it is."""

    @property
    def status(self) -> int:
        """The HTTP status of a whole reply; 0 when none came whole."""
        return self.reply.status if self.reply is not None and self.failure is None else 0

    @property
    def permanent(self) -> bool:
        """Whether the failure will be the same next time."""
        return self.failure is not None and self.failure.permanent

    @property
    def unsent(self) -> bool:
        """Whether it failed before a byte of the request could have left."""
        return self.failure is not None and self.failure.phase is Phase.CONNECT


_Predicate: TypeAlias = Callable[[SubmitExchange], bool]


@attrs.frozen
class Rule:
    """One line of the table: the first whose test holds decides."""

    name: str
    verdict: Verdict
    repeat: RetryRule
    test: _Predicate


def _refused(outcome: SubmitExchange) -> bool:
    """A whole, readable no of the vendor's own."""
    return outcome.failure is None and outcome.envelope.is_vendor and not outcome.envelope.ok


def _own_error(outcome: SubmitExchange) -> bool:
    """The vendor's application itself, and not a gateway that speaks JSON: its statuses, its numeric code."""
    return outcome.status in (500, 503) and _refused(outcome) and outcome.envelope.code is not None


def _no_access_or_credit(outcome: SubmitExchange) -> bool:
    return outcome.reply is not None and isinstance(
        refusal(outcome.reply, outcome.envelope), AuthenticationError | InsufficientCredits
    )


TABLE: Final = (
    Rule("task id", Verdict.ACCEPTED, RetryRule.NO, lambda o: o.envelope.task_id is not None),
    Rule("hopeless", Verdict.NOT_SENT, RetryRule.NO, lambda o: o.unsent and o.permanent),
    Rule("never connected", Verdict.NOT_SENT, RetryRule.FREE, lambda o: o.unsent),
    Rule("reply lost or cut", Verdict.UNKNOWN, RetryRule.ALWAYS, lambda o: o.failure is not None),
    Rule("no access, no credit", Verdict.REJECTED, RetryRule.NO, _no_access_or_credit),
    # RFC 9110 (408, 421) and RFC 8470 (425): the server says that it did not process the request.
    Rule("not processed", Verdict.NOT_SENT, RetryRule.ONCE, lambda o: o.status in (408, 421, 425)),
    Rule("slow down", Verdict.REJECTED, RetryRule.AFTER_WAIT, lambda o: o.status == 429),
    Rule("vendor's own 5xx", Verdict.REJECTED, RetryRule.ENVELOPE, _own_error),
    Rule("gateway", Verdict.UNKNOWN, RetryRule.SERVER_ERRORS, lambda o: o.status >= 500),
    Rule("redirect or 4xx", Verdict.REJECTED, RetryRule.NO, lambda o: o.status >= 300),
    Rule("code says no", Verdict.REJECTED, RetryRule.NO, _refused),
    # 200 without an id, or with a body nobody can read: something happened, and very likely it was paid.
    Rule("no id", Verdict.UNKNOWN, RetryRule.NO, lambda _: True),
)


def judge(outcome: SubmitExchange) -> Rule:
    """Return the row that decides about *outcome*; the table is total."""
    return next(row for row in TABLE if row.test(outcome))


def submit_error(outcome: SubmitExchange, row: Rule, duplicates: int, base_url: str) -> NanoBananaError:
    """Return the public error for a submit that brought no task id."""
    told = story(outcome)
    if row.verdict is Verdict.REJECTED and outcome.reply is not None:
        error = refusal(outcome.reply, outcome.envelope)
        error.possible_duplicates = duplicates
        return error
    if row.verdict is Verdict.NOT_SENT and not duplicates:
        if outcome.permanent:
            return ConfigurationError(f"{base_url} cannot be reached like this: {told}")
        return NotSent(f"the submit did not reach {base_url}, and nothing was charged: {told}")
    return SubmissionUnknown(
        f"the submit may have been charged, and no task id is known: {told}. Sending it again may pay twice; "
        "the balance before and after tells whether it was charged",
        status=outcome.reply.status if outcome.reply is not None else None,
        sent_again=duplicates,
    )


def story(outcome: SubmitExchange) -> str:
    """Return what is known of *outcome*, in words."""
    said = ""
    if outcome.reply is not None:  # a gateway's page often begins with the status itself
        status = str(outcome.reply.status)
        said = f"HTTP {status} {outcome.envelope.message.removeprefix(status).strip()}".strip()
    return "; ".join(filter(None, (str(outcome.failure or "").rstrip("."), said)))
