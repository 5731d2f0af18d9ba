"""Fixtures shared by all tests. Tests marked `anyio` run on asyncio and on trio."""

from collections.abc import Iterator

import pytest

from tests.conformance import Book, watch
from tests.virtual_time import backend_options

pytest_plugins = ["nanobanana_async.simulator.fixtures"]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """Asyncio and trio; in virtual time where the module or the test asks for it with the mark `virtual_time`."""
    if request.node.get_closest_marker("virtual_time"):
        return request.param, backend_options(request.param)
    return request.param


@pytest.fixture(autouse=True)
def _no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the key, the service or the proxy of whoever runs it."""
    for name in ("DEFAPI_API_KEY", "DEFAPI_KEY", "NANO_BANANA_API_KEY", "DEFAPI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(autouse=True)
def book(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Book]:
    """Conformance, after every test: what the client believes is what was charged.

    Not where the mark `other_clients` says that submits come from other processes, or from the test itself.
    """
    book = watch(monkeypatch)
    yield book
    if not request.node.get_closest_marker("other_clients"):
        book.check()
