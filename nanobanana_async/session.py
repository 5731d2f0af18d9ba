"""`Session`: what a client and its handles share. Dropping all of them stops the background work."""

import asyncio
import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Final

import anyio
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.slots import Slot, SlotPool
from nanobanana_async.api.fair_queue import FairQueue
from nanobanana_async.api.flow_control import FlowControl
from nanobanana_async.api.operations import ServiceApi
from nanobanana_async.api.submit import NO_RECORD, NO_SLOT_MESSAGE, AcceptedSubmit, SubmitLoop
from nanobanana_async.calls import SubmitCall, SubmitOptions, make_call
from nanobanana_async.errors import ConfigurationError, NanoBananaError, NotSent, SubmissionUnknown
from nanobanana_async.events import (
    Event,
    EventHook,
    Finished,
    Queued,
    Saved,
    StatusChanged,
    SubmitFailed,
    Submitted,
    Throttled,
)
from nanobanana_async.handle import TaskHandle, recover_by_callback
from nanobanana_async.images.download import Downloader
from nanobanana_async.images.references import encode_images
from nanobanana_async.models import GenerationRequest, SavedImage, Task
from nanobanana_async.policies import Limits, OwnerLimits, PollPolicy, RetryPolicy, Timeouts
from nanobanana_async.protocols import (
    AttemptEnd,
    LedgerEntry,
    PendingCallback,
    SubmitRecord,
    TaskLedger,
    Transport,
    Verdict,
)
from nanobanana_async.tracking.schedule import PollSchedule
from nanobanana_async.tracking.state import SubmitInfo
from nanobanana_async.tracking.tracker import TaskTracker
from nanobanana_async.transport.addresses import ServiceNetwork
from nanobanana_async.transport.checked import CheckedTransport
from nanobanana_async.transport.httpx import HttpxTransport
from nanobanana_async.wire.endpoint import Endpoint

_log: Final = logging.getLogger("nanobanana_async")


@attrs.frozen(kw_only=True)
class SessionOptions:
    """The policies and hooks of a client, as its arguments describe them."""

    limits: Limits
    retry: RetryPolicy
    polling: PollPolicy
    timeouts: Timeouts
    owner_limits: OwnerLimits | Callable[[str], OwnerLimits]
    on_event: EventHook | None
    on_orphan: Callable[[TaskHandle], None] | None


class Session:
    """The operations of a client, its background work, and its ledger."""

    def __init__(
        self, endpoint: Endpoint, transport: Transport | None, ledger: TaskLedger | None, options: SessionOptions
    ) -> None:
        _check_options(ledger, options)
        limits, timeouts = options.limits, options.timeouts
        self.endpoint: Final = endpoint
        self.ledger: Final = ledger
        self.options: Final = options
        self.default_timeout_s: Final = timeouts.task_s
        self._ledger_lock = anyio.Lock()
        self._has_opened_ledger = False
        self.background: Final = BackgroundTaskGroup()
        # Nothing that the background work refers to may refer to the session, which is collected once it is dropped.
        self.emit: Final = partial(_emit, options.on_event)
        if transport is None:
            transport = HttpxTransport(connect_s=timeouts.connect_s)
            self.background.close_when_stopped(transport.aclose)
        active = CheckedTransport(transport)
        flow = FlowControl(limits, options.retry, partial(_emit_throttled, self.emit))
        self.api: Final = ServiceApi(
            active,
            self.background,
            endpoint,
            flow,
            timeouts,
            max_polls=limits.max_polls,
            observe=_ignore if ledger is None else ledger.observe,
        )
        limits_of = partial(_owner_limits, options.owner_limits, ledger)
        self.queue: Final = FairQueue(limits_of, self.background.start_soon)
        self.slots: Final = SlotPool(limits.max_submits, self.background.start_soon, self.queue)
        self._submits = SubmitLoop(
            active,
            self.background,
            endpoint,
            flow,
            timeouts,
            prepare=partial(encode_images, max_bytes=limits.max_reference_bytes),
        )
        schedule = PollSchedule(options.polling)
        self.tracker: Final = TaskTracker(self.api, schedule, self.background, partial(_emit_change, self.emit))
        self.background.call_when_stopped(self.tracker.close)
        self.downloader: Final = Downloader(
            active,
            limits=limits,
            retry=options.retry,
            timeouts=timeouts,
            public_only=ServiceNetwork(endpoint.base_url).is_public,
        )

    async def start(self) -> None:
        """Start the background work and open the ledger, on first use. It is closed when the work has stopped."""
        await self.background.ensure_started()
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
        return make_call(prompt, options, timeout_s=timeout_s, record=record)

    async def submit(self, call: SubmitCall) -> TaskHandle:
        """Submit and return a handle once the task id is known. See `NanoBananaClient.submit`."""
        await self.start()
        limits = self.queue.limits(call.owner)
        if self.options.on_event is not None:  # the position is O(owners)
            self.emit(Queued(key=call.key, owner=call.owner, position=self.queue.position(call.waiter)))
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

    async def _submit_with_slot(self, call: SubmitCall, slot: Slot, limits: OwnerLimits) -> TaskHandle:
        entry: LedgerEntry | None = None
        pending: PendingCallback | None = None
        record: SubmitRecord = NO_RECORD
        try:
            with slot:
                entry = self._new_entry(call, limits)
                record = call.record or entry or NO_RECORD
                pending = None if call.callback is None else call.callback.register()
                done = await self._submits.submit(
                    call.request if pending is None else attrs.evolve(call.request, callback_url=pending.url),
                    slot,
                    deadline_s=call.deadline_s,
                    record=record,
                    nonce=None if pending is None else pending.nonce,
                    on_orphan=lambda done: self.report_orphan(self._new_handle(call, done, entry)),
                )
        except SubmissionUnknown as exc:
            if pending is None:
                raise
            done = await self._recover(pending, record, exc)
        handle = self._new_handle(call, done, entry)
        if pending is not None and pending.bind(handle.task_id):
            self.tracker.notify(handle.task_id)
        return handle

    def _new_entry(self, call: SubmitCall, limits: OwnerLimits) -> LedgerEntry | None:
        if call.record is not None or self.ledger is None:
            return None
        return self.ledger.new_entry(call.request, key=call.key, owner=call.owner, note=call.note, limits=limits)

    async def _recover(self, pending: PendingCallback, record: SubmitRecord, exc: SubmissionUnknown) -> AcceptedSubmit:
        """Wait for the callback of a submit whose response was lost. Raise *exc* if none comes."""
        known = self.tracker.cache.submits
        found = await recover_by_callback(
            pending, self.handle, lambda task_id: known.get(task_id) is not None, self.options.timeouts.recovery_s
        )
        if found is None:
            raise exc
        await record.end_attempt(AttemptEnd(verdict=Verdict.ACCEPTED, rule="callback", task_id=found.task_id))
        _log.warning("task %s was recovered by its callback; its submit had failed: %s", found.task_id, exc)
        return AcceptedSubmit(found.task_id, exc.possible_duplicates)

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
        if submitted_at is not None:  # the wall clock may have been set back: no submit is in the future
            age_s = max(0.0, (datetime.now(UTC) - submitted_at).total_seconds())
            info = attrs.evolve(info, submitted_at_s=anyio.current_time() - age_s)
        if entry is not None:
            info = attrs.evolve(info, key=entry.key, owner=entry.owner, model=entry.model)
        duplicates = 0 if entry is None else entry.possible_duplicates
        return TaskHandle(
            self, task_id, submit_info=info, submitted_at=submitted_at, possible_duplicates=duplicates, entry=entry
        )

    def _new_handle(self, call: SubmitCall, done: AcceptedSubmit, entry: LedgerEntry | None) -> TaskHandle:
        info = SubmitInfo(
            submitted_at_s=anyio.current_time(),
            model=call.request.model,
            has_callback=call.callback is not None,
            key=call.key,
            owner=call.owner,
        )
        self.tracker.cache.submits.add(done.task_id, info)
        return TaskHandle(
            self,
            done.task_id,
            submit_info=info,
            submitted_at=datetime.now(UTC),
            possible_duplicates=done.possible_duplicates,
            entry=entry,
        )


