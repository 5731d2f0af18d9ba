"""All errors of the package. Facts are attributes, every error can be pickled, and none contains the API key.

NanoBananaError
|- ConfigurationError          set up in a way that cannot work; nothing was sent
|  '- InvalidBatchFile         a file of prompts with invalid rows
|- ClientClosed                used after it was closed, or closed during the call
|- WrongEventLoop              used on another event loop or in another process than before
|- KeyConflict                 two rows of a batch have one key
|- TransportError              the service could not be reached, or its response could not be read
|  |- NotSent                  the request did not reach the service
|  |- SubmissionUnknown        a submit may have been charged; no response confirmed it
|  '- ProtocolError            the response could not be decoded
|- ApiError                    the service responded with an error
|  |- InvalidRequest           the request was rejected
|  |- AuthenticationError      the API key was rejected
|  |- InsufficientCredits      the account has too few credits
|  |- TaskNotFound             the task id is unknown to the service
|  |- RateLimited              too many requests
|  '- ServiceUnavailable       an error inside the service
|- TaskError                   about one task
|  |- TaskFailed               it ended as failed
|  |- NoImage                  it ended as success, was charged, and contains no image
|  |- TaskLost                 it was charged, and the service no longer knows it
|  '- TaskTimeout              it was not final in time; it keeps running and can be awaited again. A TimeoutError
|- ImageError                  an image could not be read, downloaded or written
|- LedgerError                 the ledger of a batch cannot be used, so the batch stops
'- BudgetExceeded              another submit could exceed the budget
"""

from nanobanana_async.models import ReasonKind, Task


class NanoBananaError(Exception):
    """Base class of all errors. `task_id` is the task concerned, or None.

    An error of a submit has `key`, which identifies the call in its events and in the ledger, and `owner`. `earlier`
    contains the final tasks of earlier attempts of the same request (see `RegeneratePolicy`).
    """

    def __init__(self, message: str, *, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.key: str | None = None
        self.owner: str | None = None
        self.earlier: tuple[Task, ...] = ()


class ConfigurationError(NanoBananaError):
    """The client is set up in a way that cannot work: key, URL, certificate, transport."""


class InvalidBatchFile(ConfigurationError):
    """A file of prompts has invalid rows. `errors` has one text per row, such as `"line 7: prompt: expected text"`."""

    def __init__(self, message: str, *, errors: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join([str(self.args[0]), *self.errors])


class ClientClosed(NanoBananaError):
    """The client or batch was closed, before or during the call."""


class WrongEventLoop(NanoBananaError):
    """The client belongs to another event loop, or to the process that this one was forked from."""


class KeyConflict(NanoBananaError):
    """A row of a batch has the key of another row. Nothing was sent for it."""


class TransportError(NanoBananaError):
    """The service could not be reached, or its response did not arrive."""


class NotSent(TransportError):
    """The request did not reach the service. Nothing was charged, and it is safe to send the request again."""


class SubmissionUnknown(TransportError):
    """A submit may have reached the service and may have been charged, but no response confirmed it.

    Submitting again may charge the account again, so the client does not. `status` is the last HTTP status, or None if
    none arrived. `possible_duplicates` counts the POSTs beyond the first that may have been charged.
    """

    def __init__(self, message: str, *, status: int | None = None, possible_duplicates: int = 0) -> None:
        super().__init__(message)
        self.status: int | None = status
        self.possible_duplicates: int = possible_duplicates


class ProtocolError(TransportError):
    """A response arrived that could not be decoded. `status` is its HTTP status."""

    def __init__(self, message: str, *, task_id: str | None = None, status: int | None = None) -> None:
        super().__init__(message, task_id=task_id)
        self.status = status


class ApiError(NanoBananaError):
    """The service responded with an error.

    `status` is the HTTP status. `code` is the number in the body, or None. `retry_after_s` is the wait that the service
    asked for, or for a 429 the wait that its rate suggests; otherwise None. A submit that ends with this error was not
    charged.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: int | None = None, task_id: str | None = None
    ) -> None:
        super().__init__(message, task_id=task_id)
        self.status: int | None = status
        self.code: int | None = code
        self.retry_after_s: float | None = None


class InvalidRequest(ApiError):
    """The service rejected the request. Sending the same request again does not help."""


class AuthenticationError(ApiError):
    """The service rejected the API key."""


class InsufficientCredits(ApiError):
    """The account has too few credits."""


class TaskNotFound(ApiError):
    """The service does not know the task id, and the time in which a new id may be invisible has passed."""


class RateLimited(ApiError):
    """The service asked for a wait that is longer than the time left."""


class ServiceUnavailable(ApiError):
    """The service reported an error of its own."""


class TaskError(NanoBananaError):
    """Base class of errors about one task. `task` is the last snapshot, or None.

    `reason_kind` says why the task has no image, as far as words can say; `UNKNOWN` for other errors.
    """

    def __init__(
        self,
        message: str,
        *,
        task: Task | None = None,
        task_id: str | None = None,
        reason_kind: ReasonKind = ReasonKind.UNKNOWN,
    ) -> None:
        super().__init__(message, task_id=task_id or (task.task_id if task else None))
        self.task: Task | None = task
        self.reason_kind = reason_kind


class TaskFailed(TaskError):
    """The task ended as failed. `task.reason` contains the reason, if the service gave one."""

    task: Task  # pyright: ignore[reportIncompatibleVariableOverride] - these two always have one


class NoImage(TaskError):
    """The task ended as success and was charged, but contains no image. `task.texts` may contain the model's text."""

    task: Task  # pyright: ignore[reportIncompatibleVariableOverride] - these two always have one


class TaskLost(TaskError):
    """The service no longer knows a task that it had accepted. It may have been charged, and its image is lost."""


class TaskTimeout(TaskError, TimeoutError):
    """The task was not final in time. It keeps running at the service and can be awaited again."""


class ImageError(NanoBananaError):
    """An image could not be read, downloaded or written. The task itself remains charged and finished.

    `task` is that task in an outcome of a batch, else None.
    """

    def __init__(self, message: str, *, task_id: str | None = None, task: Task | None = None) -> None:
        super().__init__(message, task_id=task_id)
        self.task = task


class LedgerError(NanoBananaError):
    """The ledger cannot be used: locked by another process, damaged, written by a newer version, or disk full.

    After this error nothing more is submitted. `pid` is the process that holds the ledger, or None.
    """

    def __init__(self, message: str, *, task_id: str | None = None, pid: int | None = None) -> None:
        super().__init__(message, task_id=task_id)
        self.pid = pid


class BudgetExceeded(NanoBananaError):
    """Another submit could exceed the budget of a batch or an owner. Nothing was sent for it."""
