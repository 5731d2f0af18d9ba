"""The operations that are safe to retry: query, poll, balance."""

import logging
import math
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Final, TypeVar

import anyio
import anyio.to_thread
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.byte_budget import ByteBudget, ByteLease
from nanobanana_async._concurrency.slots import Slot, SlotPool
from nanobanana_async.api.flow_control import FlowControl
from nanobanana_async.api.rate_limit import asked_wait_s
from nanobanana_async.errors import (
    ApiError,
    ConfigurationError,
    NotSent,
    RateLimited,
    ServiceUnavailable,
    TransportError,
)
from nanobanana_async.models import Task
from nanobanana_async.policies import Timeouts
from nanobanana_async.protocols import BodyHook, ExchangeError, Phase, RequestKind, Transport, WireRequest, WireResponse
from nanobanana_async.wire import codec
from nanobanana_async.wire.endpoint import Endpoint

T = TypeVar("T")

_log: Final = logging.getLogger("nanobanana_async")

_OFFLOAD_BYTES: Final = 2**20
"""Bodies above this size are encoded and decoded in a thread, because that would block the event loop."""
_COPIES: Final = 4
"""Size of a body while it is decoded, in multiples of its length."""


class ServiceApi:
    """The operations of the service that cost nothing, within the client's limits.

    *memory* bounds the responses that are received and decoded, which may contain images. *observe* is called with each
    snapshot of a task.
    """

    def __init__(  # noqa: PLR0913 - created by the client only
        self,
        transport: Transport,
        background: BackgroundTaskGroup,
        endpoint: Endpoint,
        flow: FlowControl,
        timeouts: Timeouts,
        *,
        max_polls: int,
        memory: ByteBudget,
        observe: Callable[[Task], None] = lambda _: None,
    ) -> None:
        self._transport = transport
        self._background = background
        self._endpoint = endpoint
        self._flow = flow
        self._timeouts = timeouts
        self._memory = memory
        self._observe = observe
        self._poll_slots = SlotPool(max_polls, background.start_soon)

    async def query(self, task_id: str) -> Task:
        """Return a snapshot of the task, with retries within `Timeouts.query_s`. A throttled request waits.

        Raises:
            TransportError: No usable response arrived.
            ApiError: The service responded with an error. `TaskNotFound` includes a new task that is not visible yet.
        """
        wire = codec.encode_query(self._endpoint.base_url, task_id)
        return self._observed(await self._get_with_retries(wire, partial(codec.decode_task, task_id=task_id)))

    async def balance(self) -> Decimal:
        """Return the credits left, with retries within `Timeouts.query_s`. Raises as `query` does."""
        return await self._get_with_retries(codec.encode_balance(self._endpoint.base_url), codec.decode_balance)

    @property
    def polls_per_s(self) -> float:
        """Polls that may be sent per second at present."""
        return self._flow.polls_per_s

    async def acquire_poll_slot(self, deadline_s: float = math.inf) -> Slot:
        """Return a slot once a poll may be sent.

        Raises:
            TimeoutError: It may not be sent before *deadline_s*.
        """
        slot = await self._poll_slots.acquire(deadline_s)
        try:
            if self._flow.acquire_nowait(RequestKind.READ):
                return slot
            with anyio.CancelScope(deadline=deadline_s):
                await self._flow.acquire(RequestKind.READ)
                if anyio.current_time() < deadline_s:
                    return slot
            raise TimeoutError  # noqa: TRY301 - the slot is released below
        except BaseException:
            slot.release()
            raise

    async def poll(self, task_id: str) -> Task:
        """Query once, after `acquire_poll_slot`. Raises as `query` does."""
        wire = codec.encode_query(self._endpoint.base_url, task_id)
        decode = partial(codec.decode_task, task_id=task_id)
        return self._observed(await self._get_once(wire, decode, self._timeouts.query_s))

    def _observed(self, task: Task) -> Task:
        self._observe(task)
        return task

    async def _get_with_retries(self, wire: WireRequest, decode: Callable[[WireResponse], T]) -> T:
        await self._background.ensure_started()
        deadline_s = anyio.current_time() + self._timeouts.query_s
        attempts = 0
        while True:
            try:
                slot = await self.acquire_poll_slot(deadline_s)
            except TimeoutError:
                raise NotSent("timed out waiting for a poll slot") from None
            attempts += 1
            is_last = attempts >= self._flow.retry.attempts
            left_s = deadline_s - anyio.current_time()
            error: ApiError | TransportError
            with slot:
                try:
                    # Half of the time left: a peer that never responds must not use up the other attempts.
                    return await self._get_once(wire, decode, left_s if is_last else left_s / 2)
                except (RateLimited, ServiceUnavailable, TransportError) as exc:
                    error = exc
            if isinstance(error, ApiError) and (wait_s := error.retry_after_s) is not None:
                if anyio.current_time() + wait_s >= deadline_s:
                    raise error
                attempts -= 1  # a throttled request is no failure
                await anyio.sleep(wait_s)
                continue
            if not self._flow.may_retry(attempts) or not await self._flow.back_off(attempts, deadline_s):
                raise error
            _log.info("%s %s: attempt %d failed; retrying: %s", wire.method, wire.url, attempts, error)

    async def _get_once(self, wire: WireRequest, decode: Callable[[WireResponse], T], timeout_s: float) -> T:
        """Send once and decode."""
        sent_s = anyio.current_time()
        with self._memory.lease() as lease:
            request = authorized(wire, self._endpoint, partial(_reserve_memory, lease))
            try:
                response = await self._transport.send(request, timeout_s=timeout_s)
            except ExchangeError as exc:
                self._flow.observe(RequestKind.READ, None, sent_s)
                failure = self._endpoint.redact_error(exc)
            else:
                wait_s = self._flow.observe(RequestKind.READ, response, sent_s)
                try:
                    return await run_maybe_in_thread(
                        len(response.body), lambda: decode(self._endpoint.redact_response(response))
                    )
                except ApiError as exc:
                    exc.retry_after_s = asked_wait_s(response) if wait_s is None else wait_s
                    raise
        if failure.permanent and failure.phase is Phase.CONNECT:
            raise ConfigurationError(f"{self._endpoint.base_url} cannot be reached: {failure.reason}")
        error = NotSent if failure.phase is Phase.CONNECT else TransportError
        raise error(f"no response from {self._endpoint.base_url}: {failure.reason}")


async def _reserve_memory(lease: ByteLease, head: WireResponse) -> None:
    """Wait for the memory of a body with images: it is held as bytes, as text, and decoded."""
    length = head.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and len(length) < 19 and int(length) > _OFFLOAD_BYTES:
        await lease.resize(int(length) * _COPIES)


def authorized(wire: WireRequest, endpoint: Endpoint, before_body: BodyHook | None = None) -> WireRequest:
    """Return *wire* with the headers of *endpoint*, which contain the key, and with *before_body*."""
    return attrs.evolve(wire, headers={**endpoint.headers, **wire.headers}, before_body=before_body)


async def run_maybe_in_thread(size_bytes: int, work: Callable[[], T]) -> T:
    """Run *work* here, or in a thread if it handles many bytes."""
    return await anyio.to_thread.run_sync(work) if size_bytes > _OFFLOAD_BYTES else work()
