"""Fixtures shared by all tests. Tests marked `anyio` run on asyncio and on trio."""

import pytest

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
