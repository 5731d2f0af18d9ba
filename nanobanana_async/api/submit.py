"""The submit loop: slot, attempt record, POST, classification, and a resubmit as far as the policy allows.

One submit passes five gates: a slot, the rate limiter, the breaker, the state of the client, and the record of the
attempt. Once the attempt is recorded, it runs in a shielded task, and its caller may be cancelled.
"""

import logging
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeAlias

import anyio
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup, ShieldedWorkCancelled
from nanobanana_async._concurrency.slots import Slot
from nanobanana_async.api.flow_control import FlowControl
from nanobanana_async.api.operations import authorized, run_maybe_in_thread
from nanobanana_async.api.rate_limit import asked_wait_s
from nanobanana_async.api.retry import CircuitBreaker
from nanobanana_async.api.turn import Turn
from nanobanana_async.errors import ApiError, ClientClosed, NanoBananaError, NotSent, RateLimited
from nanobanana_async.models import GenerationRequest
from nanobanana_async.policies import Timeouts
from nanobanana_async.protocols import (
    AttemptEnd,
    ExchangeError,
    Phase,
    RequestKind,
    SubmitRecord,
    Transport,
    Verdict,
    WireRequest,
    WireResponse,
)
from nanobanana_async.wire import codec
from nanobanana_async.wire.classify import RetryRule, Rule, SubmitExchange, classify, describe, refusal, submit_error
from nanobanana_async.wire.endpoint import Endpoint

Reserve: TypeAlias = Callable[[int], Awaitable[None]]
"""Waits until as many bytes may be held in memory."""
PrepareRequest: TypeAlias = Callable[[GenerationRequest, Reserve], Awaitable[GenerationRequest]]

_log: Final = logging.getLogger("nanobanana_async")

NO_SLOT_MESSAGE: Final = "timed out waiting for a submit slot; nothing was sent"


@attrs.frozen
class AcceptedSubmit:
    """A submit that was accepted."""

    task_id: str
    possible_duplicates: int
    """Number of earlier submits of the same call that may have been charged."""


class NoRecord:
    """A `SubmitRecord` that stores nothing."""

    is_doubted = False

    async def begin_attempt(self, nonce: str | None) -> None:
        """See `SubmitRecord.begin_attempt`."""

    async def end_attempt(self, end: AttemptEnd) -> None:
        """See `SubmitRecord.end_attempt`."""


NO_RECORD: Final = NoRecord()


@attrs.define(eq=False)
class _Submit:
    """The state of one call of `SubmitLoop.submit`."""

    request: GenerationRequest
    turn: Turn
    record: SubmitRecord
    nonce: str | None
    on_orphan: Callable[[AcceptedSubmit], None]
    wire: WireRequest | None = None
    """The encoded request, while the submit has a slot."""
    exchange_deadline_s: float = math.inf
    """When the exchanges of all attempts end, counted from the first one."""
    is_doubted: bool = False
    """Whether an earlier attempt got a response that does not prove whether it was charged."""
    possible_charges: int = 0
    """Attempts that may have been charged without a task id."""


@attrs.frozen
class _Attempt:
    """One POST that has ended."""

    rule: Rule
    end: AttemptEnd
    refusal: ApiError | None = None
    """The rejection that every submit would get, of the key or of the account; None otherwise."""
    wait_s: float | None = None
    """After how many seconds the submit may be sent again, if it was throttled."""


_Wait: TypeAlias = Callable[[_Submit], Awaitable[bool]]
"""Waits for the next attempt. Returns False if a deadline comes first."""


