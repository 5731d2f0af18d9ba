"""`NanoBananaClient`: the face. Owns transport, tracker and host; decides nothing itself."""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Final, Self, Unpack

import anyio
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.map_unordered import iter_any, map_unordered
from nanobanana_async._text import slugify
from nanobanana_async.api.operations import AcceptedSubmit, ServiceApi
from nanobanana_async.errors import ImageError, NanoBananaError, SubmissionUnknown
from nanobanana_async.handle import TaskHandle
from nanobanana_async.images.download import Downloader
from nanobanana_async.images.formats import SUFFIXES
from nanobanana_async.images.references import encode_references
from nanobanana_async.models import (
    CallbackSource,
    GeneratedImage,
    GenerationRequest,
    PendingCallback,
    RequestOptions,
    SavedImage,
    Task,
)
from nanobanana_async.outcomes import Outcome, Succeeded, log_unconsumed, outcome_from_error
from nanobanana_async.policies import Limits, PollPolicy, RetryPolicy, Timeouts
from nanobanana_async.protocols import Transport
from nanobanana_async.tracking.schedule import PollSchedule
from nanobanana_async.tracking.state import SubmitInfo, TrackerStatistics
from nanobanana_async.tracking.tracker import TaskTracker
from nanobanana_async.transport.httpx import HttpxTransport
from nanobanana_async.wire.endpoint import ApiKey, Endpoint

_log: Final = logging.getLogger("nanobanana_async")

_CONFIRM_INTERVAL_S: Final = 10.0


