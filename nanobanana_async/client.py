"""`NanoBananaClient` and `TaskHandle`: the face. Owns transport, tracker and host; decides nothing itself."""

import contextlib
import logging
import os
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Final, Self, Unpack
from urllib.parse import urlsplit

import anyio
import attrs

from nanobanana_async._host import Host
from nanobanana_async.errors import MediaError, NanoBananaError, NoImage, TaskFailed, TaskNotFound
from nanobanana_async.media.download import Downloader
from nanobanana_async.media.formats import SUFFIXES
from nanobanana_async.media.names import safe_name
from nanobanana_async.media.references import as_references
from nanobanana_async.models import GeneratedImage, GenerationRequest, RequestOptions, Task, TaskStatus
from nanobanana_async.policies import Limits, PollPolicy, RetryPolicy, Timeouts
from nanobanana_async.tracking.schedule import NOT_FOUND_GRACE_S, Schedule
from nanobanana_async.tracking.tracker import TaskTracker
from nanobanana_async.tracking.watch import Origin, Statistics
from nanobanana_async.transport.addresses import is_public, resolve
from nanobanana_async.transport.api import Api, Submitted
from nanobanana_async.transport.base import Transport
from nanobanana_async.transport.endpoint import DEFAULT_BASE_URL, Endpoint, Key
from nanobanana_async.transport.http import HttpTransport

