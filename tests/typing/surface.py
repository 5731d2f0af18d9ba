"""The types of the public names, as a user's type checker sees them. Every public class is named here."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Unpack, assert_type

import httpx
import httpx2

import nanobanana_async as nb
from nanobanana_async.simulator import Charge, Simulator


async def surface(client: nb.NanoBananaClient, image: nb.GeneratedImage) -> None:
    """Call every method once."""
    task = await client.generate("a fox", images=[Path("a.png"), b"..."], aspect_ratio="16:9", timeout_s=300)
    assert_type(task, nb.Task)
    assert_type(task.status, nb.TaskStatus)
    assert_type(task.images, tuple[nb.GeneratedImage, ...])
    assert_type(task.consumed, Decimal | None)
    handle = await client.submit(nb.GenerationRequest("a fox"), extra={"seed": 1})
    assert_type(handle, nb.TaskHandle)
    assert_type(handle.task_id, str)
    assert_type(await handle.query(), nb.Task)
    assert_type(await handle.wait(timeout_s=1), nb.Task)
    assert_type(await handle.result(), nb.Task)
    assert_type(handle.updates(), AsyncGenerator[nb.Task, None])
    assert_type(client.task("ta-1"), nb.TaskHandle)
    assert_type(client.task("ta-1").eta(), nb.Eta | None)
    assert_type(await client.balance(), Decimal)
    assert_type(await client.download(image), bytes)
    assert_type(await client.save(task, "out/"), list[nb.SavedImage])
    await client.submit("a fox", ratio="16:9")  # type: ignore[call-arg]
    await client.submit("a fox", images=[1])  # type: ignore[list-item]


def transports(one: httpx.AsyncClient, other: httpx2.AsyncClient) -> list[nb.Transport]:
    """Pass in every kind of transport."""
    return [nb.HttpxTransport(), nb.HttpxTransport(one), nb.HttpxTransport(other), nb.AiohttpTransport(), Simulator()]


class FolderStore:
    """Store images in a folder of its own."""

    async def put(self, name: str, data: bytes) -> nb.SavedImage:
        """Claim that the image is stored."""
        return nb.SavedImage(path=Path(name), size_bytes=len(data), sha256="")


class RecordingTransport:
    """Respond without a service."""

    async def send(self, request: nb.WireRequest, *, timeout_s: float) -> nb.WireResponse:
        """Refuse downloads, and respond to the rest."""
        assert_type(request.kind, nb.RequestKind)
        if request.kind is nb.RequestKind.DOWNLOAD:
            raise nb.ExchangeError("refused", phase=nb.Phase.CONNECT, permanent=True)
        return nb.WireResponse(status=200, body=b"{}")

    async def aclose(self) -> None:
        """Close nothing."""


class OwnRecord:
    """Record the attempts of one request elsewhere."""

    is_doubted = False

    async def begin_attempt(self, nonce: str | None) -> None:
        """Record nothing."""

    async def end_attempt(self, end: nb.AttemptEnd) -> None:
        """Look at the verdict."""
        assert_type(end.verdict, nb.Verdict)
        assert_type(end.task_id, str | None)


async def records(client: nb.NanoBananaClient) -> None:
    """Submit with a record of one's own."""
    record: nb.SubmitRecord = OwnRecord()
    assert_type(await client.submit("a fox", record=record), nb.TaskHandle)


def configure() -> nb.NanoBananaClient:
    """Set every policy."""
    return nb.NanoBananaClient(
        "dk-test",
        limits=nb.Limits(max_submits=8),
        retry=nb.RetryPolicy(resubmit="never"),
        polling=nb.PollPolicy.fixed(2.0),
        timeouts=nb.Timeouts(task_s=60),
        transport=RecordingTransport(),
    )


async def ledgers(now: datetime, options: nb.SubmitOptions, note: nb.JsonValue) -> list[nb.LedgerTask]:
    """Submit for owners, and read the ledger after a restart."""
    ledger: nb.TaskLedger = nb.SqliteLedger("state/", keep_days=7, store_requests=False)
    limits = nb.OwnerLimits(max_in_flight=2, per_minute=10, budget=Decimal(5), max_price=Decimal(1))
    async with nb.NanoBananaClient(ledger=ledger, owner_limits=lambda _: limits) as client:
        assert_type(await client.submit("a fox", owner="discord:42", note=note), nb.TaskHandle)
        await client.generate("a fox", **options)
        async for handle in client.resume(follow=True):
            assert_type(handle.owner, str | None)
            assert_type(handle.note, nb.JsonValue)
            assert_type(handle.snapshot, nb.Task | None)
            await handle.ack()
        async for attempt in client.unresolved():
            assert_type(attempt, nb.UnresolvedAttempt)
            await attempt.ack()
        spending = await client.spending("discord:42", since=now)
        assert_type(spending, nb.Spending)
        assert_type(spending.reserved, Decimal)
    entry: nb.LedgerEntry = nb.SqliteLedger("state/").new_entry(nb.GenerationRequest("a fox"), key="k")
    await entry.acknowledge()
    return await nb.SqliteLedger("state/").all_tasks()


def describe(event: nb.Event) -> object:
    """Read every event."""
    match event:
        case nb.Queued(position=position, eta=eta):
            assert_type(eta, nb.Eta | None)
            return position
        case nb.Submitted(task_id=task_id, possible_duplicates=duplicates):
            return task_id, duplicates
        case nb.SubmitFailed(error=error):
            return error
        case nb.StatusChanged(task=task) | nb.Finished(task=task):
            return task
        case nb.Saved(image=image):
            return image
        case nb.Throttled(pause_s=pause_s):
            return pause_s