class NanoBananaClient:
    """The Nano Banana 2 image service, for one event loop, on asyncio or trio.

    Starts nothing until it is first used, and then belongs to that event loop. Use `async with`, or `await aclose()`
    from any task of that loop. One client serves any number of concurrent calls; make one per process, not per call.

    Args:
        api_key: Your key. None takes the first of DEFAPI_API_KEY, DEFAPI_KEY, NANO_BANANA_API_KEY that is set.
        base_url: Where the service is. None takes DEFAPI_BASE_URL, else the public service.
        limits: How much is on the wire at once, and how fast it goes out.
        retry: How often something is tried again, and which unanswered submits are.
        polling: When unfinished tasks are looked at; learned, unless it says otherwise.
        timeouts: How long things may take.
        transport: What carries the requests; None makes an `HttpxTransport`. One that is handed in stays open.
        on_orphan: Called with the handle of a task that was accepted after its caller had gone (cancelled, or out of
            time): the last chance to keep a paid id. It is logged as a warning, too.

    Raises:
        ConfigurationError: There is no key, or the key or the URL cannot be used.
    """

    def __init__(  # noqa: PLR0913 - the public face: one policy object per concern
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
        self._background = BackgroundTaskGroup()  # first: `__del__` asks it
        key = None if api_key is None else ApiKey(api_key)
        del api_key  # a traceback with local variables must not show it
        self._endpoint = Endpoint.resolve(key, base_url)
        self.limits: Final = limits
        self.timeouts: Final = timeouts
        self._owned_transport = HttpxTransport(connect_s=timeouts.connect_s) if transport is None else None
        active: Transport = self._owned_transport or transport  # type: ignore[assignment]  # one of the two is there
        self._api = ServiceApi(active, self._background, self._endpoint, limits=limits, retry=retry, timeouts=timeouts)
        if on_orphan is not None:
            self._api.on_orphan = lambda done, request: on_orphan(self._handle_for(done, request))
        self._tracker = TaskTracker(self._api, PollSchedule(polling), self._background)
        self._background.on_stopped = self._tracker.close
        self._downloader = Downloader(
            active, limits=limits, retry=retry, timeouts=timeouts, public_only=self._endpoint.is_public
        )

    async def generate(
        self,
        prompt: str | GenerationRequest,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Task:
        """Submit, wait, and return the finished task, which holds at least one image.

        Args:
            prompt: What to paint, or a whole `GenerationRequest` whose fields *options* replace.
            timeout_s: Seconds for all of it; None takes `Timeouts.task_s`.
            **options: The fields of `GenerationRequest`: images, model, aspect_ratio, image_size, callback_url, extra.

        Cancelling stops the waiting, not the task: a POST on the wire runs to its end, and the id of a task that is
        left behind is logged (logger `nanobanana_async`).

        Raises:
            TaskFailed: The task ended as failed.
            NoImage: It ended as success, was paid, and holds no picture.
            TaskTimeout: *timeout_s* passed; `client.task(exc.task_id)` can be awaited again.
            NotSent: Nothing was charged.
            SubmissionUnknown: It may have been charged; nothing says so.
            ApiError: The service said no.
            ImageError: A reference image cannot be used.
        """
        wait_s = self.timeouts.task_s if timeout_s is None else timeout_s
        deadline_s = anyio.current_time() + wait_s
        handle = await self._submit(prompt, options, deadline_s=deadline_s)
        try:
            return await handle.result(timeout_s=max(0.0, deadline_s - anyio.current_time()))
        except anyio.get_cancelled_exc_class():
            _log.warning("task %s was submitted, and its caller was cancelled; it runs on", handle.task_id)
            raise
        except NanoBananaError as exc:
            exc.task_id = exc.task_id or handle.task_id  # a paid id is never lost, whatever went wrong
            raise

    async def generate_many(
        self,
        requests: Iterable[str | GenerationRequest] | AsyncIterable[str | GenerationRequest],
        *,
        max_in_flight: int = 200,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Outcome]:
        """Yield what becomes of each of *requests*, as each ends; nothing a request meets ends the others.

        Requests are taken as there is room: not more than *max_in_flight* are under way or finished and not yet
        yielded, so a slow consumer slows the submits. Ended early, it takes no more requests and stops waiting; what
        is paid runs on, and its ids are logged. For runs that survive the process, see `Batch`.

        Args:
            requests: Prompts or whole requests, from any iterable, async ones included.
            max_in_flight: As above.
            timeout_s: Seconds for each; None takes `Timeouts.task_s`.

        Raises:
            ValueError: A prompt is empty, or the like. What was under way by then is yielded first.
            ConfigurationError: The client was closed meanwhile.
        """
        await self._background.ensure_started()

        async def keyed() -> AsyncGenerator[tuple[str, GenerationRequest]]:
            number = 0
            async with contextlib.aclosing(iter_any(requests)) as wanted:
                async for request in wanted:
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
            self._background, keyed(), generate_one, max_in_flight=max_in_flight, on_unconsumed=log_unconsumed
        )
        async with contextlib.aclosing(outcomes):
            async for outcome in outcomes:
                yield outcome

    async def submit(
        self,
        prompt: str | GenerationRequest,
        *,
        callback: CallbackSource | PendingCallback | None = None,
        before_send: Callable[[], Awaitable[None]] | None = None,
        **options: Unpack[RequestOptions],
    ) -> TaskHandle:
        """Submit and return as soon as the task id is known. Other arguments, cancelling and errors as for `generate`.

        Waits for its turn (`Limits`) for at most `Timeouts.task_s`.

        Args:
            prompt: As for `generate`.
            callback: A `CallbackReceiver`: the service announces the end to it, and polls are rare meanwhile. If the
                answer to the submit is lost, a callback within `Timeouts.recovery_s` tells the task id after all.
                With an expectation of your own making (`receiver.expect()`), that waiting is left to you: `recovered`.
            before_send: Awaited each time the request is about to leave: what it writes down exists before anything
                can be paid, and if it raises, nothing is sent. What is refused at no cost is then raised at once
                instead of tried again, so that the books can be closed.
            **options: As for `generate`.
        """
        deadline_s = anyio.current_time() + self.timeouts.task_s
        if callback is None:
            return await self._submit(prompt, options, deadline_s=deadline_s, before_send=before_send)
        pending_callback = callback.register() if isinstance(callback, CallbackSource) else callback
        options["callback_url"] = pending_callback.url
        try:
            handle = await self._submit(
                prompt, options, deadline_s=deadline_s, before_send=before_send, has_callback=True
            )
        except SubmissionUnknown as exc:
            found = await self.recover(pending_callback) if pending_callback is not callback else None
            if found is None:
                raise
            _log.warning("task %s was found by its callback; its submit said: %s", found.task_id, exc)
            handle = found
        if pending_callback.bind(handle.task_id):
            self.notify(handle.task_id)
        return handle

    async def recover(self, callback: PendingCallback) -> TaskHandle | None:
        """Return the task of a submit whose answer was lost, if a callback tells it within `Timeouts.recovery_s`.

        What a callback claims counts only if the service knows such a task, and no other submit of ours became it.
        It is asked about every ten seconds: a fresh task may be invisible, and the trouble that lost the answer may
        last.
        """
        claimed: str | None = None
        with anyio.move_on_after(self.timeouts.recovery_s):
            while True:
                with anyio.move_on_after(math.inf if claimed is None else _CONFIRM_INTERVAL_S):
                    claimed = await callback.wait_task_id()
                if claimed is None or self._tracker.cache.submits.get(claimed) is not None:
                    continue
                handle = self.task(claimed)
                with contextlib.suppress(NanoBananaError):
                    await handle.query()
                    return handle
        if claimed is not None:
            _log.warning("a callback says that a submit whose answer was lost is task %s; it was not found", claimed)
        return None

    def notify(self, task_id: str) -> None:
        """Take the hint that there is news of *task_id*, from a callback or another worker.

        Whoever waits for it causes one query, at most one in ten seconds; ids that nobody waits for cost nothing.
        """
        self._tracker.notify(task_id)

    def task(self, task_id: str, *, submitted_at: datetime | None = None) -> TaskHandle:
        """Return a handle on a task submitted before, in this process or another. No network.

        *submitted_at* (with a time zone) is when, if you know: a fresh task may be invisible for a while, and then it
        is not taken for one that does not exist.
        """
        if not task_id.strip():
            raise ValueError(f"task_id: must not be empty, got {task_id!r}")
        submit_info = self._tracker.cache.submits.get(task_id.strip()) or SubmitInfo()
        if submitted_at is not None:  # a wall clock may have been set meanwhile: nothing was submitted in the future
            age_s = max(0.0, (datetime.now(UTC) - submitted_at).total_seconds())
            submit_info = SubmitInfo(submitted_at_s=anyio.current_time() - age_s)
        return self._handle(task_id.strip(), submit_info, submitted_at)

    async def balance(self) -> Decimal:
        """Return the credits left on the account."""
        return await self._api.balance()

    async def download(self, image: GeneratedImage) -> bytes:
        """Return the encoded picture: PNG, JPEG, WebP or GIF.

        Raises:
            ImageError: It could not be fetched within `Timeouts.download_s`, or is no picture.
        """
        await self._background.ensure_started()
        return await self._downloader.download(image)

    async def save(self, task: Task, path: str | os.PathLike[str], *, name: str | None = None) -> list[Path]:
        """Write the pictures of *task* and return their paths, in order; [] when it has none.

        *where* is a folder, made if missing, in which files get *name* (None: the task id), made safe, and the suffix
        of their true type. With a picture's suffix, such as `fox.png`, *where* is the file itself. Further pictures
        are `fox-2.png` and so on. Files appear whole or not at all, and replace what had their name.

        Raises:
            ImageError: A picture could not be fetched, or the disk would not take it.
        """
        await self._background.ensure_started()
        path = Path(path)
        exact = path.suffix.lower() in SUFFIXES
        base = path.with_suffix("") if exact else path / slugify(name or task.task_id)
        paths = []
        for number, image in enumerate(task.images, start=1):
            tail = (f"-{number}" if number > 1 else "") + (path.suffix if exact else "")
            stem = base.with_name(base.name + tail)
            try:
                paths.append((await self._downloader.save(image, stem, keep_suffix=exact)).path)
            except ImageError as exc:
                exc.task_id = task.task_id
                raise
        return paths

    async def save_image(self, image: GeneratedImage, stem: Path) -> SavedImage:
        """Write one picture to *stem* plus the suffix of its true type, durably; replaces what had that name.

        Raises:
            ImageError: As `save`.
        """
        await self._background.ensure_started()
        return await self._downloader.save(image, stem)

    def statistics(self) -> TrackerStatistics:
        """Return how the tracker stands: what it watches, what it has learned, what it has cost. No network."""
        return self._tracker.statistics()

    async def aclose(self) -> None:
        """End every wait, let submits on the wire end within `Timeouts.submit_s`, close what is ours.

        From any task of the client's event loop; twice is harmless.
        """
        self._background.check_owner()
        self._tracker.close()
        bound_s = self.timeouts.submit_s + self.timeouts.close_s
        with anyio.move_on_after(bound_s, shield=True):
            try:
                await self._background.aclose(drain_s=self.timeouts.submit_s)
            finally:
                if self._owned_transport is not None:
                    await self._owned_transport.aclose()

    async def __aenter__(self) -> Self:
        self._background.check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._background.is_open:
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
        before_send: Callable[[], Awaitable[None]] | None = None,
        has_callback: bool = False,
    ) -> TaskHandle:
        if isinstance(prompt, GenerationRequest):
            request = attrs.evolve(prompt, **options)
        else:
            request = GenerationRequest(prompt, **options)
        done = await self._api.submit(request, self._with_references, deadline_s=deadline_s, before_send=before_send)
        return self._handle_for(done, request, has_callback=has_callback)

    async def _with_references(self, request: GenerationRequest) -> GenerationRequest:
        images = await encode_references(request.images, max_bytes=self.limits.max_reference_bytes)
        return request if images == request.images else attrs.evolve(request, images=images)

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