_log: Final = logging.getLogger("nanobanana_async")


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
        transport: What carries the requests; None makes an `HttpTransport`. One that is handed in stays open.
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
        on_orphan: "Callable[[TaskHandle], None] | None" = None,
    ) -> None:
        self._host = Host()  # first: `__del__` asks it
        key = None if api_key is None else Key(api_key)
        del api_key  # a traceback with local variables must not show it
        self._endpoint = Endpoint.of(key, base_url)
        self._limits = limits
        self._timeouts = timeouts
        self._owned = HttpTransport(connect_s=timeouts.connect_s) if transport is None else None
        carrier: Transport = self._owned or transport  # type: ignore[assignment]  # one of the two is there
        self._api = Api(carrier, self._host, self._endpoint, limits=limits, retry=retry, timeouts=timeouts)
        if on_orphan is not None:
            self._api.on_orphan = lambda done, request: on_orphan(self._handle(done, request))
        self._tracker = TaskTracker(self._api, Schedule(polling), self._host)
        self._host.at_end = self._tracker.close
        self._downloader = Downloader(
            carrier, limits=limits, retry=retry, timeouts=timeouts, public_only=self._is_public
        )
        self._service_is_public: bool | None = None

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
            TaskUnfinished: *timeout_s* passed; `client.task(exc.task_id)` can be awaited again.
            NotSent: Nothing was charged.
            SubmissionUnknown: It may have been charged; nothing says so.
            ApiError: The service said no.
            MediaError: A reference image cannot be used.
        """
        wait_s = self._timeouts.task_s if timeout_s is None else timeout_s
        deadline_s = anyio.current_time() + wait_s
        handle = await self._submit(prompt, options, give_up_at_s=deadline_s)
        try:
            return await handle.result(timeout_s=max(0.0, deadline_s - anyio.current_time()))
        except anyio.get_cancelled_exc_class():
            _log.warning("task %s was submitted, and its caller was cancelled; it runs on", handle.task_id)
            raise
        except NanoBananaError as exc:
            exc.task_id = exc.task_id or handle.task_id  # a paid id is never lost, whatever went wrong
            raise

    async def submit(self, prompt: str | GenerationRequest, **options: Unpack[RequestOptions]) -> "TaskHandle":
        """Submit and return as soon as the task id is known. Arguments, cancelling and errors as for `generate`.

        Waits for its turn (`Limits`) for at most `Timeouts.task_s`.
        """
        return await self._submit(prompt, options, give_up_at_s=anyio.current_time() + self._timeouts.task_s)

    def task(self, task_id: str) -> "TaskHandle":
        """Return a handle on a task submitted before, in this process or another. No network."""
        if not task_id.strip():
            raise ValueError(f"task_id: must not be empty, got {task_id!r}")
        return TaskHandle(self, task_id.strip())

    async def balance(self) -> Decimal:
        """Return the credits left on the account."""
        return await self._api.balance()

    async def fetch(self, image: GeneratedImage) -> bytes:
        """Return the encoded picture: PNG, JPEG, WebP or GIF.

        Raises:
            MediaError: It could not be fetched within `Timeouts.download_s`, or is no picture.
        """
        await self._host.ensure()
        return await self._downloader.read(image)

    async def save(self, task: Task, where: str | os.PathLike[str], *, name: str | None = None) -> list[Path]:
        """Write the pictures of *task* and return their paths, in order; [] when it has none.

        *where* is a folder, made if missing, in which files get *name* (None: the task id), made safe, and the suffix
        of their true type. With a picture's suffix, such as `fox.png`, *where* is the file itself. Further pictures
        are `fox-2.png` and so on. Files appear whole or not at all, and replace what had their name.

        Raises:
            MediaError: A picture could not be fetched, or the disk would not take it.
        """
        await self._host.ensure()
        path = Path(where)
        exact = path.suffix.lower() in SUFFIXES
        base = path.with_suffix("") if exact else path / safe_name(name or task.task_id)
        paths = []
        for number, image in enumerate(task.images, start=1):
            tail = (f"-{number}" if number > 1 else "") + (path.suffix if exact else "")
            stem = base.with_name(base.name + tail)
            try:
                paths.append(await self._downloader.save(image, stem, exact=exact))
            except MediaError as exc:
                exc.task_id = task.task_id
                raise
        return paths

    def statistics(self) -> Statistics:
        """Return how the tracker stands: what it watches, what it has learned, what it has cost. No network."""
        return self._tracker.statistics()

    async def aclose(self) -> None:
        """End every wait, let submits on the wire end within `Timeouts.submit_s`, close what is ours.

        From any task of the client's event loop; twice is harmless.
        """
        self._tracker.close()
        bound_s = self._timeouts.submit_s + self._timeouts.close_s
        with anyio.move_on_after(bound_s, shield=True):
            try:
                await self._host.aclose(drain_s=self._timeouts.submit_s)
            finally:
                if self._owned is not None:
                    await self._owned.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._host.is_open:
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
        self, prompt: str | GenerationRequest, options: RequestOptions, *, give_up_at_s: float
    ) -> "TaskHandle":
        if isinstance(prompt, GenerationRequest):
            request = attrs.evolve(prompt, **options)
        else:
            request = GenerationRequest(prompt, **options)
        done = await self._api.submit(request, self._with_references, give_up_at_s=give_up_at_s)
        return self._handle(done, request)

    async def _with_references(self, request: GenerationRequest) -> GenerationRequest:
        images = await as_references(request.images, max_bytes=self._limits.reference_bytes)
        return request if images == request.images else attrs.evolve(request, images=images)

    def _handle(self, done: Submitted, request: GenerationRequest) -> "TaskHandle":
        origin = Origin(submitted_at_s=anyio.current_time(), model=request.model)
        return TaskHandle(
            self,
            done.task_id,
            origin=origin,
            submitted_at=datetime.now(UTC),
            possible_duplicates=done.possible_duplicates,
        )

    async def _is_public(self) -> bool:
        """Tell whether the service is on the internet: then its pictures are, too. A simulator may be anywhere."""
        if self._endpoint.base_url == DEFAULT_BASE_URL:
            return True
        if self._service_is_public is None:
            with contextlib.suppress(OSError, UnicodeError), anyio.move_on_after(self._timeouts.connect_s):
                addresses = await resolve(urlsplit(self._endpoint.base_url).hostname or "", 443)
                self._service_is_public = all(map(is_public, addresses))
        return self._service_is_public is not False


class TaskHandle:
    """One task at the service. Holds no resources: keep it, drop it, make it again from its `task_id`."""

    def __init__(
        self,
        client: NanoBananaClient,
        task_id: str,
        *,
        origin: Origin = Origin(),
        submitted_at: datetime | None = None,
        possible_duplicates: int = 0,
    ) -> None:
        self._client = client
        self._origin = origin
        self._final: Task | None = None
        self.task_id: Final = task_id
        self.submitted_at: Final = submitted_at
        """When the submit was accepted, by this machine's clock; None when it was submitted elsewhere."""
        self.possible_duplicates: Final = possible_duplicates
        """Re-sends under the retry policy after which an earlier try may have been charged as well."""

    def __repr__(self) -> str:
        return f"TaskHandle({self.task_id!r})"

    async def query(self) -> Task:
        """Return how the task stands now, with one query.

        A task submitted by this client that the service does not show yet is pending. Raises as `wait` does, and
        `TransportError` when no answer came.
        """
        if self._final is not None:
            return self._final
        try:
            task = await self._client._api.query(self.task_id)  # noqa: SLF001 - a handle is a part of its client
        except TaskNotFound:
            since_s = self._origin.submitted_at_s
            if since_s is None or anyio.current_time() - since_s > NOT_FOUND_GRACE_S:
                raise
            return Task(task_id=self.task_id, status=TaskStatus.PENDING)
        return self._keep(task)

    async def wait(self, *, timeout_s: float | None = None) -> Task:
        """Return the task once it is final, whether it succeeded or failed.

        Shares polls with everybody who waits for the same task. Cancelling stops the waiting, not the task.

        Args:
            timeout_s: Seconds to wait; None takes `Timeouts.task_s`.

        Raises:
            TaskUnfinished: The time passed; `exc.task` is the last snapshot. It runs on and can be awaited again.
            TaskNotFound: The service does not know it.
            AuthenticationError: The service does not accept the key.
        """
        return self._final or self._keep(await self._await_final(timeout_s))

    async def result(self, *, timeout_s: float | None = None) -> Task:
        """Return the task once it is a success with at least one image.

        Waits as `wait` does, and raises what it raises, and besides:

        Raises:
            TaskFailed: It ended as failed.
            NoImage: It ended as success, was paid, and holds no picture; `exc.task.texts` may say why.
        """
        task = self._final or self._keep(await self._await_final(timeout_s))
        if task.status is TaskStatus.FAILED:
            raise TaskFailed(f"task {task.task_id} failed: {task.reason or 'the service gave no reason'}", task=task)
        if not task.images:
            said = " ".join(task.texts) or task.reason or "no words either"
            raise NoImage(f"task {task.task_id} was paid, and brought no picture ({said[:500]})", task=task)
        return task

    async def updates(self, *, timeout_s: float | None = None) -> AsyncGenerator[Task]:
        """Yield a snapshot at each change of status, the final one last. Raises as `wait` does."""
        if self._final is not None:
            yield self._final
            return
        tracker = self._client._tracker  # noqa: SLF001 - a handle is a part of its client
        news = tracker.updates(self.task_id, timeout_s=self._timeout_s(timeout_s), origin=self._origin)
        async with contextlib.aclosing(news):
            async for task in news:
                yield self._keep(task)

    def _await_final(self, timeout_s: float | None) -> Coroutine[object, object, Task]:
        tracker = self._client._tracker  # noqa: SLF001 - the same
        return tracker.wait(self.task_id, timeout_s=self._timeout_s(timeout_s), origin=self._origin)

    def _timeout_s(self, timeout_s: float | None) -> float:
        return self._client._timeouts.task_s if timeout_s is None else timeout_s  # noqa: SLF001 - the same

    def _keep(self, task: Task) -> Task:
        if task.is_final:
            self._final = task
        return task