async def events(seen: list[nb.Event]) -> None:
    """Pass a hook, and stream the events of one request."""
    hook: nb.EventHook = seen.append
    async for event in nb.NanoBananaClient(on_event=hook).stream("a fox", every_s=5):
        assert_type(event, nb.Queued | nb.Submitted | nb.StatusChanged | nb.Finished)


async def callbacks(client: nb.NanoBananaClient, body: bytes) -> None:
    """Receive callbacks and read statistics."""
    receiver = nb.CallbackReceiver(client, public_url="https://app.example/nb", secret="s" * 32)
    assert_type(await receiver.deliver("token", body), bool)
    assert_type(nb.parse_callback(body), nb.CallbackPayload)
    await client.submit("a fox", callback=receiver)
    assert_type(client.statistics(), nb.TrackerStatistics)


async def requests(client: nb.NanoBananaClient, source: nb.ImageSource, **options: Unpack[nb.RequestOptions]) -> None:
    """Match every kind of outcome."""
    await client.generate("a fox", **options)
    async for outcome in client.generate_many([nb.GenerationRequest("a fox", images=[source])]):
        assert_type(outcome, nb.Succeeded | nb.Failed | nb.Unknown)
        match outcome:
            case nb.Succeeded(task=task):
                assert_type(task, nb.Task)
            case nb.Failed(error=error):
                assert_type(error, nb.NanoBananaError)
            case nb.Unknown(error=error):
                assert_type(error, nb.SubmissionUnknown | nb.TaskLost)


def differences(saved: nb.SavedImage) -> list[nb.MismatchKind]:
    """Read what was delivered, and in what it differs."""
    assert_type(saved.info, nb.ImageInfo | None)
    assert_type(saved.mismatch, tuple[nb.Mismatch, ...])
    return [one.kind for one in saved.mismatch]


def references(upload: Callable[[bytes], Awaitable[str]]) -> nb.ReferencePolicy:
    """Shrink references, and store them elsewhere."""
    return nb.ReferencePolicy(max_bytes=2**20, max_side_px=2048, on_too_large="shrink", upload=upload)


def policies(attempts: int) -> nb.RegeneratePolicy:
    """Submit again after some ends, and say what a reason means."""
    return nb.RegeneratePolicy(attempts=attempts, on={nb.RegenerateOn.EMPTY, "error"}, classify=nb.classify_reason)


def stores() -> list[nb.ImageStore]:
    """Pass a store without a base class."""
    return [FolderStore()]


async def batches(client: nb.NanoBananaClient, store: nb.ImageStore) -> list[nb.Outcome]:
    """Run a batch with a store of its own."""
    rows = nb.read_rows(Path("prompts.csv"))
    assert_type(rows, nb.RowFile)
    assert_type(list(rows), list[nb.BatchRow])
    async with nb.Batch.open("runs", client, budget=Decimal(5), image_store=store) as batch:
        outcomes = [outcome async for outcome in batch.run(rows)]
        assert_type(await batch.preview(rows), nb.BatchPreview)
        assert_type(batch.progress(), nb.BatchProgress)
        assert_type(batch.progress().budget, nb.BudgetStatus)
        assert_type(await batch.unknown_rows(), list[nb.LedgerRow])
        assert_type((await batch.unknown_rows())[0].state, nb.RowState)
    return outcomes


def errors(error: nb.TaskError, unknown: nb.SubmissionUnknown, api: nb.ApiError) -> None:
    """Read the attributes of errors."""
    assert_type(error.task, nb.Task | None)
    if isinstance(error, nb.NoImage | nb.TaskFailed):
        assert_type(error.task, nb.Task)
        assert_type(error.reason_kind, nb.ReasonKind)
        assert_type(nb.classify_reason(error.task), nb.ReasonKind)
    assert_type(error.earlier, tuple[nb.Task, ...])
    assert_type(error.task_id, str | None)
    assert_type(unknown.status, int | None)
    assert_type(unknown.possible_duplicates, int)
    assert_type(api.status, int | None)
    assert_type(api.retry_after_s, float | None)


def hierarchy() -> dict[type[Exception], tuple[type[nb.NanoBananaError], ...]]:
    """Return the errors by the class that catches them."""
    return {
        nb.ApiError: (
            nb.AuthenticationError,
            nb.InsufficientCredits,
            nb.InvalidRequest,
            nb.RateLimited,
            nb.ServiceUnavailable,
        ),
        nb.TaskError: (nb.TaskFailed, nb.TaskLost, nb.TaskTimeout, nb.NoImage),
        TimeoutError: (nb.TaskTimeout,),
        nb.TransportError: (nb.NotSent, nb.SubmissionUnknown, nb.ProtocolError),
        nb.ConfigurationError: (nb.InvalidBatchFile,),
        nb.NanoBananaError: (
            nb.BudgetExceeded,
            nb.ClientClosed,
            nb.ImageError,
            nb.KeyConflict,
            nb.LedgerError,
            nb.TaskNotFound,
            nb.WrongEventLoop,
        ),
    }


def truth(simulator: Simulator) -> None:
    """Read the charges."""
    assert_type(simulator.charges, list[Charge])
