"""The public client. It owns the transport, the tracker and the background tasks, and contains no policy."""

import contextlib
import logging
import os
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self, Unpack

import anyio
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.map_unordered import iter_any, map_unordered
from nanobanana_async._text import slugify
from nanobanana_async.api.flow_control import FlowControl
from nanobanana_async.api.operations import ServiceApi
from nanobanana_async.api.submit import NO_RECORD, AcceptedSubmit, SubmitLoop
from nanobanana_async.errors import ImageError, NanoBananaError, SubmissionUnknown
from nanobanana_async.handle import TaskHandle, recover_by_callback
from nanobanana_async.images.download import Downloader
from nanobanana_async.images.files import FileImageStore
from nanobanana_async.images.formats import SUFFIXES
from nanobanana_async.images.references import encode_images
from nanobanana_async.models import GeneratedImage, GenerationRequest, RequestOptions, SavedImage, Task
from nanobanana_async.outcomes import Outcome, Succeeded, log_unconsumed, outcome_from_error
from nanobanana_async.policies import Limits, PollPolicy, RetryPolicy, Timeouts
from nanobanana_async.protocols import AttemptEnd, CallbackSource, ImageStore, SubmitRecord, Transport, Verdict
from nanobanana_async.tracking.schedule import PollSchedule
from nanobanana_async.tracking.state import SubmitInfo, TrackerStatistics
from nanobanana_async.tracking.tracker import TaskTracker
from nanobanana_async.transport.addresses import ServiceNetwork
from nanobanana_async.transport.checked import CheckedTransport
from nanobanana_async.transport.httpx import HttpxTransport
from nanobanana_async.wire.endpoint import ApiKey, Endpoint

