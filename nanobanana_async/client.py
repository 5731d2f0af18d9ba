"""The public client. It owns the transport, the tracker and the background tasks, and contains no policy."""

import contextlib
import math
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self, Unpack

import attrs

from nanobanana_async._text import slugify
from nanobanana_async.calls import SubmitOptions
from nanobanana_async.errors import ImageError, LedgerError
from nanobanana_async.events import EventHook, Finished, Queued, StatusChanged, Submitted
from nanobanana_async.handle import TaskHandle
from nanobanana_async.images.files import FileImageStore
from nanobanana_async.images.formats import split_suffix
from nanobanana_async.many import Requests, generate_many
from nanobanana_async.models import GeneratedImage, GenerationRequest, ReasonKind, Spending, Task, UnresolvedAttempt
from nanobanana_async.outcomes import Outcome
from nanobanana_async.policies import (
    Limits,
    OwnerLimits,
    PollPolicy,
    ReferencePolicy,
    RegeneratePolicy,
    RetryPolicy,
    Timeouts,
)
from nanobanana_async.protocols import ImageStore, SubmitRecord, TaskLedger, Transport
from nanobanana_async.regenerate import Generated, generate
from nanobanana_async.saved import SavedImage
from nanobanana_async.session import Session
from nanobanana_async.session_options import SessionOptions
from nanobanana_async.stream import stream
from nanobanana_async.tracking.state import TrackerStatistics
from nanobanana_async.wire.endpoint import ApiKey, Endpoint


