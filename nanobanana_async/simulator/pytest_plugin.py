"""Pytest fixtures for users: `pytest_plugins = ["nanobanana_async.simulator.pytest_plugin"]`."""

from collections.abc import Iterator

import pytest

from nanobanana_async.simulator.in_memory import FAST_PROFILE, Simulator
from nanobanana_async.simulator.server import SimulatorServer


@pytest.fixture
def nanobanana_simulator() -> Simulator:
    """The service in memory: `async with nanobanana_simulator.client() as client`."""
    return Simulator()


@pytest.fixture
def nanobanana_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatorServer]:
    """The service on a real port, with DEFAPI_BASE_URL and DEFAPI_API_KEY pointing at it."""
    with SimulatorServer(FAST_PROFILE) as server:
        monkeypatch.setenv("DEFAPI_BASE_URL", server.url)
        monkeypatch.setenv("DEFAPI_API_KEY", min(FAST_PROFILE.keys))
        yield server
