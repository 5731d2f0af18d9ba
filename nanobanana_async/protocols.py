"""The seams of the package: what an application may implement itself."""

import enum
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from datetime import datetime
from typing import Protocol, TypeAlias, runtime_checkable

import attrs
from attrs.validators import instance_of

from nanobanana_async.errors import NanoBananaError
from nanobanana_async.models import GenerationRequest, JsonValue, Spending, Task, UnresolvedAttempt
from nanobanana_async.policies import OwnerLimits
from nanobanana_async.saved import SavedImage


class RequestKind(enum.Enum):
    """The purpose of a request, which decides how it may be sent.

    Attributes:
        SUBMIT: A request that may be charged. It uses a new connection. On a reused connection, 20 of 4800
            submits failed ambiguously (measured).
        READ: An API call that is safe to retry. It reuses connections.
        DOWNLOAD: A file on a third-party host. It never carries credentials or cookies, and never uses the
            caller's client.
    """

    SUBMIT = enum.auto()
    READ = enum.auto()
    DOWNLOAD = enum.auto()


class Phase(enum.IntEnum):
    """How far an exchange got before it failed. Up to `CONNECT`, the peer received no byte of the request.

    Attributes:
        CONNECT: No byte of the request has left.
        SEND: The request was being sent. All of it, a part or nothing may have arrived.
        RESPONSE: At least the status line of a response had arrived.
    """

    CONNECT = 0
    SEND = 1
    RESPONSE = 2


@attrs.frozen(kw_only=True)
class WireRequest:
    """One HTTP request, ready to be sent.

    Attributes:
        kind: What it is for.
        method: HTTP method.
        url: Absolute URL.
        headers: Headers to send. The repr hides them, because they contain the key.
        body: Body to send; None for none.
        max_bytes: Largest response body that is read. A longer one ends the exchange.
        public_only: Whether to refuse connections to addresses that are not public.
        before_body: Awaited with the head of a 200 before its body is read, to wait for memory. A transport may
            ignore it. If the head states no length, it is awaited again once a MiB has arrived, with
            `max_bytes` as the length.
    """

    kind: RequestKind
    method: str
    url: str
    headers: Mapping[str, str] = attrs.field(factory=dict[str, str], repr=False)
    body: bytes | None = attrs.field(default=None, repr=False)
    max_bytes: int = 2**20
    public_only: bool = False
    before_body: "BodyHook | None" = attrs.field(default=None, repr=False, eq=False)


