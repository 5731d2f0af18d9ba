"""The asyncio-native client for the Nano Banana 2 image API.

The names listed here and in `nanobanana_async.simulator` are public.
"""

from nanobanana_async.batch.rows import read_rows
from nanobanana_async.batch.run_state import BatchProgress
from nanobanana_async.batch.runner import Batch
from nanobanana_async.callbacks import CallbackReceiver, parse_callback
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
from nanobanana_async.handle import TaskHandle
from nanobanana_async.ledger.budget import BudgetStatus
from nanobanana_async.ledger.schema import BatchRow, LedgerRow, RowState
from nanobanana_async.models import (
    CallbackPayload,
    GeneratedImage,
    GenerationRequest,
    ImageSource,
    RequestOptions,
    SavedImage,
    Task,
    TaskStatus,
)
from nanobanana_async.outcomes import Failed, Outcome, Succeeded, Unknown
from nanobanana_async.policies import Limits, PollPolicy, RetryPolicy, Timeouts
from nanobanana_async.protocols import (
    AttemptEnd,
    ExchangeError,
    ImageStore,
    Phase,
    RequestKind,
    SubmitRecord,
    Transport,
    Verdict,
    WireRequest,
    WireResponse,
)
from nanobanana_async.tracking.state import TrackerStatistics
from nanobanana_async.transport.httpx import HttpxTransport

__all__ = [
    "ApiError",
    "AttemptEnd",
    "AuthenticationError",
    "Batch",
    "BatchProgress",
    "BatchRow",
    "BudgetExceeded",
    "BudgetStatus",
    "CallbackPayload",
    "CallbackReceiver",
    "ClientClosed",
    "ConfigurationError",
    "ExchangeError",
    "Failed",
    "GeneratedImage",
    "GenerationRequest",
    "HttpxTransport",
    "ImageError",
    "ImageSource",
    "ImageStore",
    "InsufficientCredits",
    "InvalidBatchFile",
    "InvalidRequest",
    "KeyConflict",
    "LedgerError",
    "LedgerRow",
    "Limits",
    "NanoBananaClient",
    "NanoBananaError",
    "NoImage",
    "NotSent",
    "Outcome",
    "Phase",
    "PollPolicy",
    "ProtocolError",
    "RateLimited",
    "RequestKind",
    "RequestOptions",
    "RetryPolicy",
    "RowState",
    "SavedImage",
    "ServiceUnavailable",
    "SubmissionUnknown",
    "SubmitRecord",
    "Succeeded",
    "Task",
    "TaskError",
    "TaskFailed",
    "TaskHandle",
    "TaskLost",
    "TaskNotFound",
    "TaskStatus",
    "TaskTimeout",
    "Timeouts",
    "TrackerStatistics",
    "Transport",
    "TransportError",
    "Unknown",
    "Verdict",
    "WireRequest",
    "WireResponse",
    "WrongEventLoop",
    "parse_callback",
    "read_rows",
]