class NanoBananaClient:
    """A client of the Nano Banana 2 image service, for one event loop, on asyncio or trio.

    It starts nothing until it is first used, and is then bound to that event loop. Use `async with`, or call `aclose()`
    from any task of that loop. One client serves any number of concurrent calls: create one per process, not one per
    call.

    Args:
        api_key: Your key. None uses the first of DEFAPI_API_KEY, DEFAPI_KEY and NANO_BANANA_API_KEY that is set.
        base_url: Base URL of the service. None uses DEFAPI_BASE_URL, else the public service.
        limits: Bounds on requests in flight and on their rate.
        retry: Retry limits, and when a submit may be resubmitted.
        regenerate: When a request is submitted and charged again after its task has ended; never by default.
        references: How large reference images may be, and whether larger ones are shrunk.
        polling: When unfinished tasks are polled; learned by default.
        timeouts: Time limits of each operation.
        ledger: A `SqliteLedger`, which records each task durably, for `resume`, `unresolved` and `spending`. The client
            opens it on first use, and closes what it has opened. None records nothing.
        owner_limits: What each owner of submits may use, or a function that returns it for an owner.
        transport: What sends the requests; None creates an `HttpxTransport`. A transport that you pass is not closed.
        on_orphan: Called with the handle of each charged task that no caller waits for any more: its caller was
            cancelled, timed out before the service responded, or left `generate_many`. The id is also logged.
        on_event: Called with each `Event` of the client. It must not block. What it raises is logged.

    Raises:
        ConfigurationError: There is no key, or the key or the URL cannot be used.
    """

    def __init__(  # noqa: PLR0913 - public: one policy object per concern
        self,
        api_key: str | None = None,
        *,
        base_url: str | None = None,
        limits: Limits = Limits(),
        retry: RetryPolicy = RetryPolicy(),
        regenerate: RegeneratePolicy = RegeneratePolicy(),
        references: ReferencePolicy = ReferencePolicy(),
        polling: PollPolicy = PollPolicy(),
        timeouts: Timeouts = Timeouts(),
        ledger: TaskLedger | None = None,
        owner_limits: OwnerLimits | Callable[[str], OwnerLimits] = OwnerLimits(),
        transport: Transport | None = None,
        on_orphan: Callable[[TaskHandle], None] | None = None,
        on_event: EventHook | None = None,
    ) -> None:
        key = None if api_key is None else ApiKey(api_key)
        del api_key  # keep the key out of tracebacks with local variables
        self.limits: Final = limits
        self.timeouts: Final = timeouts
        self.regenerate: Final = regenerate
        options = SessionOptions(
            limits=limits,
            retry=retry,
            regenerate=regenerate,
            references=references,
            polling=polling,
            timeouts=timeouts,
            owner_limits=owner_limits,
            on_event=on_event,
            on_orphan=on_orphan,
        )
        self._session = Session(Endpoint.resolve(key, base_url), transport, ledger, options)

    @property
    def base_url(self) -> str:
        """Base URL of the service."""
        return self._session.endpoint.base_url

    def account_digest(self, salt: str) -> str:
        """Return 16 hex digits that tell whether two clients have the same key. They say nothing else of it."""
        return self._session.endpoint.key_digest(salt)

    async def generate(
        self,
        prompt: str | GenerationRequest,
        *,
        timeout_s: float | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Task:
        """Submit a request, wait, and return the finished task, which has at least one image.

        With a `RegeneratePolicy` it is the last one with an image; the others are logged. Cancelling stops the wait,
        not the task. A POST in flight runs to its end, and the id of the task is logged (logger `nanobanana_async`).

        Args:
            prompt: Text to generate from, or a `GenerationRequest` whose fields *options* replace.
            timeout_s: Seconds for the whole call; None uses `Timeouts.task_s`.
            **options: The fields of `GenerationRequest`: images, model, aspect_ratio, image_size, callback_url, extra.
                Also owner, note and callback (see `SubmitOptions`).

        Raises:
            TaskFailed: The task ended as failed.
            NoImage: It ended as success and was charged, but contains no image.
            TaskTimeout: *timeout_s* passed. `client.task(exc.task_id)` can be awaited again.
            NotSent: The submit did not reach the service; nothing was charged.
            SubmissionUnknown: The submit may have been charged, but no response confirmed it.
            ApiError: The service responded with an error.
            ImageError: A reference image cannot be used.
            BudgetExceeded: The owner's budget does not allow it; nothing was sent.
            LedgerError: The ledger cannot be written. If the submit was sent, `exc.task_id` is set or it is logged.
        """
        return (await generate(self._session, self._session.call(prompt, options, timeout_s))).task

    async def generate_many(
        self,
        requests: Requests,
        *,
        max_in_flight: int = 200,
        timeout_s: float | None = None,
        owner: str | None = None,
    ) -> AsyncGenerator[Outcome]:
        """Run all *requests* and yield one outcome each, in completion order.

        A failed request does not stop the others. At most *max_in_flight* requests are running or finished and not yet
        consumed, so a slow consumer slows the submits. If you stop early, no more requests are taken. Charged tasks
        keep running, and their ids are logged and passed to `on_orphan`. For runs that survive the process, see
        `Batch`.

        Args:
            requests: Prompts or `GenerationRequest`s, from any iterable or async iterable.
            max_in_flight: Most requests at once.
            timeout_s: Seconds per request; None uses `Timeouts.task_s`.
            owner: Whom the images are for (see `SubmitOptions`).

        Raises:
            ValueError: A request is invalid, for example an empty prompt. Running requests are yielded first.
            ClientClosed: The client was closed during the run.
        """

        def make(request: GenerationRequest) -> Awaitable[Generated]:
            return generate(self._session, self._session.call(request, {"owner": owner}, timeout_s))

        outcomes = generate_many(self._session, requests, make, max_in_flight=max_in_flight)
        async with contextlib.aclosing(outcomes):
            async for outcome in outcomes:
                yield outcome

    async def submit(
        self,
        prompt: str | GenerationRequest,
        *,
        record: SubmitRecord | None = None,
        **options: Unpack[SubmitOptions],
    ) -> TaskHandle:
        """Submit a request and return a handle once the task id is known, and durable if there is a ledger.

        Waits for its turn and a slot (`Limits`) for at most `Timeouts.task_s`. Cancelling and errors are those of
        `generate`.

        Args:
            prompt: Text or request, as for `generate`.
            record: Records each POST before it leaves and after it has ended, instead of the ledger of the client.
                What it raises ends the call.
            **options: As for `generate`.
        """
        return await self._session.submit(self._session.call(prompt, options, record=record))

    async def stream(
        self,
        prompt: str | GenerationRequest,
        *,
        timeout_s: float | None = None,
        every_s: float | None = None,
        **options: Unpack[SubmitOptions],
    ) -> AsyncGenerator[Queued | Submitted | StatusChanged | Finished]:
        """Submit a request and yield its events, from its place in line to its final task.

        `Queued` comes first, and again when the place has changed, at most once per second. Then `Submitted` and
        `StatusChanged`, and `Finished` as the last one, whether the task succeeded or failed. If you stop early, the
        place in line is given up. A charged task keeps running. If its id was not yielded, it is passed to `on_orphan`.

        Args:
            prompt: Text or request, as for `generate`.
            timeout_s: Seconds for the whole call; None uses `Timeouts.task_s`.
            every_s: Repeat the last event after this time without a new one; None does not.
            **options: As for `generate`.

        Raises what `generate` raises, except `TaskFailed` and `NoImage`.
        """
        if every_s is not None and not every_s > 0:  # true for nan, too
            raise ValueError(f"every_s: expected more than 0 seconds, got {every_s:g}")
        call = self._session.call(prompt, options, timeout_s)
        events = stream(self._session, call, every_s=math.inf if every_s is None else every_s)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    def notify(self, task_id: str) -> None:
        """Poll *task_id* soon, because a callback or another worker reported a change.

        If the task has waiters, one query is sent, at most one per ten seconds. Other ids have no effect. Raises
        `WrongEventLoop` in another thread.
        """
        self.check_event_loop()
        self._session.tracker.notify(task_id)

    async def on_unmatched_callback(self, nonce: str, task_id: str) -> None:
        """Handle a callback that names a task whose submit is not known to have it. For a `CallbackReceiver`."""
        await self._session.on_unmatched_callback(nonce, task_id)

    def check_event_loop(self) -> None:
        """Raise `WrongEventLoop` on another event loop or in another thread than the one the client is bound to."""
        self._session.background.check_owner()

    def task(self, task_id: str, *, submitted_at: datetime | None = None) -> TaskHandle:
        """Return a handle for a task submitted earlier, in this process or another. Sends nothing.

        *submitted_at* is the time of the submit, with a time zone. If it is recent, a 404 means that the task is not
        visible yet.
        """
        if not task_id.strip():
            raise ValueError(f"task_id: expected text, got {task_id!r}")
        return self._session.handle(task_id.strip(), submitted_at)

    async def resume(self, *, follow: bool = False) -> AsyncGenerator[TaskHandle]:
        """Yield a handle of each accepted task in the ledger that is not acknowledged, finished or not, oldest first.

        Call it after a restart, and `handle.ack()` once the application has used a result. Several processes may share
        the ledger: a task is yielded by the process that has submitted it, and after its end by one other process.

        Args:
            follow: Go on with the tasks of processes that end from now on, and never return.

        Raises:
            LedgerError: The client has no ledger, or it cannot be used.
        """
        ledger = await self._started_ledger()
        async with contextlib.aclosing(ledger.unacknowledged(follow=follow)) as entries:
            async for entry in entries:
                yield self._session.handle(entry.task_id or "", entry.submitted_at, entry)

    async def unresolved(self) -> AsyncGenerator[UnresolvedAttempt]:
        """Yield each submit in the ledger that may have been charged, whose task id is not known, until `ack()`.

        They are never resubmitted. Raises as `resume` does.
        """
        ledger = await self._started_ledger()
        for attempt in await ledger.unresolved():
            yield attempt

    async def spending(self, owner: str | None = None, since: datetime | None = None) -> Spending:
        """Return what *owner* has spent since a time, from the ledger, in all processes that share it.

        *owner* None sums over all owners. *since* None means since the beginning. Raises as `resume` does.
        """
        return await (await self._started_ledger()).spending(owner, since)

    async def balance(self) -> Decimal:
        """Return the credits left in the account."""
        return await self._session.api.balance()

    async def download(self, image: GeneratedImage) -> bytes:
        """Return the encoded image: PNG, JPEG, WebP or GIF.

        Raises:
            ImageError: The download did not succeed within `Timeouts.download_s`, or the file is not an image.
        """
        await self._session.start()
        return await self._session.downloader.download(image)

    async def save(self, task: Task, path: str | os.PathLike[str], *, name: str | None = None) -> list[SavedImage]:
        """Write the images of *task* and return the files in order; [] if it has none.

        Files are written atomically and replace existing files of the same name. They are named *name*, or by the task
        id if None, plus the suffix of their true type. Further images are `fox-2.png` and so on. *path* is a folder,
        which is created if missing. With an image suffix it is the file itself, whose suffix is changed if the image
        has another format.

        Raises:
            ImageError: A download failed, or the file could not be written.
        """
        path = Path(path)
        stem, suffix = split_suffix(path.name)
        folder = path.parent if suffix else path
        stem = stem if suffix else slugify(name or task.task_id)
        files: list[SavedImage] = []
        for number, image in enumerate(task.images, start=1):
            file_name = stem + (f"-{number}" if number > 1 else "") + suffix
            try:
                saved = await self.store(image, FileImageStore(folder), file_name, task_id=task.task_id)
            except ImageError as exc:
                exc.task_id = task.task_id
                raise
            files.append(saved)
        return files

    async def store(
        self,
        image: GeneratedImage,
        store: ImageStore,
        name: str,
        *,
        task_id: str | None = None,
        request: GenerationRequest | None = None,
    ) -> SavedImage:
        """Download one image, check it, and put it into *store*. At most `Limits.max_downloads` run at once.

        It gets *name* with the suffix of its true format. *task_id* is the task that `Saved` is about. It is compared
        with *request*; None stands for the request that this client has sent.

        Raises:
            ImageError: The download failed, or the store raised OSError.
        """
        await self._session.start()
        compare = partial(self._session.delivery.check, task_id=task_id, request=request)
        saved = await self._session.downloader.store(image, store, name, compare)
        self._session.emit_saved(saved, task_id)
        return saved

    def classify_reason(self, task: Task) -> ReasonKind:
        """Return why the final *task* has no image: by `RegeneratePolicy.classify`, else by the words of the service.

        `reason_kind` of `TaskFailed` and `NoImage` is the same.
        """
        return self._session.classify_reason(task)

    def statistics(self) -> TrackerStatistics:
        """Return a snapshot: tracked tasks, latencies, polls, ends. No I/O. Any thread may call it."""
        counters = (self._session.delivery.counts, self._session.reasons)
        mismatches, reasons = ({kind.value: count for kind, count in list(one.items())} for one in counters)
        return attrs.evolve(self._session.tracker.statistics(), mismatches=mismatches, reasons=reasons)

    async def aclose(self) -> None:
        """End every wait, let submits in flight finish within `Timeouts.submit_s`, and close what the client opened.

        Call it from any task of the client's event loop. A second call has no effect, nor has one after the event loop
        has ended.
        """
        await self._session.aclose()

    async def __aenter__(self) -> Self:
        self._session.background.check_open()
        if self._session.ledger is not None:  # a ledger that cannot be opened is found now, not at the first submit
            try:
                await self._session.start()
            except BaseException:
                await self.aclose()
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        session = getattr(self, "_session", None)  # None in a traceback from within `__init__`
        return f"NanoBananaClient(base_url={session and session.endpoint.base_url!r})"

    async def _started_ledger(self) -> TaskLedger:
        if self._session.ledger is None:
            raise LedgerError("client: has no ledger. Pass ledger=SqliteLedger(folder).")
        await self._session.start()
        return self._session.ledger
