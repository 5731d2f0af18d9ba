"""`CheckedTransport`: a transport that ends in time and returns what it should, whatever the wrapped one does."""

from typing import Final

import anyio

from nanobanana_async._concurrency.events import is_cancelled
from nanobanana_async.protocols import ExchangeError, Phase, Transport, WireRequest, WireResponse

_GRACE_S: Final = 0.5
"""Extra time for a transport to report its own timeout, with its phase."""


class CheckedTransport:
    """Enforces the contract of `Transport` on *transport*, which may be the user's own."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def send(self, request: WireRequest, *, timeout_s: float) -> WireResponse:
        """Return the response within *timeout_s* plus half a second.

        Raises:
            ExchangeError: Any failure. The request may have arrived, unless the transport proves otherwise.
        """
        with anyio.CancelScope(deadline=anyio.current_time() + max(timeout_s, 0) + _GRACE_S):
            try:
                response = await self._transport.send(request, timeout_s=timeout_s)
            except ExchangeError:
                raise
            except anyio.get_cancelled_exc_class():
                if is_cancelled():
                    raise
                reason = "it was cancelled internally"
            except Exception as exc:  # noqa: BLE001 - a user's transport may raise anything
                reason = _describe(exc)
            else:
                if isinstance(response, WireResponse):
                    return response
                reason = f"expected WireResponse, got {type(response).__name__}"
            raise ExchangeError(f"the transport failed: {reason}", phase=Phase.SEND)
        raise ExchangeError(f"the transport did not end within {timeout_s:.3g} s", phase=Phase.SEND)

    async def aclose(self) -> None:
        """Close the wrapped transport."""
        await self._transport.aclose()


def _describe(exc: Exception) -> str:
    try:
        return f"{type(exc).__name__}: {exc}"
    except Exception:  # noqa: BLE001 - its `__str__` failed
        return type(exc).__name__