def _check_options(ledger: object, options: SessionOptions) -> None:
    if ledger is not None and not hasattr(ledger, "new_entry"):
        raise ConfigurationError(f"ledger: expected SqliteLedger(folder) or another TaskLedger, got {ledger!r:.80}")
    if inspect.iscoroutinefunction(options.on_event) or inspect.iscoroutinefunction(options.on_orphan):
        raise ConfigurationError("on_event, on_orphan: expected plain functions, got a coroutine function")
    if isinstance(options.owner_limits, OwnerLimits):
        _check_owner_limits(options.owner_limits, ledger)
    elif not callable(options.owner_limits):
        raise ConfigurationError(f"owner_limits: expected OwnerLimits or a function, got {options.owner_limits!r:.80}")


def _check_owner_limits(limits: object, ledger: object) -> None:
    if not isinstance(limits, OwnerLimits):
        raise ConfigurationError(f"owner_limits: expected a function that returns OwnerLimits, got {limits!r:.80}")
    if limits.budget is not None and ledger is None:
        raise ConfigurationError("owner_limits: a budget needs a ledger. Pass ledger=SqliteLedger(folder).")


def _owner_limits(
    given: OwnerLimits | Callable[[str], OwnerLimits], ledger: TaskLedger | None, owner: str
) -> OwnerLimits:
    limits = given if isinstance(given, OwnerLimits) else given(owner)
    _check_owner_limits(limits, ledger)
    return limits


async def _follow(tracker: TaskTracker, task_id: str, timeout_s: float, leave: Callable[[], None]) -> None:
    """Wait for the end of a task that counts against the limits of its owner."""
    try:
        await tracker.wait(task_id, timeout_s=timeout_s)
    except NanoBananaError as exc:
        _log.debug("task %s no longer counts against the limits of its owner: %s", task_id, exc)
    finally:
        leave()


def _emit(hook: EventHook | None, event: Event) -> None:
    if hook is not None:
        try:
            hook(event)
        except (Exception, asyncio.CancelledError):  # noqa: BLE001 - user code, such as `result()` of a cancelled future
            _log.exception("on_event failed for %r", event)


def _emit_change(emit: Callable[[Event], None], info: SubmitInfo, task: Task) -> None:
    emit(to_event(info, task))


def _emit_throttled(emit: Callable[[Event], None], pause_s: float) -> None:
    emit(Throttled(key="", pause_s=pause_s))


def to_event(info: SubmitInfo, task: Task) -> StatusChanged | Finished:
    """Return the event for a snapshot."""
    kind = Finished if task.is_final else StatusChanged
    return kind(key=info.key or task.task_id, owner=info.owner, task_id=task.task_id, task=task)


def _ignore(_: Task) -> None:
    pass
