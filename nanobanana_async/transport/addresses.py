"""Which network addresses a URL from a third party may lead to (server-side request forgery)."""

import contextlib
import socket
from typing import Final
from urllib.parse import urlsplit

import anyio

from nanobanana_async.wire.addresses import is_fake_ip, is_public
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
