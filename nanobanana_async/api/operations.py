"""The service's operations, one awaitable each: encode, pace, send, judge, and try again where that is safe."""

import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from decimal import Decimal
from functools import partial
from random import Random
from typing import Final, TypeAlias, TypeVar

import anyio
import anyio.to_thread
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup, ShieldedWorkCancelled
from nanobanana_async._concurrency.slots import Admission
from nanobanana_async.api.rate_limit import AdaptiveRateLimiter, CircuitBreaker, RetryQuota, retry_after_s
from nanobanana_async.errors import (
    ApiError,
    AuthenticationError,
    ConfigurationError,
    InsufficientCredits,
    NanoBananaError,
    NotSent,
    RateLimited,
    ServiceUnavailable,
    TransportError,
)
from nanobanana_async.models import GenerationRequest, Task
from nanobanana_async.policies import Limits, RetryPolicy, Timeouts
from nanobanana_async.protocols import ExchangeError, Phase, Transport, WireRequest, WireResponse
from nanobanana_async.transport.checked import exchange
from nanobanana_async.wire import codec
from nanobanana_async.wire.classify import RetryRule, Rule, SubmitExchange, Verdict, judge, story, submit_error
from nanobanana_async.wire.endpoint import Endpoint

T = TypeVar("T")
PrepareRequest: TypeAlias = Callable[[GenerationRequest], Awaitable[GenerationRequest]]
BeforeSend: TypeAlias = Callable[[], Awaitable[None]]

_log: Final = logging.getLogger("nanobanana_async")

_NO_TURN: Final = "the time was up before the submit had its turn; nothing was sent"
_OUTAGE: Final = 3
"""So many requests in a row that bring no answer are trouble of the service, not of one task."""

_LARGE_BYTES: Final = 2**20
"""Requests and replies longer than this hold pictures; to encode or decode them would stall the loop."""


@attrs.frozen
class AcceptedSubmit:
    """A submit that was accepted."""

    task_id: str
    possible_duplicates: int
    """Times it was sent again, under the retry policy, although the time before may have been charged."""


