"""Which network addresses a URL from a third party may lead to (server-side request forgery)."""

import contextlib
import socket
from typing import Final
from urllib.parse import urlsplit

import anyio

from nanobanana_async.protocols import ExchangeError, Phase
from nanobanana_async.wire.addresses import is_fake_ip, is_public, parse_literal
from nanobanana_async.wire.endpoint import DEFAULT_BASE_URL

_DNS_TIMEOUT_S: Final = 10.0


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of *host* in the order of the resolver, each once.

    Raises:
        OSError: The name does not resolve.
    """
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class ServiceNetwork:
    """The network of the service at *base_url*, which decides where its images may be."""

    def __init__(self, base_url: str) -> None:
        self._host = urlsplit(base_url).hostname or ""
        self._is_public = True if base_url == DEFAULT_BASE_URL else None

    async def is_public(self) -> bool:
        """Return whether the service is on the internet. If so, its image URLs have to be public, too.

        A simulator and its images may be anywhere. A host that does not resolve counts as public, until it does.
        """
        if self._is_public is None:
            with contextlib.suppress(OSError, UnicodeError), anyio.move_on_after(_DNS_TIMEOUT_S):
                found = await resolve(self._host, 443)
                self._is_public = all(is_public(one) or is_fake_ip(one) for one in found)
        return self._is_public is not False


class AddressCheck:
    """Resolves the hosts of images, and refuses addresses that are not public.

    Where the name of the service leads to 198.18.0.0/15, as with a transparent proxy, other names may, too. *transport*
    is the name of the class to state in errors.
    """

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self.service_host: str | None = None
        """Host of the last API call."""
        self._has_fake_ips: bool | None = None

    async def resolve(self, host: str, port: int, timeout_s: float) -> tuple[str, ...]:
        """Return the addresses of *host*, which may be connected to.

        Raises:
            ExchangeError: It leads to an address that is not public, or does not resolve within *timeout_s*.
        """
        addresses: list[str] = []
        reason = f"{host} does not resolve in time"
        with anyio.move_on_after(timeout_s):
            try:
                addresses = await resolve(host, port)
            except (OSError, UnicodeError) as exc:
                reason = f"{host} does not resolve: {exc}"
        for address in addresses:
            is_allowed = is_public(address) or (
                is_fake_ip(address) and parse_literal(host) is None and await self._is_behind_fake_ips()
            )
            if not is_allowed:
                raise ExchangeError(
                    f"{host} leads to {address}, which is not a public address. If your network is meant to do that, "
                    f"pass transport={self._transport}(check_addresses=False)",
                    phase=Phase.CONNECT,
                    permanent=True,
                )
        if not addresses:
            raise ExchangeError(reason, phase=Phase.CONNECT)
        return tuple(addresses)

    async def _is_behind_fake_ips(self) -> bool:
        """Return whether the name of the service leads to a fake address, too."""
        if self._has_fake_ips is None and self.service_host is not None:
            with contextlib.suppress(OSError, UnicodeError):
                self._has_fake_ips = any(map(is_fake_ip, await resolve(self.service_host, 443)))
        return bool(self._has_fake_ips)
