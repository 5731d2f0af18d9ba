"""The operations of the service: encode, wait for a slot, send, classify, and retry as the policy allows."""

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
from nanobanana_async.api.rate_limit import AdaptiveRateLimiter, retry_after_s
from nanobanana_async.api.retry import CircuitBreaker, RetryQuota
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
from nanobanana_async.wire import codec
from nanobanana_async.wire.classify import RetryRule, Rule, SubmitExchange, Verdict, classify, describe, submit_error
from nanobanana_async.wire.endpoint import Endpoint

T = TypeVar("T")
PrepareRequest: TypeAlias = Callable[[GenerationRequest], Awaitable[GenerationRequest]]
BeforeSend: TypeAlias = Callable[[], Awaitable[None]]

_log: Final = logging.getLogger("nanobanana_async")

_NO_SLOT_MESSAGE: Final = "timed out waiting for a submit slot; nothing was sent"
_OUTAGE_AFTER_ERRORS: Final = 3
"""Consecutive requests without a response that count as an outage of the service."""

_OFFLOAD_BYTES: Final = 2**20
"""Bodies above this size are encoded and decoded in a thread, because that would block the event loop."""


@attrs.frozen
class AcceptedSubmit:
    """A submit that was accepted."""

    task_id: str
    possible_duplicates: int
    """Number of resubmits under the retry policy after a submit that may have been charged."""


