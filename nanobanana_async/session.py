"""`Session`: what a client and its handles share. Dropping all of them stops the background work."""

import asyncio
import contextlib
import logging
import sys
import warnings
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Final

import anyio
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.byte_budget import ByteBudget
from nanobanana_async._concurrency.fifo_cache import FifoCache
from nanobanana_async._concurrency.slots import Slot, SlotPool
from nanobanana_async.api.fair_queue import FairQueue
from nanobanana_async.api.flow_control import FlowControl
from nanobanana_async.api.operations import ServiceApi
from nanobanana_async.api.submit import NO_RECORD, NO_SLOT_MESSAGE, AcceptedSubmit, SubmitLoop
from nanobanana_async.api.turn import Turn
from nanobanana_async.calls import SizeCheck, SubmitCall, SubmitOptions, make_call
from nanobanana_async.emission import ChangeEmitter, emit, emit_throttled
from nanobanana_async.errors import NanoBananaError, NotSent, SubmissionUnknown
from nanobanana_async.events import Queued, Saved, SubmitFailed, Submitted
from nanobanana_async.handle import TaskHandle, recover_by_callback
from nanobanana_async.images.delivered import DeliveryCheck
from nanobanana_async.images.download import Downloader
from nanobanana_async.images.references import encode_images
from nanobanana_async.models import GenerationRequest, Task
from nanobanana_async.policies import OwnerLimits
from nanobanana_async.protocols import (
    AttemptEnd,
    LedgerEntry,
    PendingCallback,
    SubmitRecord,
    TaskLedger,
    Transport,
    Verdict,
)
from nanobanana_async.recovery import CallbackRecovery, DoubtfulSubmit
from nanobanana_async.saved import SavedImage
from nanobanana_async.session_options import SessionOptions, limits_of
from nanobanana_async.tracking.schedule import PollSchedule, latency_kind
from nanobanana_async.tracking.state import SubmitInfo
from nanobanana_async.tracking.tracker import TaskTracker
from nanobanana_async.transport.addresses import ServiceNetwork
from nanobanana_async.transport.checked import CheckedTransport
from nanobanana_async.transport.httpx import HttpxTransport
from nanobanana_async.wire.endpoint import Endpoint

_MAX_DOUBTFUL: Final = 10_000
_CLOSE_EXPIRED_S: Final = 5.0
_log: Final = logging.getLogger("nanobanana_async")


