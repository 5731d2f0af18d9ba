"""Every error of the package. Facts are attributes, so nobody parses text; all pickle; none holds the API key.

NanoBananaError
|- ConfigurationError          set up or used in a way that cannot work; nothing was sent
|  '- InvalidBatchFile              rows of a batch that cannot be used
|- TransportError              the service could not be reached, or not be understood
|  |- NotSent                  proven: the service never had the request
|  |- SubmissionUnknown        a submit may have been paid, and no answer says so
|  '- ProtocolError            an answer came that nobody can read
|- ApiError                    the service answered, and refused
|  |- InvalidRequest           it did not like the request
|  |- AuthenticationError      it did not like the key
|  |- InsufficientCredits      the account is empty
|  |- TaskNotFound             it does not know the task id
|  |- RateLimited              it asks to slow down
|  '- ServiceUnavailable       it has trouble of its own
|- TaskError                   about one task
|  |- TaskFailed               it ended as failed
|  |- NoImage                  it ended as success, was paid, and holds no picture
|  '- TaskTimeout           it was not final in time; it runs on and can be awaited again
|- ImageError                  a picture could not be read, fetched or written
|- LedgerError                 a batch cannot keep its books, and so must not go on
'- BudgetExceeded              one more submit could cost more than was allowed
"""

from nanobanana_async.models import Task


class NanoBananaError(Exception):
    """The root. `task_id` is the task it is about, None when none is known."""

    def __init__(self, message: str, *, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id


class ConfigurationError(NanoBananaError):
    """The client was set up or used in a way that cannot work: key, URL, certificate, closed client, other loop."""


class InvalidBatchFile(ConfigurationError):
    """Rows of a batch that cannot be used. `faults` has a text for each: `"line 7: prompt: must not be empty"`."""

    def __init__(self, message: str, *, errors: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join([str(self.args[0]), *self.errors])


class TransportError(NanoBananaError):
    """The service could not be reached, or its answer did not arrive."""


class NotSent(TransportError):
    """The request never reached the service: nothing was charged, and sending it again is safe."""


class SubmissionUnknown(TransportError):
    """A submit may have reached the service (and been paid), but no answer says so.

    Sending it again may pay twice, so that is yours to decide. `status` is the HTTP status when at least that much
    arrived. `possible_duplicates` counts the times the retry policy had already repeated it.
    """

    def __init__(self, message: str, *, status: int | None = None, possible_duplicates: int = 0) -> None:
        super().__init__(message)
        self.status, self.possible_duplicates = status, possible_duplicates


class ProtocolError(TransportError):
    """An answer came that nobody can read. `status` is its HTTP status."""

    def __init__(self, message: str, *, task_id: str | None = None, status: int | None = None) -> None:
        super().__init__(message, task_id=task_id)
        self.status = status


class ApiError(NanoBananaError):
    """The service answered, and refused.

    `status` is the HTTP status, `code` the number in the body (None when it had none). `retry_after_s` is how long
    the service asked to wait, None when it did not say. `possible_duplicates` counts re-sends of a submit, made
    under the retry policy, that may each have been charged.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: int | None = None, task_id: str | None = None
    ) -> None:
        super().__init__(message, task_id=task_id)
        self.status, self.code = status, code
        self.retry_after_s: float | None = None
        self.possible_duplicates = 0


class InvalidRequest(ApiError):
    """The service did not accept the request as it is; repeating it will not help."""


class AuthenticationError(ApiError):
    """The service does not accept the API key."""


class InsufficientCredits(ApiError):
    """The account has too few credits."""


class TaskNotFound(ApiError):
    """The service does not know this task id, and the time in which a fresh id may be invisible is over."""


class RateLimited(ApiError):
    """The service asked to slow down, and the wait would exceed the time left."""


class ServiceUnavailable(ApiError):
    """The service has trouble of its own."""


class TaskError(NanoBananaError):
    """About one task. `task` is the last snapshot, None when none was seen."""

    def __init__(self, message: str, *, task: Task | None = None, task_id: str | None = None) -> None:
        super().__init__(message, task_id=task_id or (task.task_id if task else None))
        self.task = task


class TaskFailed(TaskError):
    """The task ended as failed; `task.reason` says why, when the service did."""


class NoImage(TaskError):
    """The task ended as success, was paid, and holds no picture; `task.texts` may hold the model's words."""


class TaskTimeout(TaskError):
    """The task was not final in time. It runs on at the service and can be awaited again."""


class ImageError(NanoBananaError):
    """A picture could not be read, fetched or written. The task itself stays paid and done."""


class LedgerError(NanoBananaError):
    """A batch cannot keep its books: another process has them, they are damaged or too new, or the disk is full.

    Nothing more is submitted after it. `pid` is the process that has it, None when that is not the trouble.
    """

    def __init__(self, message: str, *, task_id: str | None = None, pid: int | None = None) -> None:
        super().__init__(message, task_id=task_id)
        self.pid = pid


class BudgetExceeded(NanoBananaError):
    """One more submit could cost more than was allowed; what is paid has been fetched."""