class ServiceApi:
    """The operations of the service within the client's limits, retried as `RetryPolicy` allows."""

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
        """Called for each task that was accepted after its caller was cancelled."""
        self._consecutive_throttles = 0
        self._consecutive_errors = 0
        self._submit_lock = anyio.Lock(fast_acquire=True)
        self._admission = Admission(limits.max_submits)
        """Bounds submits from preparation to outcome. A slot below covers the exchange, which may outlive its caller.
        """
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
        """Submit *request* and return its task id.

        *prepare* turns the images of *request* into strings. It is called after a slot is acquired, so waiting submits
        hold no encoded images. *before_send* is awaited before each POST. If it raises, nothing is sent. *deadline_s*,
        on the event loop's clock, bounds the wait. If the caller is cancelled or times out during the POST, the POST
        runs to its end in the background and the task id is logged.

        Raises:
            NotSent: Nothing was charged: no connection, or no slot by *deadline_s*.
            SubmissionUnknown: The submit may have been charged, but no response confirmed it.
            ApiError: The service responded with an error.
            ConfigurationError: The client is closed or set up in a way that cannot work.
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
        """Return a snapshot of the task, with retries within `Timeouts.query_s`.

        Raises:
            TransportError: No usable response arrived.
            ApiError: The service responded with an error. `TaskNotFound` includes a new task that is not visible yet.
        """
        wire = self._authorized(codec.encode_query(self._endpoint.base_url, task_id))
        return await self._get_with_retries(wire, partial(codec.decode_task, task_id=task_id))

    async def balance(self) -> Decimal:
        """Return the credits left, with retries within `Timeouts.query_s`. Raises as `query` does."""
        wire = self._authorized(codec.encode_balance(self._endpoint.base_url))
        return await self._get_with_retries(wire, codec.decode_balance)

    @property
    def polls_per_s(self) -> float:
        """Queries that may be sent per second: the limiter's rate, or half of it while submits wait."""
        return self._rate_limiter.rate * (0.5 if self._submit_lock.locked() else 1.0)

    async def acquire_poll_slot(self) -> None:
        """Wait for a poll slot and for the rate limiter. `poll` or `release_poll_slot` gives the slot back."""
        await self._acquire_slot(self._poll_slots, None)

    def release_poll_slot(self) -> None:
        """Give back a poll slot that was not used."""
        self._poll_slots.release()

    async def poll(self, task_id: str) -> Task:
        """Query once, after `acquire_poll_slot`. Raises as `query` does."""
        wire = self._authorized(codec.encode_query(self._endpoint.base_url, task_id))
        return await self._get_once(wire, partial(codec.decode_task, task_id=task_id), self._timeouts.query_s)

    # --- requests ---------------------------------------------------------------------------------------------------

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
            # A caller that records attempts has to record the outcome before the next one, and may retry itself.
            is_theirs = before_send is not None and not rule.retry.may_duplicate
            if is_theirs or not self._may_retry(rule, attempts):
                break
            duplicates += rule.retry.may_duplicate
            _log.info("submit: attempt %d ended as %r (%s); retrying", attempts, rule.name, rule.verdict.value)
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
        """Send once, in a shielded task that runs to its end even if the caller is cancelled."""
        exchange = partial(self._send_submit, wire, exchange_deadline_s)
        with anyio.CancelScope(deadline=deadline_s):
            try:
                return await self._background.shield(exchange, on_abandoned=partial(self._on_abandoned, request))
            except ShieldedWorkCancelled:
                return SubmitExchange(
                    failure=ExchangeError("the client was closed during the exchange", phase=Phase.SEND)
                )
        reason = "the caller timed out before the response. The exchange continues, and its task id will be logged"
        return SubmitExchange(failure=ExchangeError(reason, phase=Phase.SEND))

    async def _send_submit(self, wire: WireRequest, exchange_deadline_s: float) -> SubmitExchange:
        sent_s = anyio.current_time()
        try:
            response = await self._transport.send(wire, timeout_s=exchange_deadline_s - sent_s)
            outcome = self._decode_exchange(response, None)
        except ExchangeError as exc:
            outcome = self._decode_exchange(exc.response, self._endpoint.redact_error(exc))
        except anyio.get_cancelled_exc_class():
            _log.warning("submit was interrupted by closing the client; it may have been charged")
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
        """Open the breaker on a rejection that every submit would get. Close it when a submit is accepted."""
        verdict = classify(outcome).verdict
        if verdict is Verdict.ACCEPTED:
            self._breaker.reset()
        elif verdict is Verdict.REJECTED and outcome.response is not None:
            error = codec.to_api_error(outcome.response, outcome.envelope)
            if isinstance(error, AuthenticationError | InsufficientCredits):
                self._breaker.trip(error)

    def _on_abandoned(self, request: GenerationRequest, outcome: SubmitExchange) -> None:
        """Log the result of a submit whose caller was cancelled, because the log is the last place for its task id."""
        rule = classify(outcome)
        if rule.verdict is Verdict.UNKNOWN:
            _log.warning("abandoned submit may have been charged: %s", describe(outcome))
        if rule.verdict is not Verdict.ACCEPTED:
            return
        submitted = _accepted_submit(outcome, 0)
        _log.warning("task %s was accepted after its caller was cancelled", submitted.task_id)
        if self.on_orphan is not None:
            try:
                self.on_orphan(submitted, request)
            except Exception:  # noqa: BLE001 - user code; this task must continue
                _log.exception("on_orphan failed for task %s", submitted.task_id)

    async def _get_with_retries(self, wire: WireRequest, decode: Callable[[WireResponse], T]) -> T:
        await self._background.ensure_started()
        deadline_s = anyio.current_time() + self._timeouts.query_s
        attempts = 0
        while True:
            if not await self._acquire_by(self._poll_slots, deadline_s):
                raise NotSent("timed out waiting for a poll slot")
            attempts += 1
            last = attempts >= self._retry.attempts
            left_s = deadline_s - anyio.current_time()
            try:
                # Half of the time left: a peer that never responds must not use up the other attempts.
                return await self._get_once(wire, decode, left_s if last else left_s / 2)
            except (RateLimited, ServiceUnavailable, TransportError) as exc:
                if last or not self._retry_quota.acquire() or not await self._back_off(attempts, deadline_s):
                    raise
                _log.info("%s %s: attempt %d failed; retrying: %s", wire.method, wire.url, attempts, exc)

    async def _get_once(self, wire: WireRequest, decode: Callable[[WireResponse], T], timeout_s: float) -> T:
        """Send once and decode. Gives the poll slot back."""
        sent_s = anyio.current_time()
        try:
            response = await self._transport.send(wire, timeout_s=timeout_s)
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
            raise ConfigurationError(f"{self._endpoint.base_url} cannot be reached: {failure.reason}")
        error = NotSent if failure.phase is Phase.CONNECT else TransportError
        raise error(f"no response from {self._endpoint.base_url}: {failure.reason}")

    # --- slots and retries ------------------------------------------------------------------------------------------

    async def _next_attempt(self, error: NanoBananaError, attempts: int, deadline_s: float) -> bool:
        """Back off after a failed attempt and acquire a slot; False if *error*, the last outcome, is raised."""
        if not attempts:
            return await self._acquire_submit_slot(deadline_s)
        try:
            return await self._back_off(attempts, deadline_s) and await self._acquire_submit_slot(deadline_s)
        except NanoBananaError:
            return False  # closed or rejected, but an earlier attempt may have been charged
        except BaseException:
            _log.warning("submit was cancelled between two attempts; the last one ended with: %s", error)
            raise

    async def _acquire_submit_slot(self, deadline_s: float) -> bool:
        """Acquire a submit slot, unless the breaker is open or the client is closed."""
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
        """Acquire a slot and the rate limiter's permission; False if the deadline came first, and nothing is held.

        With a *lock*, its waiters stand in the limiter's queue one at a time. Otherwise the tracker, which stands there
        once for all tasks, would get one slot in seventeen while submits wait.
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
        """Adapt the rate to a response, or to its absence."""
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
        """Sleep before the next attempt; return False at once if it could not begin before the deadline."""
        backoff_s = self._retry.backoff_s(attempts, self._rng)
        if anyio.current_time() + max(backoff_s, self._rate_limiter.pause_left_s) >= deadline_s:
            return False
        await anyio.sleep(backoff_s)
        return True


async def _run_maybe_in_thread(size_bytes: int, work: Callable[[], T]) -> T:
    """Run *work* here, or in a thread if it handles many bytes."""
    return await anyio.to_thread.run_sync(work) if size_bytes > _OFFLOAD_BYTES else work()


def _accepted_submit(outcome: SubmitExchange, duplicates: int) -> AcceptedSubmit:
    task_id = outcome.envelope.task_id or ""  # guaranteed by the rule
    if outcome.failure is not None or not outcome.envelope.ok:
        _log.warning("task %s was accepted with an unusual response: %s", task_id, describe(outcome))
    if duplicates:
        _log.warning("task %s: possible duplicates: %d", task_id, duplicates)
    return AcceptedSubmit(task_id, duplicates)
