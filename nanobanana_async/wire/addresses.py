"""Which network addresses are public. Pure: names are resolved elsewhere."""

import contextlib
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

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
    parsed = parse_literal(address)
    return (
        parsed is not None
        and parsed.is_global
        and not (parsed.is_multicast or parsed.is_reserved)
        and not any(parsed.version == network.version and parsed in network for network in _NOT_PUBLIC)
    )


def is_fake_ip(address: str) -> bool:
    """Return whether *address* is one that a transparent proxy returns for every name."""
    parsed = parse_literal(address)
    return isinstance(parsed, IPv4Address) and parsed in _FAKE_IP


def parse_literal(host: str) -> IPv4Address | IPv6Address | None:
    """Return the address that *host* is in any notation of C, such as an integer; None if it is a name.

    An IPv4 address inside an IPv6 address is returned as IPv4.
    """
    with contextlib.suppress(ValueError):
        return _unwrapped(ip_address(host.partition("%")[0]))
    with contextlib.suppress(OSError, UnicodeError):
        return IPv4Address(socket.inet_aton(host))
    return None


def _unwrapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
