"""Base URL, API key and headers, validated once so that the key cannot leak or fail later."""

import hashlib
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final, NoReturn
from urllib.parse import urlsplit

import attrs

from nanobanana_async.errors import ConfigurationError
from nanobanana_async.models import url_problem
from nanobanana_async.protocols import ExchangeError, WireResponse
from nanobanana_async.wire.addresses import is_public, parse_literal
from nanobanana_async.wire.redaction import redact_response

DEFAULT_BASE_URL: Final = "https://api.defapi.org"
KEY_VARIABLES: Final = ("DEFAPI_API_KEY", "DEFAPI_KEY", "NANO_BANANA_API_KEY")
"""Environment variables with the API key. The first one that is set is used."""
BASE_URL_VARIABLE: Final = "DEFAPI_BASE_URL"


def _version() -> str:
    try:
        return version("nanobanana-async")
    except PackageNotFoundError:  # a copy inside another package, or a bundle without metadata
        return "0"


# File hosts reject the default user agents of libraries (403 "error code: 1010").
USER_AGENT: Final = f"nanobanana-async/{_version()}"


@attrs.frozen
class ApiKey:
    """An API key that no repr shows, so a traceback with local variables does not contain it."""

    value: str = attrs.field(repr=False)

    def normalized(self) -> "ApiKey":
        """Return the key without the whitespace and prefix that are often pasted with it.

        Raises:
            ConfigurationError: The key is empty, or contains invalid characters. The message does not quote it.
        """
        clean = ApiKey(re.sub(r"^bearer(\s+|$)", "", self.value.strip(), flags=re.IGNORECASE).strip())
        if not clean.value:
            raise ConfigurationError(f"no API key: set {KEY_VARIABLES[0]} or pass api_key=...")
        if not re.fullmatch(r"[!-~]+", clean.value):
            raise ConfigurationError(
                "api_key: contains whitespace, control or non-ASCII characters (value hidden). Copy the key again."
            )
        return clean


@attrs.frozen
class Endpoint:
    """Base URL and key of the service. No repr contains the key."""

    base_url: str
    _key: ApiKey

    @classmethod
    def resolve(cls, api_key: ApiKey | None, base_url: str | None) -> "Endpoint":
        """Return the endpoint from the arguments, else from the environment.

        Raises:
            ConfigurationError: There is no key, or the key or the URL cannot be used.
        """
        name = "base_url" if base_url else BASE_URL_VARIABLE
        url = _normalized_url(base_url or os.getenv(BASE_URL_VARIABLE) or DEFAULT_BASE_URL, name)
        key = api_key or ApiKey(next(filter(None, map(os.getenv, KEY_VARIABLES)), ""))
        return cls(url, key.normalized())

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of every API request. They are sent to `base_url` only."""
        return {
            "Authorization": f"Bearer {self._key.value}",
            "Accept": "application/json",
            # No compression: 235 bytes of gzip can cost 1.5 GiB (measured).
            "Accept-Encoding": "identity",
            "User-Agent": USER_AGENT,
        }

    def key_digest(self, salt: str) -> str:
        """Return 16 hex digits of a hash of *salt* and the key."""
        return hashlib.sha256(f"{salt} {self._key.value}".encode()).hexdigest()[:16]

    def redact_response(self, response: WireResponse) -> WireResponse:
        """Return *response* with the key removed. Some servers quote it, and errors quote their words."""
        return redact_response(response, self._key.value)

    def redact_error(self, failure: ExchangeError) -> ExchangeError:
        """Return a transport error with the key removed. A user's transport may quote the request."""
        if self._key.value in failure.reason:
            failure.reason = failure.reason.replace(self._key.value, "[API key]")
            failure.args = (failure.reason,)
        return failure

    def __reduce__(self) -> NoReturn:
        raise TypeError("endpoint: contains the API key and cannot be pickled. Create one client per process.")


def _normalized_url(url: str, name: str) -> str:
    cleaned = url.strip().rstrip("/")
    if problem := url_problem(cleaned):
        raise ConfigurationError(f"{name}: {cleaned!r} {problem}")
    parts = urlsplit(cleaned)
    if parts.query or parts.fragment:
        raise ConfigurationError(f"{name}: {cleaned!r} contains a query or a fragment. Remove it.")
    if parts.scheme == "http" and not _is_private_host(parts.hostname or ""):
        raise ConfigurationError(f"{name}: {cleaned!r} would send the API key unencrypted. Use https://.")
    return cleaned


def _is_private_host(host: str) -> bool:
    """Return whether *host* names this machine or a private network, where plain http is accepted."""
    if parse_literal(host) is not None:
        return not is_public(host)
    return "." not in host or host.endswith((".localhost", ".local", ".internal", ".test"))
