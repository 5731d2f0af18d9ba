"""Wrap a user-supplied transport: enforce its deadline and check what it returns."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Final

import anyio

from nanobanana_async.protocols import ChunkSink, ExchangeError, Phase, Transport, WireRequest, WireResponse

_GRACE_S: Final = 0.5
"""Extra time for a transport to report its own timeout, with its phase."""


async def send_checked(
    transport: Transport, request: WireRequest, *, timeout_s: float, sink: ChunkSink | None = None
) -> WireResponse:
    """Return the result of `transport.send` within *timeout_s* plus half a second. Errors of *sink* pass through.

    Raises:
        ExchangeError: Any other failure. The request may have arrived, unless the transport proves otherwise.
    """
    own: list[Exception] = []
    with anyio.CancelScope(deadline=anyio.current_time() + max(timeout_s, 0) + _GRACE_S):
        try:
            response = await transport.send(request, timeout_s=timeout_s, sink=sink and _recording_errors(sink, own))
        except ExchangeError:
            raise
        except anyio.get_cancelled_exc_class():
            if _is_cancelled():
                raise
            reason = "it was cancelled internally"
        except Exception as exc:
            if exc in own:
                raise
            reason = _describe(exc)
        else:
            if isinstance(response, WireResponse):
                return response
            reason = f"expected WireResponse, got {type(response).__name__}"
        raise ExchangeError(f"the transport failed: {reason}", phase=Phase.SEND)
    raise ExchangeError(f"the transport did not end within {timeout_s:.3g} s", phase=Phase.SEND)


def _recording_errors(sink: ChunkSink, own: list[Exception]) -> Callable[[bytes], Awaitable[None]]:
    async def take(chunk: bytes) -> None:
        try:
            await sink(chunk)
        except Exception as exc:
            own.append(exc)
            raise

    return take


def _is_cancelled() -> bool:
    """Return whether this task is being cancelled. A cancelled future inside a transport looks the same."""
    if anyio.current_effective_deadline() == -math.inf:
        return True
    try:
        task = asyncio.current_task()
    except RuntimeError:  # not on asyncio; on trio this cannot happen
        return True
    return task is None or task.cancelling() > 0


def _describe(exc: Exception) -> str:
    try:
        return f"{type(exc).__name__}: {exc}"
    except Exception:  # noqa: BLE001 - its `__str__` failed
        return type(exc).__name__