_log: Final = logging.getLogger("nanobanana_async")


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
        polling: When unfinished tasks are polled; learned by default.
        timeouts: Time limits of each operation.
        transport: What sends the requests; None creates an `HttpxTransport`. A transport that you pass is not closed.
        on_orphan: Called with the handle of a task that was accepted after its caller was cancelled or timed out. It
            is the last chance to keep the id of a charged task, which is also logged as a warning.

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
        polling: PollPolicy = PollPolicy(),
        timeouts: Timeouts = Timeouts(),
        transport: Transport | None = None,
        on_orphan: Callable[[TaskHandle], None] | None = None,
    ) -> None:
        # First, because `__del__` reads it.
        self._background = BackgroundTaskGroup()
        key = None if api_key is None else ApiKey(api_key)
        del api_key  # keep the key out of tracebacks with local variables
        self._endpoint = Endpoint.resolve(key, base_url)
        self.limits: Final = limits
        self.timeouts: Final = timeouts
        if transport is None:
            transport = HttpxTransport(connect_s=timeouts.connect_s)
            self._background.close_when_stopped(transport.aclose)
        active = CheckedTransport(transport)
        flow = FlowControl(limits, retry)
        self._api = ServiceApi(active, self._background, self._endpoint, flow, timeouts, max_polls=limits.max_polls)
        # It holds no reference to the client, which is then collected as soon as it is dropped.
        self._submits = SubmitLoop(
            active,
            self._background,
            self._endpoint,
            flow,
            timeouts,
            max_submits=limits.max_submits,
            prepare=partial(encode_images, max_bytes=limits.max_reference_bytes),
            on_orphan=None if on_orphan is None else lambda done, request: on_orphan(self._handle_for(done, request)),
        )
        self._tracker = TaskTracker(self._api, PollSchedule(polling), self._background)
        self._background.call_when_stopped(self._tracker.close)
        self._downloader = Downloader(
            active,
            limits=limits,
            retry=retry,
            timeouts=timeouts,
            public_only=ServiceNetwork(self._endpoint.base_url).is_public,
        )

    @property
    def base_url(self) -> str:
        """Base URL of the service."""
        return self._endpoint.base_url

    def account_digest(self, salt: str) -> str:
        """Return 16 hex digits that tell whether two clients have the same key. They say nothing else of it."""
        return self._endpoint.key_digest(salt)

    async def generate(
        self, prompt: str | GenerationRequest, *, timeout_s: float | None = None, **options: Unpack[RequestOptions]
    ) -> Task:
        """Submit a request, wait, and return the finished task, which has at least one image.

        Cancelling stops the wait, not the task. A POST in flight runs to its end, and the id of the task is logged
        (logger `nanobanana_async`).

        Args:
            prompt: Text to generate from, or a `GenerationRequest` whose fields *options* replace.
            timeout_s: Seconds for the whole call; None uses `Timeouts.task_s`.
            **options: The fields of `GenerationRequest`: images, model, aspect_ratio, image_size, callback_url, extra.

        Raises:
            TaskFailed: The task ended as failed.
            NoImage: It ended as success and was charged, but contains no image.
            TaskTimeout: *timeout_s* passed. `client.task(exc.task_id)` can be awaited again.
            NotSent: The submit did not reach the service; nothing was charged.
            SubmissionUnknown: The submit may have been charged, but no response confirmed it.
            ApiError: The service responded with an error.
            ImageError: A reference image cannot be used.
        """
        wait_s = self.timeouts.task_s if timeout_s is None else timeout_s
        deadline_s = anyio.current_time() + wait_s
        handle = await self._submit(prompt, options, deadline_s=deadline_s)
        try:
            return await handle.result(timeout_s=max(0.0, deadline_s - anyio.current_time()))
        except anyio.get_cancelled_exc_class():
            _log.warning("task %s: the caller was cancelled; the task keeps running", handle.task_id)
            raise
        except NanoBananaError as exc:
            exc.task_id = exc.task_id or handle.task_id  # every error carries the id of the charged task
            raise

    async def generate_many(
        self,
        requests: Iterable[str | GenerationRequest] | AsyncIterable[str | GenerationRequest],
        *,
        max_in_flight: int = 200,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Outcome]:
        """Run all *requests* and yield one outcome each, in completion order.

        A failed request does not stop the others. At most *max_in_flight* requests are running or finished and not yet
        consumed, so a slow consumer slows the submits. If you stop early, no more requests are taken. Charged tasks
        keep running, and their ids are logged. For runs that survive the process, see `Batch`.

        Args:
            requests: Prompts or `GenerationRequest`s, from any iterable or async iterable.
            max_in_flight: Most requests at once.
            timeout_s: Seconds per request; None uses `Timeouts.task_s`.

        Raises:
            ValueError: A request is invalid, for example an empty prompt. Running requests are yielded first.
            ClientClosed: The client was closed during the run.
        """
        await self._background.ensure_started()

        async def numbered() -> AsyncGenerator[tuple[str, GenerationRequest]]:
            number = 0
            async with contextlib.aclosing(iter_any(requests)) as source:
                async for request in source:
                    yield str(number), request if isinstance(request, GenerationRequest) else GenerationRequest(request)
                    number += 1

        async def generate_one(row: tuple[str, GenerationRequest]) -> Outcome:
            key, request = row
            try:
                task = await self.generate(request, timeout_s=timeout_s)
            except (NanoBananaError, ValueError) as exc:
                return outcome_from_error(exc, key=key, request=request)
            return Succeeded(key=key, request=request, task=task)

        outcomes: AsyncGenerator[Outcome] = map_unordered(
            self._background, numbered(), generate_one, max_in_flight=max_in_flight, on_unconsumed=log_unconsumed
        )
        async with contextlib.aclosing(outcomes):
            async for outcome in outcomes:
                yield outcome

    async def submit(
        self,
        prompt: str | GenerationRequest,
        *,
        callback: CallbackSource | None = None,
        record: SubmitRecord = NO_RECORD,
        **options: Unpack[RequestOptions],
    ) -> TaskHandle:
        """Submit a request and return a handle once the task id is known.

        Waits for a slot (`Limits`) for at most `Timeouts.task_s`. Cancelling and errors are those of `generate`.

        Args:
            prompt: Text or request, as for `generate`.
            callback: A `CallbackReceiver`. The service posts the final state to it, and polls are rare meanwhile. If
                the response to the submit is lost, a callback within `Timeouts.recovery_s` provides the task id.
            record: Records each POST before it leaves and after it has ended. What it raises ends the call.
            **options: Fields of `GenerationRequest`, as for `generate`.
        """
        deadline_s = anyio.current_time() + self.timeouts.task_s
        if callback is None:
            return await self._submit(prompt, options, deadline_s=deadline_s, record=record)
        pending = callback.register()
        options["callback_url"] = pending.url
        try:
            handle = await self._submit(prompt, options, deadline_s=deadline_s, record=record, nonce=pending.nonce)
        except SubmissionUnknown as exc:
            known = self._tracker.cache.submits
            found = await recover_by_callback(
                pending, self.task, lambda task_id: known.get(task_id) is not None, self.timeouts.recovery_s
            )
            if found is None:
                raise
            await record.end_attempt(AttemptEnd(verdict=Verdict.ACCEPTED, rule="callback", task_id=found.task_id))
            _log.warning("task %s was recovered by its callback; its submit had failed: %s", found.task_id, exc)
            handle = found
        if pending.bind(handle.task_id):
            self.notify(handle.task_id)
        return handle

    def notify(self, task_id: str) -> None:
        """Poll *task_id* soon, because a callback or another worker reported a change.

        If the task has waiters, one query is sent, at most one per ten seconds. Other ids have no effect.
        """
        self._tracker.notify(task_id)

    def task(self, task_id: str, *, submitted_at: datetime | None = None) -> TaskHandle:
        """Return a handle for a task submitted earlier, in this process or another. Sends nothing.

        *submitted_at* is the time of the submit, with a time zone. If it is recent, a 404 means that the task is not
        visible yet.
        """
        if not task_id.strip():
            raise ValueError(f"task_id: expected text, got {task_id!r}")
        submit_info = self._tracker.cache.submits.get(task_id.strip()) or SubmitInfo()
        if submitted_at is not None:  # the wall clock may have been set back: no submit is in the future
            age_s = max(0.0, (datetime.now(UTC) - submitted_at).total_seconds())
            submit_info = SubmitInfo(submitted_at_s=anyio.current_time() - age_s)
        return self._handle(task_id.strip(), submit_info, submitted_at)

    async def balance(self) -> Decimal:
        """Return the credits left in the account."""
        return await self._api.balance()

    async def download(self, image: GeneratedImage) -> bytes:
        """Return the encoded image: PNG, JPEG, WebP or GIF.

        Raises:
            ImageError: The download did not succeed within `Timeouts.download_s`, or the file is not an image.
        """
        await self._background.ensure_started()
        return await self._downloader.download(image)

    async def save(self, task: Task, path: str | os.PathLike[str], *, name: str | None = None) -> list[Path]:
        """Write the images of *task* and return their paths in order; [] if it has none.

        Files are written atomically and replace existing files of the same name. They are named *name*, or by the task
        id if None, plus the suffix of their true type. Further images are `fox-2.png` and so on.

        Args:
            task: A finished task.
            path: A folder, which is created if missing. With an image suffix, such as `fox.png`, the file itself.
            name: File name without suffix.

        Raises:
            ImageError: A download failed, or the file could not be written.
        """
        path = Path(path)
        suffix = path.suffix if path.suffix.lower() in SUFFIXES else ""
        folder, stem = (path.parent, path.stem) if suffix else (path, slugify(name or task.task_id))
        paths: list[Path] = []
        for number, image in enumerate(task.images, start=1):
            file_name = stem + (f"-{number}" if number > 1 else "") + suffix
            try:
                saved = await self.store(image, FileImageStore(folder), file_name, keep_suffix=bool(suffix))
            except ImageError as exc:
                exc.task_id = task.task_id
                raise
            paths.append(saved.path)
        return paths

    async def store(
        self, image: GeneratedImage, store: ImageStore, name: str, *, keep_suffix: bool = False
    ) -> SavedImage:
        """Download one image, check it, and put it into *store*. At most `Limits.max_downloads` run at once.

        It is stored as *name* plus the suffix of its true type, or as *name* itself with *keep_suffix*.

        Raises:
            ImageError: The download failed, or the store raised OSError.
        """
        await self._background.ensure_started()
        return await self._downloader.store(image, store, name, keep_suffix=keep_suffix)

    def statistics(self) -> TrackerStatistics:
        """Return a snapshot of the tracker: tracked tasks, learned latencies, polls. Sends nothing."""
        return self._tracker.statistics()

    async def aclose(self) -> None:
        """End every wait, let submits in flight finish within `Timeouts.submit_s`, and close what the client opened.

        Call it from any task of the client's event loop. A second call has no effect, nor has one after the event loop
        has ended.
        """
        if self._background.is_open:
            self._background.check_owner()
            self._tracker.close()
        with anyio.move_on_after(self.timeouts.submit_s + self.timeouts.close_s, shield=True):
            await self._background.aclose(drain_s=self.timeouts.submit_s)

    async def __aenter__(self) -> Self:
        self._background.check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._background.is_open:
            self._background.abandon(drain_s=self.timeouts.submit_s)
            warnings.warn(
                f"unclosed {self!r}: use 'async with' or 'await client.aclose()'",
                ResourceWarning,
                stacklevel=1,
                source=self,
            )

    def __repr__(self) -> str:
        endpoint = getattr(self, "_endpoint", None)  # None in a traceback from within `__init__`
        return f"NanoBananaClient(base_url={endpoint and endpoint.base_url!r})"

    async def _submit(
        self,
        prompt: str | GenerationRequest,
        options: RequestOptions,
        *,
        deadline_s: float,
        record: SubmitRecord = NO_RECORD,
        nonce: str | None = None,
    ) -> TaskHandle:
        if isinstance(prompt, GenerationRequest):
            request = attrs.evolve(prompt, **options)
        else:
            request = GenerationRequest(prompt, **options)
        done = await self._submits.submit(request, deadline_s=deadline_s, record=record, nonce=nonce)
        return self._handle_for(done, request, has_callback=nonce is not None)

    def _handle_for(
        self, done: AcceptedSubmit, request: GenerationRequest, *, has_callback: bool = False
    ) -> TaskHandle:
        submit_info = SubmitInfo(submitted_at_s=anyio.current_time(), model=request.model, has_callback=has_callback)
        self._tracker.cache.submits.add(done.task_id, submit_info)
        return self._handle(done.task_id, submit_info, datetime.now(UTC), done.possible_duplicates)

    def _handle(
        self, task_id: str, submit_info: SubmitInfo, submitted_at: datetime | None, possible_duplicates: int = 0
    ) -> TaskHandle:
        return TaskHandle(
            self._api,
            self._tracker,
            task_id,
            default_timeout_s=self.timeouts.task_s,
            submit_info=submit_info,
            submitted_at=submitted_at,
            possible_duplicates=possible_duplicates,
        )
