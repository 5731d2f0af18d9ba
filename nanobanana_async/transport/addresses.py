"""Which network addresses a URL from a third party may lead to (server-side request forgery)."""

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

import anyio

# `is_global` is true for these (measured on 3.11 to 3.13), but they embed an IPv4 address or are not public: NAT64,
# 6to4, Teredo, IPv4-compatible, site-local, documentation, the 6to4 relay, protocol assignments.
_NOT_PUBLIC: Final = [
    ip_network(network)
    for network in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96", "fec0::/10", "3fff::/20")
] + [ip_network("192.88.99.0/24"), ip_network("192.0.0.0/24")]


def is_public(address: str) -> bool:
    """Return whether *address*, an IP address as text, can be reached from the whole internet."""
    try:
        parsed: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return (
        parsed.is_global
        and not (parsed.is_multicast or parsed.is_reserved)
        and not any(parsed.version == network.version and parsed in network for network in _NOT_PUBLIC)
    )


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of *host* in the order of the resolver, each once.

    Raises:
        OSError: The name does not resolve.
    """
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
