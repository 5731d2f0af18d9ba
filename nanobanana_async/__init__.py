"""The asyncio-native client for the Nano Banana 2 image API.

The names listed here and in `nanobanana_async.simulator` are public. `AiohttpTransport` needs the extra `aiohttp`.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from nanobanana_async.batch.preview import BatchPreview
from nanobanana_async.batch.row_file import RowFile, read_rows
from nanobanana_async.batch.run_state import BatchProgress
from nanobanana_async.batch.runner import Batch
from nanobanana_async.callbacks import CallbackReceiver, parse_callback
from nanobanana_async.calls import SubmitOptions
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import (
    ApiError,
    AuthenticationError,
    BudgetExceeded,
    ClientClosed,
    ConfigurationError,
    ImageError,
    InsufficientCredits,
    InvalidBatchFile,
    InvalidRequest,
    KeyConflict,
    LedgerError,
    NanoBananaError,
    NoImage,
    NotSent,
    ProtocolError,
    RateLimited,
    ServiceUnavailable,
    SubmissionUnknown,
    TaskError,
    TaskFailed,
    TaskLost,
    TaskNotFound,
    TaskTimeout,
    TransportError,
    WrongEventLoop,
)
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
from nanobanana_async.handle import TaskHandle
from nanobanana_async.ledger.budget import BudgetStatus
from nanobanana_async.ledger.folder import (
    SqliteLedger,
)
from nanobanana_async.ledger.schema import BatchRow, LedgerRow, RowState
from nanobanana_async.ledger.tasks import (
    LedgerTask,
)
from nanobanana_async.models import (
    CallbackPayload,
    Eta,
    GeneratedImage,
    GenerationRequest,
    ImageSource,
    JsonValue,
    ReasonKind,
    RequestOptions,
    Spending,
    Task,
    TaskStatus,
    UnresolvedAttempt,
)
from nanobanana_async.outcomes import Failed, Outcome, Succeeded, Unknown
from nanobanana_async.policies import (
    Limits,
    OwnerLimits,
    PollPolicy,
    ReferencePolicy,
    RegenerateOn,
    RegeneratePolicy,
    RetryPolicy,
    Timeouts,
)
from nanobanana_async.protocols import (
    AttemptEnd,
    ExchangeError,
    ImageStore,
    LedgerEntry,
    Phase,
    RequestKind,
    SubmitRecord,
    TaskLedger,
    Transport,
    Verdict,
    WireRequest,
    WireResponse,
)
from nanobanana_async.saved import ImageInfo, Mismatch, MismatchKind, SavedImage
from nanobanana_async.tracking.state import TrackerStatistics
from nanobanana_async.transport.httpx import HttpxTransport
from nanobanana_async.wire.refusals import classify_reason

if _TYPE_CHECKING:
    from nanobanana_async.transport.aiohttp import AiohttpTransport as AiohttpTransport

__all__ = [
    "ApiError",
    "AttemptEnd",
    "AuthenticationError",
    "Batch",
    "BatchPreview",
    "BatchProgress",
    "BatchRow",
    "BudgetExceeded",
    "BudgetStatus",
    "CallbackPayload",
    "CallbackReceiver",
    "ClientClosed",
    "ConfigurationError",
    "Eta",
    "Event",
    "EventHook",
    "ExchangeError",
    "Failed",
    "Finished",
    "GeneratedImage",
    "GenerationRequest",
    "HttpxTransport",
    "ImageError",
    "ImageInfo",
    "ImageSource",
    "ImageStore",
    "InsufficientCredits",
    "InvalidBatchFile",
    "InvalidRequest",
    "JsonValue",
    "KeyConflict",
    "LedgerEntry",
    "LedgerError",
    "LedgerRow",
    "LedgerTask",
    "Limits",
    "Mismatch",
    "MismatchKind",
    "NanoBananaClient",
    "NanoBananaError",
    "NoImage",
    "NotSent",
    "Outcome",
    "OwnerLimits",
    "Phase",
    "PollPolicy",
    "ProtocolError",
    "Queued",
    "RateLimited",
    "ReasonKind",
    "ReferencePolicy",
    "RegenerateOn",
    "RegeneratePolicy",
    "RequestKind",
    "RequestOptions",
    "RetryPolicy",
    "RowFile",
    "RowState",
    "Saved",
    "SavedImage",
    "ServiceUnavailable",
    "Spending",
    "SqliteLedger",
    "StatusChanged",
    "SubmissionUnknown",
    "SubmitFailed",
    "SubmitOptions",
    "SubmitRecord",
    "Submitted",
    "Succeeded",
    "Task",
    "TaskError",
    "TaskFailed",
    "TaskHandle",
    "TaskLedger",
    "TaskLost",
    "TaskNotFound",
    "TaskStatus",
    "TaskTimeout",
    "Throttled",
    "Timeouts",
    "TrackerStatistics",
    "Transport",
    "TransportError",
    "Unknown",
    "UnresolvedAttempt",
    "Verdict",
    "WireRequest",
    "WireResponse",
    "WrongEventLoop",
    "classify_reason",
    "parse_callback",
    "read_rows",
]


def __getattr__(name: str) -> object:
    """Import what needs an extra when it is first used."""
    if name != "AiohttpTransport":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from nanobanana_async.transport.aiohttp import AiohttpTransport  # noqa: PLC0415 - see above
    except ModuleNotFoundError as exc:
        raise ImportError(f"AiohttpTransport needs a package: pip install 'nanobanana-async[aiohttp]' ({exc})") from exc
    return AiohttpTransport