class ServiceApi:
    """What the service offers, as this client may use it: paced, bounded, retried where that cannot pay twice."""

    def __init__(
        self,
        transport: Transport,
        host: BackgroundTaskGroup,
        endpoint: Endpoint,
        limits: Limits,
        retry: RetryPolicy,
        timeouts: Timeouts,
    ) -> None:
        self._transport = transport
        self._host = host
        self._endpoint = endpoint
        self._retry = retry
        self._timeouts = timeouts
        self._rng = Random()
        self._pacer = AdaptiveRateLimiter(limits.requests_per_s, limits.burst)
        self._quota = RetryQuota()
        self._breaker = CircuitBreaker()
        self.on_orphan: Callable[[AcceptedSubmit, GenerationRequest], None] | None = None
        """Told of each task that was accepted after its caller had gone."""
        self._hushes = 0
        self._failures = 0
        self._submit_gate = anyio.Lock(fast_acquire=True)
        self._admission = Admission(limits.submits)
        """For submits from preparing to outcome. A slot, below, is for the exchange, which may outlive its caller."""
        self._submit_slots = anyio.Semaphore(limits.submits)
        self._poll_slots = anyio.Semaphore(limits.polls)

    async def submit(
        self,
        request: GenerationRequest,
        prepare: PrepareRequest,
        *,
        give_up_at_s: float,
        before_send: BeforeSend | None = None,
    ) -> AcceptedSubmit:
        """Ask for one picture and return its task id.

        *prepare* makes the images of *request* strings. It is called when the submit is let in, so that those who
        queue cost little, however large their images. *before_send* is awaited before each POST, when its turn has
        come; if it raises, nothing is sent. *give_up_at_s* (on the event loop's clock) bounds the waiting.
        Cancelling, or giving up, while the POST is on the wire does not tear it: it runs to its end in the background,
        and an id it brings is logged.

        Raises:
            NotSent: Nothing was charged: no connection, or no turn by *give_up_at_s*.
            SubmissionUnknown: It may have been charged; nothing says so.
            ApiError: The service said no.
            ConfigurationError: It can never work like this.
        """
        await self._host.ensure()
        if not await self._admission.enter(give_up_at_s, self._host.start_soon):
            raise NotSent(_NO_TURN)
        try:
            ready = await prepare(request)
            size_bytes = sum(len(image) for image in ready.images if isinstance(image, str))
            encode = partial(codec.encode_submit, self._endpoint.base_url, ready)
            wire = self._signed(await _where_it_fits(size_bytes, encode))
            return await self._submit(wire, request, give_up_at_s, before_send)
        finally:
            self._admission.leave()

    async def query(self, task_id: str) -> Task:
        """Return how the task stands, retrying within `Timeouts.query_s`.

        Raises:
            TransportError: No usable answer came.
            ApiError: The service said no; `TaskNotFound` also for a fresh id that is not visible yet.
        """
        wire = self._signed(codec.encode_query(self._endpoint.base_url, task_id))
        return await self._read(wire, partial(codec.decode_task, task_id=task_id))

    async def balance(self) -> Decimal:
        """Return the credits left, retrying within `Timeouts.query_s`. Raises as `query` does."""
        wire = self._signed(codec.encode_balance(self._endpoint.base_url))
        return await self._read(wire, codec.decode_balance)

    @property
    def polls_per_s(self) -> float:
        """How many queries may leave per second: what the pacer allows, or half of it while submits queue."""
        return self._pacer.rate * (0.5 if self._submit_gate.locked() else 1.0)

    async def take_turn(self) -> None:
        """Wait for a poll slot and for the pacer. `look` gives the slot back, or else `drop_turn`."""
        await self._slot_and_permit(self._poll_slots, None)

    def drop_turn(self) -> None:
        """Give the poll slot back unused."""
        self._poll_slots.release()

    async def look(self, task_id: str) -> Task:
        """Query once, after `take_turn`. Raises as `query` does."""
        wire = self._signed(codec.encode_query(self._endpoint.base_url, task_id))
        return await self._get(wire, partial(codec.decode_task, task_id=task_id), self._timeouts.query_s)

    # --- how they travel --------------------------------------------------------------------------------------------

    async def _submit(
        self, wire: WireRequest, request: GenerationRequest, give_up_at_s: float, before_send: BeforeSend | None
    ) -> AcceptedSubmit:
        tries, duplicates, done_by_s = 0, 0, math.inf
        error: NanoBananaError = NotSent(_NO_TURN)
        while await self._next_try(error, tries, min(give_up_at_s, done_by_s)):
            tries += 1
            if before_send is not None:
                await self._hooked(before_send)
            done_by_s = min(done_by_s, anyio.current_time() + self._timeouts.submit_s)
            outcome = await self._post(wire, request, give_up_at_s=give_up_at_s, done_by_s=done_by_s)
            row = judge(outcome)
            if row.verdict is Verdict.ACCEPTED:
                return _accepted(outcome, duplicates)
            error = submit_error(outcome, row, duplicates, self._endpoint.base_url)
            if isinstance(error, ApiError) and outcome.reply is not None:
                error.retry_after_s = retry_after_s(outcome.reply.headers)
            # Whoever keeps books has to close them between tries that cost nothing, and may try again himself.
            is_theirs = before_send is not None and not row.repeat.may_pay_twice
            if is_theirs or not self._may_repeat(row, tries):
                break
            duplicates += row.repeat.may_pay_twice
            _log.info("submit: try %d ended as %r (%s); trying again", tries, row.name, row.verdict.value)
        raise error

    async def _hooked(self, before_send: BeforeSend) -> None:
        try:
            await before_send()
        except BaseException:
            self._submit_slots.release()
            raise

    def _signed(self, wire: WireRequest) -> WireRequest:
        return attrs.evolve(wire, headers={**self._endpoint.headers, **wire.headers})

    async def _post(
        self, wire: WireRequest, request: GenerationRequest, *, give_up_at_s: float, done_by_s: float
    ) -> SubmitExchange:
        """Send once. The exchange belongs to the host: it runs to its end whatever becomes of the caller."""
        exchange = partial(self._exchange, wire, done_by_s)
        with anyio.CancelScope(deadline=give_up_at_s):
            try:
                return await self._host.shelter(exchange, orphaned=partial(self._orphaned, request))
            except ShieldedWorkCancelled:
                return SubmitExchange(
                    failure=ExchangeError("the client was closed while it was under way", phase=Phase.SEND)
                )
        reason = "no answer yet when the caller's time was up; it runs on, and an id it brings will be logged"
        return SubmitExchange(failure=ExchangeError(reason, phase=Phase.SEND))

    async def _exchange(self, wire: WireRequest, done_by_s: float) -> SubmitExchange:
        sent_s = anyio.current_time()
        try:
            reply = await exchange(self._transport, wire, timeout_s=done_by_s - sent_s)
            outcome = self._read_outcome(reply, None)
        except ExchangeError as exc:
            outcome = self._read_outcome(exc.reply, self._endpoint.failure_without_key(exc))
        except anyio.get_cancelled_exc_class():
            _log.warning("a submit was cut off when the client was closed; it may have been charged")
            raise
        finally:
            self._submit_slots.release()
        self._note(outcome)
        self._heed(outcome.reply, sent_s)
        return outcome

    def _read_outcome(self, reply: WireResponse | None, failure: ExchangeError | None) -> SubmitExchange:
        if reply is None:
            return SubmitExchange(failure=failure)
        reply = self._endpoint.without_key(reply)
        return SubmitExchange(reply=reply, envelope=codec.read(reply), failure=failure)

    def _note(self, outcome: SubmitExchange) -> None:
        """Trip the breaker on an answer that every further submit would get; reset it when one is accepted."""
        verdict = judge(outcome).verdict
        if verdict is Verdict.ACCEPTED:
            self._breaker.reset()
        elif verdict is Verdict.REJECTED and outcome.reply is not None:
            refusal = codec.refusal(outcome.reply, outcome.envelope)
            if isinstance(refusal, AuthenticationError | InsufficientCredits):
                self._breaker.trip(refusal)

    def _orphaned(self, request: GenerationRequest, outcome: SubmitExchange) -> None:
        """Keep a paid id from being lost with its caller: the log is the last place that can hold it."""
        row = judge(outcome)
        if row.verdict is Verdict.UNKNOWN:
            _log.warning("a submit whose caller had gone may have been charged: %s", story(outcome))
        if row.verdict is not Verdict.ACCEPTED:
            return
        submitted = _accepted(outcome, 0)
        _log.warning("task %s was accepted after its caller had gone", submitted.task_id)
        if self.on_orphan is not None:
            try:
                self.on_orphan(submitted, request)
            except Exception:  # noqa: BLE001 - it is the user's code, and this task must go on
                _log.exception("on_orphan failed for task %s", submitted.task_id)

    async def _read(self, wire: WireRequest, decode: Callable[[WireResponse], T]) -> T:
        await self._host.ensure()
        deadline_s = anyio.current_time() + self._timeouts.query_s
        tries = 0
        while True:
            if not await self._turn(self._poll_slots, deadline_s):
                raise NotSent("the time was up before the request had its turn")
            tries += 1
            last = tries >= self._retry.attempts
            left_s = deadline_s - anyio.current_time()
            try:
                # Half of what is left, for a peer that says nothing must not eat the other tries.
                return await self._get(wire, decode, left_s if last else left_s / 2)
            except (RateLimited, ServiceUnavailable, TransportError) as exc:
                if last or not self._quota.spend() or not await self._pause(tries, deadline_s):
                    raise
                _log.info("%s %s: try %d failed; trying again: %s", wire.method, wire.url, tries, exc)

    async def _get(self, wire: WireRequest, decode: Callable[[WireResponse], T], timeout_s: float) -> T:
        """Send once and decode; gives the poll slot back."""
        sent_s = anyio.current_time()
        try:
            reply = await exchange(self._transport, wire, timeout_s=timeout_s)
        except ExchangeError as exc:
            self._heed(None, sent_s)
            failure = self._endpoint.failure_without_key(exc)
        else:
            self._heed(reply, sent_s)
            try:
                return await _where_it_fits(len(reply.body), lambda: decode(self._endpoint.without_key(reply)))
            except ApiError as exc:
                exc.retry_after_s = retry_after_s(reply.headers)
                raise
        finally:
            self._poll_slots.release()
        if failure.permanent and failure.phase is Phase.CONNECT:
            raise ConfigurationError(f"{self._endpoint.base_url} cannot be reached like this: {failure.reason}")
        error = NotSent if failure.phase is Phase.CONNECT else TransportError
        raise error(f"no answer from {self._endpoint.base_url}: {failure.reason}")

    # --- who may send, and when ---------------------------------------------------------------------------------

    async def _next_try(self, error: NanoBananaError, tries: int, deadline_s: float) -> bool:
        """Pause after a failed try and take the next turn; False when *error*, what is known so far, has to stand."""
        if not tries:
            return await self._submit_turn(deadline_s)
        try:
            return await self._pause(tries, deadline_s) and await self._submit_turn(deadline_s)
        except NanoBananaError:
            return False  # closed, or refused for good: but a try before this one may have been charged
        except BaseException:
            _log.warning("a submit was cancelled between two tries; the last one ended so: %s", error)
            raise

    async def _submit_turn(self, deadline_s: float) -> bool:
        """Take a turn for a submit, unless it is known that it would be refused."""
        if not await self._turn(self._submit_slots, deadline_s, self._submit_gate):
            return False
        try:
            self._host.check_open()
            self._breaker.check()
        except NanoBananaError:
            self._submit_slots.release()
            raise
        return True

    async def _turn(self, slots: anyio.Semaphore, deadline_s: float, gate: anyio.Lock | None = None) -> bool:
        """Take a slot, then a permit; False when the deadline came first, and then nothing is held.

        With a *gate*, those behind it stand in the pacer's line one at a time: the tracker, who stands there alone
        for all tasks, would otherwise get one turn in seventeen while submits queue.
        """
        with anyio.CancelScope(deadline=deadline_s):
            await self._slot_and_permit(slots, gate)
            if anyio.current_time() < deadline_s:
                return True
            slots.release()
        return False

    async def _slot_and_permit(self, slots: anyio.Semaphore, gate: anyio.Lock | None) -> None:
        await slots.acquire()
        try:
            async with gate or contextlib.nullcontext():
                await self._pacer.permit()
        except BaseException:
            slots.release()
            raise

    def _heed(self, reply: WireResponse | None, sent_s: float) -> None:
        """Learn from a reply, or from its absence, how the service fares: its trouble slows everyone."""
        asked_s = None if reply is None else retry_after_s(reply.headers)
        if reply is not None and (reply.status == 429 or (reply.status == 503 and asked_s is not None)):
            if self._pacer.slow(sent_s):
                self._hushes += 1
            self._pacer.hush(asked_s or self._retry.first_s + self._retry.pause_s(self._hushes, self._rng))
        elif reply is None or reply.status >= 500:
            self._failures += 1
            if self._failures >= _OUTAGE:
                self._pacer.slow(sent_s)
        else:
            self._failures = 0
            if reply.status < 400:
                self._hushes = 0
                self._quota.earn()
                self._pacer.quicken()

    def _may_repeat(self, row: Rule, tries: int) -> bool:
        match row.repeat:
            case RetryRule.NO:
                return False
            case RetryRule.ONCE:
                allowed = tries == 1
            case RetryRule.FREE | RetryRule.AFTER_WAIT:
                allowed = True
            case _:
                allowed = self._retry.resends(row.repeat.value)
        return allowed and tries < self._retry.attempts and self._quota.spend()

    async def _pause(self, tries: int, deadline_s: float) -> bool:
        """Sleep before the next try; False, at once, when it could not begin before the deadline."""
        pause_s = self._retry.pause_s(tries, self._rng)
        if anyio.current_time() + max(pause_s, self._pacer.quiet_s) >= deadline_s:
            return False
        await anyio.sleep(pause_s)
        return True


async def _where_it_fits(size_bytes: int, work: Callable[[], T]) -> T:
    """Do *work* here, or in a thread if it is about a lot of bytes."""
    return await anyio.to_thread.run_sync(work) if size_bytes > _LARGE_BYTES else work()


def _accepted(outcome: SubmitExchange, duplicates: int) -> AcceptedSubmit:
    task_id = outcome.envelope.task_id or ""  # the row guarantees one
    if outcome.failure is not None or not outcome.envelope.ok:
        _log.warning("task %s was accepted, though the answer was odd: %s", task_id, story(outcome))
    if duplicates:
        _log.warning("task %s: earlier tries that may have been charged as well: %d", task_id, duplicates)
    return AcceptedSubmit(task_id, duplicates)