def _check_headers(_: object, __: object, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        if not all(isinstance(text, str) for text in (name, value)):
            raise TypeError(f"headers: expected str names and values, got {name!r:.80}: {value!r:.80}")


@attrs.frozen(kw_only=True)
class WireResponse:
    """One HTTP response. Header names are lower case. `body` is the body as received, never decompressed.

    Attributes:
        status: HTTP status.
        headers: Headers by name in lower case.
        body: Body as received, up to `WireRequest.max_bytes`.
    """

    status: int = attrs.field(validator=instance_of(int))
    headers: Mapping[str, str] = attrs.field(factory=dict[str, str], repr=False, validator=_check_headers)
    body: bytes = attrs.field(default=b"", repr=False, validator=instance_of(bytes))


BodyHook: TypeAlias = Callable[[WireResponse], Awaitable[None]]
"""Called with the head of a response, before its body is read."""


class ExchangeError(Exception):
    """The exchange ended without a complete response. Raised by transports. Users see the error it is mapped to.

    It contains only text and bytes, so never the API key.

    Attributes:
        phase: How far the exchange got. The verdict on a submit depends on it.
        permanent: Whether a retry cannot help: a certificate, a malformed URL, a refused address.
        response: The part of the response that had arrived; None before the status line.
    """

    def __init__(
        self, reason: str, *, phase: Phase, permanent: bool = False, response: WireResponse | None = None
    ) -> None:
        super().__init__(reason)
        self.reason: str = reason
        self.phase: Phase = phase
        self.permanent: bool = permanent
        self.response: WireResponse | None = response


class Transport(Protocol):
    """A carrier of requests: it sends one and returns its response, without retries, redirects or queues.

    The caller bounds how many requests are in flight. An implementation carries all of them at once.
    """

    async def send(self, request: WireRequest, *, timeout_s: float) -> WireResponse:
        """Return the response to *request* within *timeout_s* seconds in total.

        Cancelling closes the connection and has no other effect.

        Raises:
            ExchangeError: No complete response arrived in time, or its body exceeded `request.max_bytes`.
        """
        ...

    async def aclose(self) -> None:
        """Close every connection. A second call has no effect."""
        ...


class Verdict(enum.Enum):
    """What one POST of a submit has led to.

    Attributes:
        ACCEPTED: The task id is known: the task is charged.
        REJECTED: The service rejected this request: nothing is charged.
        NOT_CHARGED: The request was not processed, for a reason that is not its own: nothing is charged.
        UNKNOWN: The request may have been charged, but no response confirmed it.
    """

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    NOT_CHARGED = "not charged"
    UNKNOWN = "unknown"


@attrs.frozen(kw_only=True)
class AttemptEnd:
    """The end of one POST.

    Attributes:
        verdict: The verdict on it.
        rule: Name of the rule that decided.
        is_doubtful: Whether the response does not prove that nothing was charged. It is excused once per
            request.
        task_id: Set if accepted.
        error: What the caller gets; None if accepted. It speaks for all attempts of the call.
    """

    verdict: Verdict
    rule: str
    is_doubtful: bool = False
    task_id: str | None = None
    error: NanoBananaError | None = None


class SubmitRecord(Protocol):
    """The durable record of one request, which the submit loop writes."""

    @property
    def is_doubted(self) -> bool:
        """Whether an earlier attempt of the request ended with `AttemptEnd.is_doubtful`, in any run."""
        ...

    async def begin_attempt(self, nonce: str | None) -> None:
        """Return once the attempt is durable, immediately before a POST. If it raises, nothing is sent.

        After `NotSent`, the submit ends with the error of the attempt before, if there was one.
        *nonce* identifies the callback of the submit; None if it has none.
        """
        ...

    async def end_attempt(self, end: AttemptEnd) -> None:
        """Return once *end* is durable. Called after each POST, and again if a callback names a lost task id.

        Shielded from a cancellation of the caller.
        """
        ...


class LedgerEntry(SubmitRecord, Protocol):
    """The record of one single task, from before its submit to its acknowledgement."""

    @property
    def key(self) -> str:
        """Identifier of the entry: random text."""
        ...

    @property
    def owner(self) -> str | None:
        """Whom the task is for; None if the application has not said."""
        ...

    @property
    def note(self) -> JsonValue:
        """What the application has passed as `note`."""
        ...

    @property
    def task_id(self) -> str | None:
        """The task, once it is accepted."""
        ...

    @property
    def model(self) -> str:
        """Model of the request."""
        ...

    @property
    def image_size(self) -> str | None:
        """Image size of the request; None leaves it to the service."""
        ...

    @property
    def submitted_at(self) -> datetime | None:
        """When the submit was accepted."""
        ...

    @property
    def possible_duplicates(self) -> int:
        """POSTs beyond the first that may have been charged."""
        ...

    @property
    def snapshot(self) -> Task | None:
        """The final task, as far as the ledger stores it; None if no end is recorded."""
        ...

    async def acknowledge(self) -> None:
        """Return once it is durable that the application has used the result. A second call has no effect."""
        ...


class TaskLedger(Protocol):
    """A durable record of single tasks, such as `SqliteLedger`."""

    async def open(self) -> None:
        """Open the ledger, for one more user if it is open."""
        ...

    async def aclose(self) -> None:
        """Leave the ledger. The last user that leaves it writes what is pending and closes it."""
        ...

    def new_entry(
        self, request: GenerationRequest, *, key: str, owner: str | None, note: JsonValue, limits: OwnerLimits
    ) -> LedgerEntry:
        """Return the entry of a request that is about to be submitted. Nothing is written yet.

        Its `begin_attempt` raises `BudgetExceeded` if the submit could exceed `limits.budget`.
        """
        ...

    def find_entry(self, task_id: str) -> LedgerEntry | None:
        """Return the entry of a task that this process has submitted or resumed lately; else None. No I/O."""
        ...

    def observe(self, task: Task) -> None:
        """Record the end of *task* if it is final and an entry of this process. Returns at once."""
        ...

    def unacknowledged(self, *, follow: bool) -> AsyncGenerator[LedgerEntry]:
        """Yield the entries of accepted tasks that are not acknowledged, oldest first.

        With *follow*, go on with those that are taken over from processes that have ended, and never return.
        """
        ...

    async def unresolved(self) -> list[UnresolvedAttempt]:
        """Return the submits that may have been charged, whose task id is not known, and that are not acknowledged."""
        ...

    async def is_unresolved(self, nonce: str) -> bool:
        """Return whether a submit with this *nonce* may have been charged, and its task id is not known."""
        ...

    async def bind(self, nonce: str, task_id: str) -> LedgerEntry | None:
        """Record the task id of the submit with this *nonce*, which its callback has named and the service confirmed.

        Return its entry; None if the task is a duplicate of another one, or the ledger has no such submit.
        """
        ...

    async def acknowledge(self, name: str, final: Task | None = None) -> bool:
        """Acknowledge a task by its task id or its key, and record its end if *final* is given.

        Return False if it is not an entry that this process holds.
        """
        ...

    async def spending(self, owner: str | None, since: datetime | None) -> Spending:
        """Return what *owner* has spent since a time; all owners if None, since the beginning if None."""
        ...


class ImageStore(Protocol):
    """Stores encoded images: a folder, or another implementation."""

    async def put(self, name: str, data: bytes) -> SavedImage:
        """Store *data* durably as *name*, and replace what has that name. Raises OSError if it cannot."""
        ...


class PendingCallback(Protocol):
    """A callback that is registered for one submit."""

    @property
    def nonce(self) -> str:
        """Identifier of the submit, unique to it."""
        ...

    @property
    def url(self) -> str:
        """Callback URL of this submit only."""
        ...

    def bind(self, task_id: str) -> bool:
        """Record the task id of the submit. Return True if a callback for it has already arrived."""
        ...

    def duplicates(self) -> list[str]:
        """Return the ids of other tasks that callbacks have named before `bind`."""
        ...

    async def wait_task_id(self) -> str:
        """Wait for a callback and return the task id in it."""
        ...


@runtime_checkable
class CallbackSource(Protocol):
    """A receiver of the service's callbacks, such as `CallbackReceiver`."""

    unmatched_hooks: list[Callable[[str, str], Awaitable[None]]]
    """Functions awaited with nonce and task id when a callback names a task whose submit is not known to have it."""

    def register(self) -> PendingCallback:
        """Register a callback for one submit and return it."""
        ...
