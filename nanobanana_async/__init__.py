"""The asyncio-native client for the Nano Banana 2 image API.

What is listed here is public; what is not is private, `nanobanana_async.simulator` aside.
"""

from nanobanana_async.batch.rows import (
    Row,
    read_rows,
)
from nanobanana_async.batch.run_state import Fetcher, Progress
from nanobanana_async.batch.runner import Batch
from nanobanana_async.callbacks import CallbackReceiver, parse_callback
from nanobanana_async.client import (
    NanoBananaClient,
)
from nanobanana_async.errors import (
    ApiError,
    AuthenticationError,
    BudgetExceeded,
    ConfigurationError,
    InsufficientCredits,
    InvalidRequest,
    InvalidRows,
    LedgerError,
    MediaError,
    NanoBananaError,
    NoImage,
    NotSent,
    ProtocolError,
    RateLimited,
    ServiceUnavailable,
    SubmissionUnknown,
    TaskError,
    TaskFailed,
    TaskNotFound,
    TaskUnfinished,
    TransportError,
)
from nanobanana_async.handle import (
    TaskHandle,
)
from nanobanana_async.ledger.budget import (
    Funds,
)
from nanobanana_async.ledger.schema import (
    RowRecord,
    RowState,
)
from nanobanana_async.models import (
    Callback,
    GeneratedImage,
    GenerationRequest,
    ImageSource,
    RequestOptions,
    SavedPicture,
    Task,
    TaskStatus,
)
from nanobanana_async.outcomes import (
    Done,
    Failed,
    Outcome,
    Unknown,
)
from nanobanana_async.policies import (
    Limits,
    PollPolicy,
    RetryPolicy,
    Timeouts,
)
from nanobanana_async.protocols import (
    Errand,
    ExchangeFailed,
    Phase,
    Sink,
    Transport,
    WireReply,
    WireRequest,
)
from nanobanana_async.tracking.state import (
    Statistics,
)
from nanobanana_async.transport.httpx import (
    HttpTransport,
)

__all__ = [
    "ApiError",
    "AuthenticationError",
    "Batch",
    "BudgetExceeded",
    "Callback",
    "CallbackReceiver",
    "ConfigurationError",
    "Done",
    "Errand",
    "ExchangeFailed",
    "Failed",
    "Fetcher",
    "Funds",
    "GeneratedImage",
    "GenerationRequest",
    "HttpTransport",
    "ImageSource",
    "InsufficientCredits",
    "InvalidRequest",
    "InvalidRows",
    "LedgerError",
    "Limits",
    "MediaError",
    "NanoBananaClient",
    "NanoBananaError",
    "NoImage",
    "NotSent",
    "Outcome",
    "Phase",
    "PollPolicy",
    "Progress",
    "ProtocolError",
    "RateLimited",
    "RequestOptions",
    "RetryPolicy",
    "Row",
    "RowRecord",
    "RowState",
    "SavedPicture",
    "ServiceUnavailable",
    "Sink",
    "Statistics",
    "SubmissionUnknown",
    "Task",
    "TaskError",
    "TaskFailed",
    "TaskHandle",
    "TaskNotFound",
    "TaskStatus",
    "TaskUnfinished",
    "Timeouts",
    "Transport",
    "TransportError",
    "Unknown",
    "WireReply",
    "WireRequest",
    "parse_callback",
    "read_rows",
]
