"""`CheckedTransport`: a transport that ends in time and returns what it should, whatever the wrapped one does."""

from typing import Final

import anyio

from nanobanana_async._concurrency.events import is_cancelled
from nanobanana_async._concurrency.timeouts import run_within
from nanobanana_async.protocols import ExchangeError, Phase, RequestKind, Transport, WireRequest, WireResponse

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
        outcome: WireResponse | ExchangeError = ExchangeError(
            f"the transport did not end within {timeout_s:.3g} s", phase=Phase.SEND
        )

        async def work() -> None:
            nonlocal outcome
            outcome = await self._send(request, timeout_s)

        limit_s = max(timeout_s, 0) + _GRACE_S
        if request.kind is RequestKind.SUBMIT:  # its response may have arrived while the process was stopped
            await run_within(limit_s, work)
        else:
            with anyio.move_on_after(limit_s):
                await work()
        if isinstance(outcome, WireResponse):
            return outcome
        raise outcome

    async def _send(self, request: WireRequest, timeout_s: float) -> WireResponse | ExchangeError:
        try:
            response = await self._transport.send(request, timeout_s=timeout_s)
        except ExchangeError as exc:
            return exc
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
        return ExchangeError(f"the transport failed: {reason}", phase=Phase.SEND)

    async def aclose(self) -> None:
        """Close the wrapped transport."""
        await self._transport.aclose()


def _describe(exc: Exception) -> str:
    try:
        return f"{type(exc).__name__}: {exc}"
    except Exception:  # noqa: BLE001 - its `__str__` failed
        return type(exc).__name__
