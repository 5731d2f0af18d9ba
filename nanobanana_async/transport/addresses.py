"""Which network addresses a URL from a third party may lead to (server-side request forgery)."""

import contextlib
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from urllib.parse import urlsplit

import anyio

from nanobanana_async.wire.endpoint import DEFAULT_BASE_URL

_DNS_TIMEOUT_S: Final = 10.0

# `is_global` is true for these (measured on 3.11 to 3.13), but they are not public: local NAT64, Teredo,
# IPv4-compatible, site-local, documentation, the 6to4 relay, protocol assignments.
_NOT_PUBLIC: Final = [
    ip_network(network) for network in ("64:ff9b:1::/48", "2001::/32", "::/96", "fec0::/10", "3fff::/20")
] + [ip_network("192.88.99.0/24"), ip_network("192.0.0.0/24")]
_NAT64: Final = IPv6Network("64:ff9b::/96")
_FAKE_IP: Final = IPv4Network("198.18.0.0/15")
"""Addresses that transparent proxies, such as Clash and sing-box, return for every name, to intercept connections."""


def is_public(address: str) -> bool:
    """Return whether *address*, an IP address as text, can be reached from the whole internet.

    An IPv4 address inside an IPv6 address (mapped, NAT64, 6to4) is judged as that IPv4 address.
    """
    try:
        parsed = _unwrapped(ip_address(address.partition("%")[0]))
    except ValueError:
        return False
    return (
        parsed.is_global
        and not (parsed.is_multicast or parsed.is_reserved)
        and not any(parsed.version == network.version and parsed in network for network in _NOT_PUBLIC)
    )


def _unwrapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def is_fake_ip(address: str) -> bool:
    """Return whether *address* is one that a transparent proxy returns for every name."""
    with contextlib.suppress(ValueError):
        parsed = _unwrapped(ip_address(address.partition("%")[0]))
        return isinstance(parsed, IPv4Address) and parsed in _FAKE_IP
    return False


def is_literal(host: str) -> bool:
    """Return whether *host* is an address in any notation of C, such as an integer, and no name."""
    with contextlib.suppress(ValueError):
        ip_address(host.partition("%")[0])
        return True
    with contextlib.suppress(OSError, UnicodeError):
        socket.inet_aton(host)
        return True
    return False


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