class Session:
    """The operations of a client, its background work, and its ledger."""

    def __init__(
        self, endpoint: Endpoint, transport: Transport | None, ledger: TaskLedger | None, options: SessionOptions
    ) -> None:
        options.check(ledger)
        limits, timeouts = options.limits, options.timeouts
        self.endpoint: Final = endpoint
        self.ledger: Final = ledger
        self.options: Final = options
        self.default_timeout_s: Final = timeouts.task_s
        self._size_check = SizeCheck()
        self._ledger_lock = anyio.Lock()
        self._has_opened_ledger = False
        self._doubtful: FifoCache[DoubtfulSubmit] = FifoCache(_MAX_DOUBTFUL)
        """Submits for which a callback may name a task, by nonce."""
        self._recovering: set[str] = set()
        """Nonces of the submits that wait for their callback."""
        self.background: Final = BackgroundTaskGroup()
        # Nothing that the background work refers to may refer to the session, which is collected once it is dropped.
        self.emit: Final = partial(emit, options.on_event)
        self._own_transport: HttpxTransport | None = None
        """Until its background work has begun; None if the application has passed a transport."""
        if transport is None:
            transport = self._own_transport = HttpxTransport(connect_s=timeouts.connect_s)
            self.background.close_when_stopped(transport.aclose)
        active = CheckedTransport(transport)
        memory = ByteBudget(limits.max_download_bytes)
        self._flow = flow = FlowControl(limits, options.retry, partial(emit_throttled, self.emit))
        self.api: Final = ServiceApi(
            active,
            self.background,
            endpoint,
            flow,
            timeouts,
            max_polls=limits.max_polls,
            memory=memory,
            observe=_ignore if ledger is None else ledger.observe,
        )
        owner_limits = partial(limits_of, options.owner_limits, ledger)
        self.queue: Final = FairQueue(owner_limits, self.background.start_soon)
        self.slots: Final = SlotPool(flow.max_submits, self.background.start_soon, self.queue)
        flow.on_limit = self.slots.resize
        self._submits = SubmitLoop(
            active,
            self.background,
            endpoint,
            flow,
            timeouts,
            prepare=partial(encode_images, policy=options.references),
        )
        schedule = PollSchedule(options.polling)
        self.classify_reason: Final = options.classify_reason
        on_change = ChangeEmitter(self.emit, self.classify_reason)
        self.reasons: Final = on_change.reasons
        self.tracker: Final = TaskTracker(self.api, schedule, self.background, on_change)
        self.background.call_when_stopped(self.tracker.close)
        self.delivery: Final = DeliveryCheck()
        self._recovery = CallbackRecovery(self.background, self.api.query)
        self.downloader: Final = Downloader(
            active,
            limits=limits,
            retry=options.retry,
            timeouts=timeouts,
            public_only=ServiceNetwork(endpoint.base_url).is_public,
            memory=memory,
        )

    async def start(self) -> None:
        """Start the background work and open the ledger, on first use. It is closed when the work has stopped."""
        await self.background.ensure_started()
        if self._own_transport is not None:
            self.background.start_soon(partial(_close_expired, self._own_transport))
            self._own_transport = None
        if self.ledger is None or self._has_opened_ledger:
            return
        with self.background.keep_open():  # closing waits, and closes the ledger after it was opened
            async with self._ledger_lock:
                if not self._has_opened_ledger:
                    await self.ledger.open()
                    self._has_opened_ledger = True
                    self.background.close_when_stopped(self.ledger.aclose)

    async def aclose(self) -> None:
        """See `NanoBananaClient.aclose`."""
        if self.background.is_open:
            self.background.check_owner()
            self.tracker.close()
        timeouts = self.options.timeouts
        with anyio.move_on_after(timeouts.submit_s + timeouts.close_s, shield=True):
            await self.background.aclose(drain_s=timeouts.submit_s)

    def __del__(self) -> None:
        background = getattr(self, "background", None)  # missing in a session whose construction has failed
        if background is not None and background.is_open:
            background.abandon(drain_s=self.options.timeouts.submit_s)
            warnings.warn(
                f"unclosed NanoBananaClient(base_url={self.endpoint.base_url!r}): use 'async with' or "
                "'await client.aclose()'",
                ResourceWarning,
                stacklevel=1,
                source=self,
            )

    # --- submits ----------------------------------------------------------------------------------------------------

    def call(
        self,
        prompt: str | GenerationRequest,
        options: SubmitOptions,
        timeout_s: float | None = None,
        record: SubmitRecord | None = None,
    ) -> SubmitCall:
        """Return the call for these arguments. *timeout_s* None means the default."""
        timeout_s = self.default_timeout_s if timeout_s is None else timeout_s
        made = make_call(prompt, options, timeout_s=timeout_s, record=record)
        self._size_check.check(made.request)
        return made

    async def submit(self, call: SubmitCall) -> TaskHandle:
        """Submit and return a handle once the task id is known. See `NanoBananaClient.submit`."""
        await self.start()
        limits = self.queue.limits(call.owner)
        if self.options.on_event is not None:  # the position is O(owners)
            self.emit(self.queued(call))
        try:
            try:  # here and not further down, because each frame of ten thousand waiting calls takes 300 bytes
                slot = await self.slots.acquire(call.deadline_s, call.waiter)
            except TimeoutError:
                raise NotSent(NO_SLOT_MESSAGE) from None
            handle = await self._submit_with_slot(call, slot, limits)
        except BaseException as exc:
            self.queue.leave(call.waiter)
            if isinstance(exc, NanoBananaError):
                exc.key, exc.owner = call.key, call.owner
                self.emit(SubmitFailed(key=call.key, owner=call.owner, task_id=exc.task_id, error=exc))
            raise
        leave = partial(self.queue.leave, call.waiter)
        if limits.max_in_flight is None or not self.background.is_open:
            leave()
        else:
            self.background.start_soon(partial(_follow, self.tracker, handle.task_id, self.default_timeout_s, leave))
        duplicates = handle.possible_duplicates
        self.emit(Submitted(key=call.key, owner=call.owner, task_id=handle.task_id, possible_duplicates=duplicates))
        return handle

    def queued(self, call: SubmitCall) -> Queued:
        """Return the event of a call that waits in line."""
        position = self.queue.position(call.waiter)
        info = SubmitInfo(kind=latency_kind(call.request.model, call.request.image_size))
        eta = self.tracker.eta(info, self._flow.line_s(position))
        return Queued(key=call.key, owner=call.owner, position=position, eta=eta)

    async def _submit_with_slot(self, call: SubmitCall, slot: Slot, limits: OwnerLimits) -> TaskHandle:
        entry: LedgerEntry | None = None
        pending: PendingCallback | None = None
        record: SubmitRecord = NO_RECORD
        try:
            with Turn(self.slots, self.queue, call.waiter, slot, call.deadline_s) as turn:
                entry = self._new_entry(call, limits)
                record = call.record or entry or NO_RECORD
                pending = None if call.callback is None else call.callback.register()
                done = await self._submits.submit(
                    call.request if pending is None else attrs.evolve(call.request, callback_url=pending.url),
                    turn,
                    record=record,
                    nonce=None if pending is None else pending.nonce,
                    on_orphan=lambda done: self.report_orphan(self._new_handle(call, done, entry, pending)),
                )
        except SubmissionUnknown as exc:
            if pending is None:
                raise
            recover = partial(self._bind_late, call, entry)
            done = await self._recover(pending, record, exc, recover if call.record is None else None)
        handle = self._new_handle(call, done, entry, pending)
        if pending is not None and done.possible_duplicates:
            self._doubtful.add(pending.nonce, DoubtfulSubmit(handle.task_id, None))
        if pending is not None and pending.bind(handle.task_id):
            self.tracker.notify(handle.task_id)
            for task_id in pending.duplicates():
                await self._recovery.recover(pending.nonce, task_id, self._bind_callback)
        return handle

    def _new_entry(self, call: SubmitCall, limits: OwnerLimits) -> LedgerEntry | None:
        if call.record is not None or self.ledger is None:
            return None
        return self.ledger.new_entry(call.request, key=call.key, owner=call.owner, note=call.note, limits=limits)

    async def _recover(
        self,
        pending: PendingCallback,
        record: SubmitRecord,
        exc: SubmissionUnknown,
        bind_late: Callable[[str], Awaitable[None]] | None,
    ) -> AcceptedSubmit:
        """Wait for the callback of a submit whose response was lost. Raise *exc* if none comes.

        A callback that comes later is passed to *bind_late*.
        """
        known = self.tracker.cache.submits
        self._recovering.add(pending.nonce)
        try:
            found = await recover_by_callback(
                pending, self.handle, lambda task_id: known.get(task_id) is not None, self.options.timeouts.recovery_s
            )
        finally:
            self._recovering.discard(pending.nonce)
        if found is None:
            if bind_late is not None:
                self._doubtful.add(pending.nonce, DoubtfulSubmit(None, bind_late))
            raise exc
        await record.end_attempt(AttemptEnd(verdict=Verdict.ACCEPTED, rule="callback", task_id=found.task_id))
        _log.warning("task %s was recovered by its callback; its submit had failed: %s", found.task_id, exc)
        return AcceptedSubmit(found.task_id, exc.possible_duplicates)

    async def on_unmatched_callback(self, nonce: str, task_id: str) -> None:
        """Handle a callback that names a task whose submit is not known to have it."""
        is_expected = self._doubtful.get(nonce) is not None
        if not is_expected and self.ledger is not None and nonce not in self._recovering:
            await self.start()
            is_expected = await self.ledger.is_unresolved(nonce)
        if is_expected:
            await self._recovery.recover(nonce, task_id, self._bind_callback)

    async def _bind_callback(self, nonce: str, task_id: str) -> None:
        """Record the task of a submit whose response was lost, or a duplicate, after the service has confirmed it."""
        doubtful = self._doubtful.pop(nonce)
        if doubtful is not None and doubtful.bind is not None:
            await doubtful.bind(task_id)
            return
        entry = None if self.ledger is None else await self.ledger.bind(nonce, task_id)
        if doubtful is not None:
            _log.warning("task %s is a charged duplicate of task %s, by its callback", task_id, doubtful.task_id)
        elif entry is None:
            return
        self.report_orphan(self.handle(task_id, entry=entry))

    async def _bind_late(self, call: SubmitCall, entry: LedgerEntry | None, task_id: str) -> None:
        if entry is not None:
            await entry.end_attempt(AttemptEnd(verdict=Verdict.ACCEPTED, rule="callback", task_id=task_id))
        _log.warning("task %s was recovered by its callback, after its submit had failed", task_id)
        self.report_orphan(self._new_handle(call, AcceptedSubmit(task_id, 0), entry))

    def leave_task(self, handle: TaskHandle, exc: BaseException) -> None:
        """Report an orphan, and give *exc*, the cancellation of its caller, the task id as far as Python allows."""
        _log.warning("task %s: the caller was cancelled; the task keeps running", handle.task_id)
        exc.add_note(f"task {handle.task_id} is charged and keeps running")
        with contextlib.suppress(AttributeError):
            exc.task_id = handle.task_id  # type: ignore[attr-defined]  # an instance of another library
        self.report_orphan(handle)

    def report_orphan(self, handle: TaskHandle) -> None:
        """Tell the application about a charged task that no caller waits for any more."""
        if self.options.on_orphan is not None:
            try:
                self.options.on_orphan(handle)
            except (Exception, asyncio.CancelledError):  # noqa: BLE001 - user code; the caller must continue
                _log.exception("on_orphan failed for task %s", handle.task_id)

    def emit_saved(self, image: SavedImage, task_id: str | None) -> None:
        """Emit `Saved` for an image of a task."""
        info = self.tracker.cache.submits.get(task_id or "") or SubmitInfo()
        self.emit(Saved(key=info.key or task_id or "", owner=info.owner, task_id=task_id, image=image))

    # --- handles ----------------------------------------------------------------------------------------------------

    def handle(
        self, task_id: str, submitted_at: datetime | None = None, entry: LedgerEntry | None = None
    ) -> TaskHandle:
        """Return a handle of a task that was submitted earlier. Sends nothing."""
        if entry is None and self.ledger is not None:
            entry = self.ledger.find_entry(task_id)
        if submitted_at is None and entry is not None:
            submitted_at = entry.submitted_at
        info = self.tracker.cache.submits.get(task_id) or SubmitInfo()
        if submitted_at is not None and submitted_at.tzinfo is None:
            raise ValueError(f"submitted_at: expected a time with a time zone, got {submitted_at.isoformat()}")
        if submitted_at is not None:  # the wall clock may have been set back: no submit is in the future
            age_s = max(0.0, (datetime.now(UTC) - submitted_at).total_seconds())
            info = attrs.evolve(info, submitted_at_s=anyio.current_time() - age_s)
        if entry is not None:
            info = attrs.evolve(
                info, key=entry.key, owner=entry.owner, kind=latency_kind(entry.model, entry.image_size)
            )
        duplicates = 0 if entry is None else entry.possible_duplicates
        return TaskHandle(
            self, task_id, submit_info=info, submitted_at=submitted_at, possible_duplicates=duplicates, entry=entry
        )

    def _new_handle(
        self, call: SubmitCall, done: AcceptedSubmit, entry: LedgerEntry | None, pending: PendingCallback | None = None
    ) -> TaskHandle:
        info = SubmitInfo(
            submitted_at_s=anyio.current_time(),
            kind=latency_kind(call.request.model, call.request.image_size),
            callback_url=None if pending is None else sys.intern(pending.url.rpartition("/")[0]),
            key=call.key,
            owner=call.owner,
        )
        if self.tracker.cache.submits.get(done.task_id) is not None:
            _log.warning("task %s: the service has given its id to two submits, so one image is missing", done.task_id)
        self.tracker.cache.submits.add(done.task_id, info)
        self.delivery.remember(done.task_id, call.request)
        return TaskHandle(
            self,
            done.task_id,
            submit_info=info,
            submitted_at=datetime.now(UTC),
            possible_duplicates=done.possible_duplicates,
            entry=entry,
        )


async def _close_expired(transport: HttpxTransport) -> None:
    """Close connections that the server has closed, which would otherwise wait for the next query."""
    while True:
        await anyio.sleep(_CLOSE_EXPIRED_S)
        await transport.close_expired()


async def _follow(tracker: TaskTracker, task_id: str, timeout_s: float, leave: Callable[[], None]) -> None:
    """Wait for the end of a task that counts against the limits of its owner."""
    try:
        await tracker.wait(task_id, timeout_s=timeout_s)
    except NanoBananaError as exc:
        _log.debug("task %s no longer counts against the limits of its owner: %s", task_id, exc)
    finally:
        leave()


def _ignore(_: Task) -> None:
    pass