class SubmitLoop:
    """Submits requests, each within a slot of the caller.

    Args:
        transport: Sends the POSTs.
        background: Runs them.
        endpoint: Base URL and key.
        flow: Rate limiter and retries.
        timeouts: `submit_s` bounds the attempts of one call together.
        prepare: Turns the images of a request into strings, after it has reserved their memory. Waiting calls hold no
            images, because the slot comes first.
    """

    def __init__(
        self,
        transport: Transport,
        background: BackgroundTaskGroup,
        endpoint: Endpoint,
        flow: FlowControl,
        timeouts: Timeouts,
        *,
        prepare: PrepareRequest,
    ) -> None:
        self._transport = transport
        self._background = background
        self._endpoint = endpoint
        self._flow = flow
        self._timeouts = timeouts
        self._breaker = CircuitBreaker()
        self._prepare = prepare

    async def submit(
        self,
        request: GenerationRequest,
        turn: Turn,
        *,
        record: SubmitRecord = NO_RECORD,
        nonce: str | None = None,
        on_orphan: Callable[[AcceptedSubmit], None] = lambda _: None,
    ) -> AcceptedSubmit:
        """Submit *request* with the slot of *turn*. *nonce* identifies its callback, for the *record*.

        After a 429 the slot is given back, and the submit waits for its turn again, until the deadline of *turn*. A
        POST in flight is waited for within `Timeouts.submit_s`, because its response has the task id. If the caller is
        cancelled, the POST runs to its end in the background, with a share of the slot. The task id is then recorded,
        logged, and passed to *on_orphan*.

        Raises:
            NotSent: Nothing was charged: no connection, or no turn by the deadline.
            RateLimited: The wait that the service asked for passes the deadline. Nothing was charged.
            SubmissionUnknown: At least one POST may have been charged, and no task id is known.
            ApiError: The service rejected the request. Nothing was charged.
            ConfigurationError: The service cannot be reached in this way.
        """
        await self._background.ensure_started()
        submit = _Submit(request, turn, record, nonce, on_orphan, is_doubted=record.is_doubted)
        await self._encode(submit)
        return await self._attempt_until_settled(submit)

    async def _encode(self, submit: _Submit) -> None:
        """Encode the request. Its memory is held as long as the slot.

        Raises:
            NotSent: The deadline came before there was memory.
        """
        assert submit.turn.slot is not None  # noqa: S101 - taken before
        lease, encoding = self._flow.uploads.lease(), self._flow.encoding.lease()
        submit.turn.slot.call_when_released(lease.release)

        async def reserve(size_bytes: int) -> None:
            await lease.resize(size_bytes)
            await encoding.resize(size_bytes)

        with encoding, anyio.CancelScope(deadline=submit.turn.deadline_s):
            ready = await self._prepare(submit.request, reserve)
            size_bytes = sum(len(image) for image in ready.images if isinstance(image, str))
            encode = partial(codec.encode_submit, self._endpoint.base_url, ready)
            submit.wire = await run_maybe_in_thread(size_bytes, encode)
            return
        raise NotSent(NO_SLOT_MESSAGE)

    async def _attempt_until_settled(self, submit: _Submit) -> AcceptedSubmit:
        attempts = 0
        error: NanoBananaError | None = None
        wait: _Wait = self._pass_gates
        while await self._may_send(submit, wait, error):
            attempts += 1
            try:
                attempt = await self._attempt_shielded(submit)
            except NotSent as exc:  # the record refuses a further attempt
                _log.info("submit: %s", exc)
                raise (exc if error is None else error) from None
            if attempt.end.task_id is not None:
                return AcceptedSubmit(attempt.end.task_id, submit.possible_charges)
            error = attempt.end.error or error
            if attempt.wait_s is not None:
                attempts -= 1  # a 429 is no failure
                wait = partial(self._wait_for_turn, wait_s=attempt.wait_s)
            elif self._may_retry(attempt.rule, attempts):
                wait = partial(self._back_off, attempts=attempts)
            else:
                break
            _log.info("submit: an attempt ended as %r; sending again", attempt.rule.name)
        raise error or NotSent(NO_SLOT_MESSAGE)

    async def _may_send(self, submit: _Submit, wait: _Wait, error: NanoBananaError | None) -> bool:
        """Wait for the next attempt. Return False if *error*, the last outcome, is to be raised."""
        try:
            return await wait(submit)
        except NanoBananaError:
            if error is None or (isinstance(error, RateLimited) and not submit.possible_charges):
                raise
            return False  # closed, rejected, or an image is gone, but an earlier attempt may have been charged
        except BaseException:
            if error is not None and not isinstance(error, RateLimited):
                _log.warning("submit was cancelled between two attempts; the last one ended with: %s", error)
            raise

    async def _wait_for_turn(self, submit: _Submit, *, wait_s: float) -> bool:
        """Give the slot and the body back, and wait for the next turn. Return False if the deadline comes first."""
        if anyio.current_time() + wait_s >= submit.turn.deadline_s:
            return False
        submit.wire, submit.exchange_deadline_s = None, math.inf
        submit.turn.give_back()
        await anyio.sleep(wait_s)
        try:
            await submit.turn.take()
        except TimeoutError:
            return False
        await self._encode(submit)
        return await self._pass_gates(submit)

    async def _back_off(self, submit: _Submit, *, attempts: int) -> bool:
        deadline_s = min(submit.turn.deadline_s, submit.exchange_deadline_s)
        return await self._flow.back_off(attempts, deadline_s) and await self._pass_gates(submit)

    async def _pass_gates(self, submit: _Submit) -> bool:
        """Wait for the rate limiter. Return False if the deadline came first."""
        deadline_s = min(submit.turn.deadline_s, submit.exchange_deadline_s)
        with anyio.CancelScope(deadline=deadline_s):
            await self._flow.acquire(RequestKind.SUBMIT)
            if anyio.current_time() >= deadline_s:
                return False
            self._background.check_open()
            self._breaker.check()
            return True
        return False

    def _may_retry(self, rule: Rule, attempts: int) -> bool:
        match rule.retry:
            case RetryRule.NO:
                return False
            case RetryRule.SAFE | RetryRule.AFTER_WAIT:
                allowed = True
            case RetryRule.ONCE:
                allowed = self._flow.retry.resubmit != "never"
            case _:
                allowed = self._flow.retry.allows_resubmit(rule.retry.value)
        return allowed and self._flow.may_retry(attempts)

    # --- one attempt ------------------------------------------------------------------------------------------------

    async def _attempt_shielded(self, submit: _Submit) -> _Attempt:
        """Send once, in a task that runs to its end even if the caller is cancelled.

        No checkpoint separates the record of the attempt from its shield.
        """
        with self._background.keep_open():  # the ledger, too, until the attempt has an end
            await self._begin_attempt(submit)
            now_s = anyio.current_time()
            submit.exchange_deadline_s = min(submit.exchange_deadline_s, now_s + self._timeouts.submit_s)
            try:
                self._background.check_open()
                assert submit.turn.slot is not None  # noqa: S101 - taken before each attempt
                attempt = partial(self._attempt, submit, submit.turn.slot.share())
                return await self._background.shield(attempt, on_abandoned=partial(self._on_abandoned, submit))
            except ClientClosed as exc:  # while the attempt was recorded: nothing was sent
                never = self._judge(submit, SubmitExchange(failure=ExchangeError(str(exc), phase=Phase.CONNECT)))
                await submit.record.end_attempt(never.end)
                return never
            except ShieldedWorkCancelled:
                failure = ExchangeError("the client was closed during the exchange", phase=Phase.SEND)
                return self._judge(submit, SubmitExchange(failure=failure))

    async def _begin_attempt(self, submit: _Submit) -> None:
        """Record that an attempt begins, within `Timeouts.submit_s`: a ledger of the application may hang."""
        with anyio.move_on_after(self._timeouts.submit_s):
            await submit.record.begin_attempt(submit.nonce)
            return
        reason = f"the attempt was not recorded within {self._timeouts.submit_s:g} s. Nothing was sent"
        never = self._judge(submit, SubmitExchange(failure=ExchangeError(reason, phase=Phase.CONNECT)))
        with anyio.move_on_after(self._timeouts.close_s):  # it may be recorded all the same
            await submit.record.end_attempt(never.end)
        raise NotSent(reason)

    async def _attempt(self, submit: _Submit, slot: Slot) -> _Attempt:
        with slot:
            sent_s = anyio.current_time()
            assert submit.wire is not None  # noqa: S101 - encoded with the slot
            exchange = await self._exchange(submit.wire, submit.exchange_deadline_s - sent_s)
        wait_s = self._flow.observe_submit(exchange.response, sent_s, len(submit.wire.body or b""))
        attempt = attrs.evolve(self._judge(submit, exchange), wait_s=wait_s)
        self._update_breaker(attempt)
        try:
            await submit.record.end_attempt(attempt.end)
        except NanoBananaError as exc:
            if (task_id := attempt.end.task_id) is not None:  # the error may find no caller any more
                exc.task_id = task_id
                _log.error("task %s is charged and could not be recorded: %s", task_id, exc)
                submit.on_orphan(AcceptedSubmit(task_id, submit.possible_charges))
            raise
        return attempt

    async def _exchange(self, wire: WireRequest, timeout_s: float) -> SubmitExchange:
        response: WireResponse | None
        failure = None
        try:
            response = await self._transport.send(authorized(wire, self._endpoint), timeout_s=timeout_s)
        except ExchangeError as exc:
            response, failure = exc.response, self._endpoint.redact_error(exc)
        except anyio.get_cancelled_exc_class():
            _log.warning("submit was interrupted by closing the client; it may have been charged")
            raise
        if response is None:
            return SubmitExchange(failure=failure)
        response = self._endpoint.redact_response(response)
        envelope = codec.decode_envelope(response)
        if envelope.task_id is not None and envelope.data.get("task_id") != envelope.task_id:
            # Found elsewhere in the response: an id that the request itself contains is quoted.
            is_quoted = envelope.task_id.encode("utf-8", "replace") in (wire.body or b"")
            envelope = attrs.evolve(envelope, task_id=None) if is_quoted else envelope
        return SubmitExchange(response=response, envelope=envelope, failure=failure)

    def _judge(self, submit: _Submit, exchange: SubmitExchange) -> _Attempt:
        """Classify *exchange*, the end of one attempt, and count what it may have been charged."""
        rule = classify(attrs.evolve(exchange, is_doubted=submit.is_doubted))
        submit.is_doubted = submit.is_doubted or rule.is_doubtful
        if rule.verdict is Verdict.ACCEPTED:
            task_id = exchange.envelope.task_id
            if exchange.failure is not None or not exchange.envelope.ok:
                _log.warning("task %s was accepted with an unusual response: %s", task_id, describe(exchange))
            if submit.possible_charges:
                _log.warning("task %s: possible duplicates: %d", task_id, submit.possible_charges)
            return _Attempt(rule, AttemptEnd(verdict=rule.verdict, rule=rule.name, task_id=task_id))
        if rule.verdict is Verdict.UNKNOWN:
            submit.possible_charges += 1
        error = submit_error(exchange, submit.possible_charges, self._endpoint.base_url)
        if isinstance(error, ApiError) and exchange.response is not None:
            error.retry_after_s = asked_wait_s(exchange.response)
        end = AttemptEnd(verdict=rule.verdict, rule=rule.name, is_doubtful=rule.is_doubtful, error=error)
        return _Attempt(rule, end, refusal(exchange))

    def _update_breaker(self, attempt: _Attempt) -> None:
        """Open the breaker on a rejection that every submit would get. Close it when a submit is accepted."""
        if attempt.rule.verdict is Verdict.ACCEPTED:
            self._breaker.reset()
        elif attempt.refusal is not None:
            self._breaker.trip(attempt.refusal)

    def _on_abandoned(self, submit: _Submit, attempt: _Attempt) -> None:
        """Log the result of a submit whose caller was cancelled, because the log is the last place for its task id."""
        if attempt.rule.verdict is Verdict.UNKNOWN:
            _log.warning("abandoned submit may have been charged: %s", attempt.end.error)
        task_id = attempt.end.task_id
        if task_id is None:
            return
        _log.warning("task %s was accepted after its caller was cancelled", task_id)
        submit.on_orphan(AcceptedSubmit(task_id, submit.possible_charges))
