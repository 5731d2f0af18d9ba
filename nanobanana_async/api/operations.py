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
from nanobanana_async.transport.checked import send_checked
from nanobanana_async.wire import codec
from nanobanana_async.wire.classify import RetryRule, Rule, SubmitExchange, Verdict, classify, describe, submit_error
from nanobanana_async.wire.endpoint import Endpoint

T = TypeVar("T")
PrepareRequest: TypeAlias = Callable[[GenerationRequest], Awaitable[GenerationRequest]]
BeforeSend: TypeAlias = Callable[[], Awaitable[None]]

_log: Final = logging.getLogger("nanobanana_async")

_NO_SLOT_MESSAGE: Final = "the time was up before the submit had its turn; nothing was sent"
_OUTAGE_AFTER_ERRORS: Final = 3
"""So many requests in a row that bring no answer are trouble of the service, not of one task."""

_OFFLOAD_BYTES: Final = 2**20
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
        background: BackgroundTaskGroup,
        endpoint: Endpoint,
        limits: Limits,
        retry: RetryPolicy,
        timeouts: Timeouts,
    ) -> None:
        self._transport = transport
        self._background = background
        self._endpoint = endpoint
        self._retry = retry
        self._timeouts = timeouts
        self._rng = Random()
        self._rate_limiter = AdaptiveRateLimiter(limits.requests_per_s, limits.burst)
        self._retry_quota = RetryQuota()
        self._breaker = CircuitBreaker()
        self.on_orphan: Callable[[AcceptedSubmit, GenerationRequest], None] | None = None
        """Told of each task that was accepted after its caller had gone."""
        self._consecutive_throttles = 0
        self._consecutive_errors = 0
        self._submit_lock = anyio.Lock(fast_acquire=True)
        self._admission = Admission(limits.max_submits)
        """For submits from preparing to outcome. A slot, below, is for the exchange, which may outlive its caller."""
        self._submit_slots = anyio.Semaphore(limits.max_submits)
        self._poll_slots = anyio.Semaphore(limits.max_polls)

    async def submit(
        self,
        request: GenerationRequest,
        prepare: PrepareRequest,
        *,
        deadline_s: float,
        before_send: BeforeSend | None = None,
    ) -> AcceptedSubmit:
        """Ask for one picture and return its task id.

        *prepare* makes the images of *request* strings. It is called when the submit is let in, so that those who
        queue cost little, however large their images. *before_send* is awaited before each POST, when its turn has
        come; if it raises, nothing is sent. *deadline_s* (on the event loop's clock) bounds the waiting.
        Cancelling, or giving up, while the POST is on the wire does not tear it: it runs to its end in the background,
        and an id it brings is logged.

        Raises:
            NotSent: Nothing was charged: no connection, or no turn by *deadline_s*.
            SubmissionUnknown: It may have been charged; nothing says so.
            ApiError: The service said no.
            ConfigurationError: It can never work like this.
        """
        await self._background.ensure_started()
        if not await self._admission.acquire(deadline_s, self._background.start_soon):
            raise NotSent(_NO_SLOT_MESSAGE)
        try:
            ready = await prepare(request)
            size_bytes = sum(len(image) for image in ready.images if isinstance(image, str))
            encode = partial(codec.encode_submit, self._endpoint.base_url, ready)
            wire = self._authorized(await _run_maybe_in_thread(size_bytes, encode))
            return await self._submit(wire, request, deadline_s, before_send)
        finally:
            self._admission.release()

    async def query(self, task_id: str) -> Task:
        """Return how the task stands, retrying within `Timeouts.query_s`.

        Raises:
            TransportError: No usable answer came.
            ApiError: The service said no; `TaskNotFound` also for a fresh id that is not visible yet.
        """
        wire = self._authorized(codec.encode_query(self._endpoint.base_url, task_id))
        return await self._get_with_retries(wire, partial(codec.decode_task, task_id=task_id))

    async def balance(self) -> Decimal:
        """Return the credits left, retrying within `Timeouts.query_s`. Raises as `query` does."""
        wire = self._authorized(codec.encode_balance(self._endpoint.base_url))
        return await self._get_with_retries(wire, codec.decode_balance)

    @property
    def polls_per_s(self) -> float:
        """How many queries may leave per second: what the pacer allows, or half of it while submits queue."""
        return self._rate_limiter.rate * (0.5 if self._submit_lock.locked() else 1.0)

    async def acquire_poll_slot(self) -> None:
        """Wait for a poll slot and for the pacer. `look` gives the slot back, or else `release_poll_slot`."""
        await self._acquire_slot(self._poll_slots, None)

    def release_poll_slot(self) -> None:
        """Give the poll slot back unused."""
        self._poll_slots.release()

    async def poll(self, task_id: str) -> Task:
        """Query once, after `acquire_poll_slot`. Raises as `query` does."""
        wire = self._authorized(codec.encode_query(self._endpoint.base_url, task_id))
        return await self._get_once(wire, partial(codec.decode_task, task_id=task_id), self._timeouts.query_s)

    # --- how they travel --------------------------------------------------------------------------------------------

    async def _submit(
        self, wire: WireRequest, request: GenerationRequest, deadline_s: float, before_send: BeforeSend | None
    ) -> AcceptedSubmit:
        attempts, duplicates, exchange_deadline_s = 0, 0, math.inf
        error: NanoBananaError = NotSent(_NO_SLOT_MESSAGE)
        while await self._next_attempt(error, attempts, min(deadline_s, exchange_deadline_s)):
            attempts += 1
            if before_send is not None:
                await self._run_before_send(before_send)
            exchange_deadline_s = min(exchange_deadline_s, anyio.current_time() + self._timeouts.submit_s)
            outcome = await self._post(wire, request, deadline_s=deadline_s, exchange_deadline_s=exchange_deadline_s)
            rule = classify(outcome)
            if rule.verdict is Verdict.ACCEPTED:
                return _accepted_submit(outcome, duplicates)
            error = submit_error(outcome, rule, duplicates, self._endpoint.base_url)
            if isinstance(error, ApiError) and outcome.response is not None:
                error.retry_after_s = retry_after_s(outcome.response.headers)
            # Whoever keeps books has to close them between tries that cost nothing, and may try again himself.
            is_theirs = before_send is not None and not rule.retry.may_duplicate
            if is_theirs or not self._may_retry(rule, attempts):
                break
            duplicates += rule.retry.may_duplicate
            _log.info("submit: try %d ended as %r (%s); trying again", attempts, rule.name, rule.verdict.value)
        raise error

    async def _run_before_send(self, before_send: BeforeSend) -> None:
        try:
            await before_send()
        except BaseException:
            self._submit_slots.release()
            raise

    def _authorized(self, wire: WireRequest) -> WireRequest:
        return attrs.evolve(wire, headers={**self._endpoint.headers, **wire.headers})

    async def _post(
        self, wire: WireRequest, request: GenerationRequest, *, deadline_s: float, exchange_deadline_s: float
    ) -> SubmitExchange:
        """Send once. The exchange belongs to the host: it runs to its end whatever becomes of the caller."""
        exchange = partial(self._send_submit, wire, exchange_deadline_s)
        with anyio.CancelScope(deadline=deadline_s):
            try:
                return await self._background.shield(exchange, on_abandoned=partial(self._on_abandoned, request))
            except ShieldedWorkCancelled:
                return SubmitExchange(
                    failure=ExchangeError("the client was closed while it was under way", phase=Phase.SEND)
                )
        reason = "no answer yet when the caller's time was up; it runs on, and an id it brings will be logged"
        return SubmitExchange(failure=ExchangeError(reason, phase=Phase.SEND))

    async def _send_submit(self, wire: WireRequest, exchange_deadline_s: float) -> SubmitExchange:
        sent_s = anyio.current_time()
        try:
            response = await send_checked(self._transport, wire, timeout_s=exchange_deadline_s - sent_s)
            outcome = self._decode_exchange(response, None)
        except ExchangeError as exc:
            outcome = self._decode_exchange(exc.response, self._endpoint.redact_error(exc))
        except anyio.get_cancelled_exc_class():
            _log.warning("a submit was cut off when the client was closed; it may have been charged")
            raise
        finally:
            self._submit_slots.release()
        self._update_breaker(outcome)
        self._observe(outcome.response, sent_s)
        return outcome

    def _decode_exchange(self, response: WireResponse | None, failure: ExchangeError | None) -> SubmitExchange:
        if response is None:
            return SubmitExchange(failure=failure)
        response = self._endpoint.redact_response(response)
        return SubmitExchange(response=response, envelope=codec.decode_envelope(response), failure=failure)

    def _update_breaker(self, outcome: SubmitExchange) -> None:
        """Trip the breaker on an answer that every further submit would get; reset it when one is accepted."""
        verdict = classify(outcome).verdict
        if verdict is Verdict.ACCEPTED:
            self._breaker.reset()
        elif verdict is Verdict.REJECTED and outcome.response is not None:
            error = codec.to_api_error(outcome.response, outcome.envelope)
            if isinstance(error, AuthenticationError | InsufficientCredits):
                self._breaker.trip(error)

    def _on_abandoned(self, request: GenerationRequest, outcome: SubmitExchange) -> None:
        """Keep a paid id from being lost with its caller: the log is the last place that can hold it."""
        rule = classify(outcome)
        if rule.verdict is Verdict.UNKNOWN:
            _log.warning("a submit whose caller had gone may have been charged: %s", describe(outcome))
        if rule.verdict is not Verdict.ACCEPTED:
            return
        submitted = _accepted_submit(outcome, 0)
        _log.warning("task %s was accepted after its caller had gone", submitted.task_id)
        if self.on_orphan is not None:
            try:
                self.on_orphan(submitted, request)
            except Exception:  # noqa: BLE001 - it is the user's code, and this task must go on
                _log.exception("on_orphan failed for task %s", submitted.task_id)

    async def _get_with_retries(self, wire: WireRequest, decode: Callable[[WireResponse], T]) -> T:
        await self._background.ensure_started()
        deadline_s = anyio.current_time() + self._timeouts.query_s
        attempts = 0
        while True:
            if not await self._acquire_by(self._poll_slots, deadline_s):
                raise NotSent("the time was up before the request had its turn")
            attempts += 1
            last = attempts >= self._retry.attempts
            left_s = deadline_s - anyio.current_time()
            try:
                # Half of what is left, for a peer that says nothing must not eat the other tries.
                return await self._get_once(wire, decode, left_s if last else left_s / 2)
            except (RateLimited, ServiceUnavailable, TransportError) as exc:
                if last or not self._retry_quota.acquire() or not await self._back_off(attempts, deadline_s):
                    raise
                _log.info("%s %s: try %d failed; trying again: %s", wire.method, wire.url, attempts, exc)

    async def _get_once(self, wire: WireRequest, decode: Callable[[WireResponse], T], timeout_s: float) -> T:
        """Send once and decode; gives the poll slot back."""
        sent_s = anyio.current_time()
        try:
            response = await send_checked(self._transport, wire, timeout_s=timeout_s)
        except ExchangeError as exc:
            self._observe(None, sent_s)
            failure = self._endpoint.redact_error(exc)
        else:
            self._observe(response, sent_s)
            try:
                return await _run_maybe_in_thread(
                    len(response.body), lambda: decode(self._endpoint.redact_response(response))
                )
            except ApiError as exc:
                exc.retry_after_s = retry_after_s(response.headers)
                raise
        finally:
            self._poll_slots.release()
        if failure.permanent and failure.phase is Phase.CONNECT:
            raise ConfigurationError(f"{self._endpoint.base_url} cannot be reached like this: {failure.reason}")
        error = NotSent if failure.phase is Phase.CONNECT else TransportError
        raise error(f"no answer from {self._endpoint.base_url}: {failure.reason}")

    # --- who may send, and when ---------------------------------------------------------------------------------

    async def _next_attempt(self, error: NanoBananaError, attempts: int, deadline_s: float) -> bool:
        """Pause after a failed try and take the next turn; False when *error*, what is known so far, has to stand."""
        if not attempts:
            return await self._acquire_submit_slot(deadline_s)
        try:
            return await self._back_off(attempts, deadline_s) and await self._acquire_submit_slot(deadline_s)
        except NanoBananaError:
            return False  # closed, or refused for good: but a try before this one may have been charged
        except BaseException:
            _log.warning("a submit was cancelled between two tries; the last one ended so: %s", error)
            raise

    async def _acquire_submit_slot(self, deadline_s: float) -> bool:
        """Take a turn for a submit, unless it is known that it would be refused."""
        if not await self._acquire_by(self._submit_slots, deadline_s, self._submit_lock):
            return False
        try:
            self._background.check_open()
            self._breaker.check()
        except NanoBananaError:
            self._submit_slots.release()
            raise
        return True

    async def _acquire_by(self, slots: anyio.Semaphore, deadline_s: float, lock: anyio.Lock | None = None) -> bool:
        """Take a slot, then a permit; False when the deadline came first, and then nothing is held.

        With a *gate*, those behind it stand in the pacer's line one at a time: the tracker, who stands there alone
        for all tasks, would otherwise get one turn in seventeen while submits queue.
        """
        with anyio.CancelScope(deadline=deadline_s):
            await self._acquire_slot(slots, lock)
            if anyio.current_time() < deadline_s:
                return True
            slots.release()
        return False

    async def _acquire_slot(self, slots: anyio.Semaphore, lock: anyio.Lock | None) -> None:
        await slots.acquire()
        try:
            async with lock or contextlib.nullcontext():
                await self._rate_limiter.acquire()
        except BaseException:
            slots.release()
            raise

    def _observe(self, response: WireResponse | None, sent_s: float) -> None:
        """Learn from a reply, or from its absence, how the service fares: its trouble slows everyone."""
        asked_s = None if response is None else retry_after_s(response.headers)
        if response is not None and (response.status == 429 or (response.status == 503 and asked_s is not None)):
            if self._rate_limiter.record_throttle(sent_s):
                self._consecutive_throttles += 1
            self._rate_limiter.pause(
                asked_s or self._retry.initial_s + self._retry.backoff_s(self._consecutive_throttles, self._rng)
            )
        elif response is None or response.status >= 500:
            self._consecutive_errors += 1
            if self._consecutive_errors >= _OUTAGE_AFTER_ERRORS:
                self._rate_limiter.record_throttle(sent_s)
        else:
            self._consecutive_errors = 0
            if response.status < 400:
                self._consecutive_throttles = 0
                self._retry_quota.release()
                self._rate_limiter.record_success()

    def _may_retry(self, rule: Rule, attempts: int) -> bool:
        match rule.retry:
            case RetryRule.NO:
                return False
            case RetryRule.ONCE:
                allowed = attempts == 1
            case RetryRule.SAFE | RetryRule.AFTER_WAIT:
                allowed = True
            case _:
                allowed = self._retry.allows_resubmit(rule.retry.value)
        return allowed and attempts < self._retry.attempts and self._retry_quota.acquire()

    async def _back_off(self, attempts: int, deadline_s: float) -> bool:
        """Sleep before the next try; False, at once, when it could not begin before the deadline."""
        backoff_s = self._retry.backoff_s(attempts, self._rng)
        if anyio.current_time() + max(backoff_s, self._rate_limiter.pause_left_s) >= deadline_s:
            return False
        await anyio.sleep(backoff_s)
        return True


async def _run_maybe_in_thread(size_bytes: int, work: Callable[[], T]) -> T:
    """Do *work* here, or in a thread if it is about a lot of bytes."""
    return await anyio.to_thread.run_sync(work) if size_bytes > _OFFLOAD_BYTES else work()


def _accepted_submit(outcome: SubmitExchange, duplicates: int) -> AcceptedSubmit:
    task_id = outcome.envelope.task_id or ""  # the row guarantees one
    if outcome.failure is not None or not outcome.envelope.ok:
        _log.warning("task %s was accepted, though the answer was odd: %s", task_id, describe(outcome))
    if duplicates:
        _log.warning("task %s: earlier tries that may have been charged as well: %d", task_id, duplicates)
    return AcceptedSubmit(task_id, duplicates)
