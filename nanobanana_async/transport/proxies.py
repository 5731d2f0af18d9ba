"""Which proxy a request goes through."""

from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass


def proxy_url(value: str) -> str:
    """Return the value of a proxy variable as a URL. Other tools take it without a scheme, and plain passwords."""
    scheme, separator, rest = value.strip().rpartition("://")
    user, at, host = rest.rpartition("@")
    scheme = {"": "http", "socks": "socks5"}.get(scheme.lower(), scheme) if separator else "http"
    return f"{scheme}://{quote(user, safe=':%')}{at}{host}"


def masked(proxy: str) -> str:
    """Return a proxy URL without its user and password."""
    scheme, _, rest = proxy.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


class Proxies:
    """The proxy that the application passes, else those of the environment if *trust_env*."""

    def __init__(self, proxy: str | None, *, trust_env: bool) -> None:
        self._proxy = None if proxy is None else proxy_url(proxy)
        self._environment = getproxies() if trust_env else {}

    def for_url(self, url: str) -> str | None:
        """Return the URL of the proxy for *url*; None for a direct connection."""
        if self._proxy is not None or not self._environment:
            return self._proxy
        scheme, _, rest = url.lower().partition("://")
        if proxy_bypass(rest.partition("/")[0]):
            return None
        found = self._environment.get(scheme) or self._environment.get("all")
        return None if found is None else proxy_url(found)
