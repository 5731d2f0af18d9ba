"""Connect to one of several addresses that were checked, as Happy Eyeballs does (RFC 8305)."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Final, cast

import anyio
import httpcore

_ATTEMPT_DELAY_S: Final = 0.25
"""Wait before the next address is tried beside the one before (RFC 8305, section 5)."""


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connects to *addresses*, whatever host it is asked for, so that a name cannot lead elsewhere after its check."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = _interleaved(addresses)
        self._backend = cast("httpcore.AsyncNetworkBackend", httpcore.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - the addresses of the host
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Return the first connection. Raises the last error of httpcore if there is none."""

        async def connect(address: str) -> httpcore.AsyncNetworkStream:
            return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)

        return await _first(self._addresses, connect)


def _interleaved(addresses: Iterable[str]) -> list[str]:
    """Return *addresses* with the families in turn, the preferred one first: one of them may not work at all."""
    families: dict[bool, list[str]] = {}
    for address in addresses:
        families.setdefault(":" in address, []).append(address)
    return [address for group in zip_longest(*families.values()) for address in group if address is not None]


async def _close(streams: Iterable[httpcore.AsyncNetworkStream]) -> None:
    with anyio.CancelScope(shield=True):  # closing a socket takes no time
        for stream in streams:
            await stream.aclose()


async def _first(
    addresses: Iterable[str], connect: Callable[[str], Awaitable[httpcore.AsyncNetworkStream]]
) -> httpcore.AsyncNetworkStream:
    streams: list[httpcore.AsyncNetworkStream] = []
    errors: list[Exception] = [httpcore.ConnectError("no address")]

    async def attempt(address: str, failed: anyio.Event) -> None:
        try:
            streams.append(await connect(address))
        except Exception as exc:  # noqa: BLE001 - the last one is raised if no address works
            errors.append(exc)
            failed.set()
        else:
            group.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            for address in addresses:
                failed = anyio.Event()
                group.start_soon(attempt, address, failed)
                with anyio.move_on_after(_ATTEMPT_DELAY_S):
                    await failed.wait()
    except BaseException:
        await _close(streams)
        raise
    await _close(streams[1:])  # two have connected at the same moment
    if not streams:
        raise errors[-1]
    return streams[0]
