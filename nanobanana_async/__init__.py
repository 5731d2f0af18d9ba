"""The asyncio-native client for the Nano Banana 2 image API.

What is listed here is public; what is not is private, `nanobanana_async.simulator` aside.
"""

from nanobanana_async.client import NanoBananaClient, TaskHandle
from nanobanana_async.errors import (
    ApiError,
    AuthenticationError,
    ConfigurationError,
    InsufficientCredits,
    InvalidRequest,
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
from nanobanana_async.models import GeneratedImage, GenerationRequest, ImageSource, RequestOptions, Task, TaskStatus
from nanobanana_async.policies import Limits, PollPolicy, RetryPolicy, Timeouts
from nanobanana_async.tracking.watch import Statistics
from nanobanana_async.transport.base import (
    Errand,
    ExchangeFailed,
    Phase,
    Sink,
    Transport,
    WireReply,
    WireRequest,
)
from nanobanana_async.transport.http import HttpTransport

__all__ = [
    "ApiError",
    "AuthenticationError",
    "ConfigurationError",
    "Errand",
    "ExchangeFailed",
    "GeneratedImage",
    "GenerationRequest",
    "HttpTransport",
    "ImageSource",
    "InsufficientCredits",
    "InvalidRequest",
    "Limits",
    "MediaError",
    "NanoBananaClient",
    "NanoBananaError",
    "NoImage",
    "NotSent",
    "Phase",
    "PollPolicy",
    "ProtocolError",
    "RateLimited",
    "RequestOptions",
    "RetryPolicy",
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
    "WireReply",
    "WireRequest",
]
