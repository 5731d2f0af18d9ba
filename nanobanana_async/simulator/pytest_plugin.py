"""Pytest fixtures for users of the package, loaded through the entry point `pytest11`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nanobanana_async.simulator.in_memory import Simulator
    from nanobanana_async.simulator.server import SimulatorServer

# The imports are inside the fixtures: pytest loads this module in every run of every project that has the package
# installed, and the server needs the extra `simulator`.


@pytest.fixture
def nanobanana_simulator() -> Simulator:
    """Return the service in memory: `async with nanobanana_simulator.client() as client`."""
    from nanobanana_async.simulator.in_memory import Simulator  # noqa: PLC0415 - imported in the fixture

    return Simulator()


@pytest.fixture
def nanobanana_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatorServer]:
    """Yield the service on a real port. DEFAPI_BASE_URL and DEFAPI_API_KEY point at it."""
    try:
        from nanobanana_async.simulator.in_memory import FAST_PROFILE  # noqa: PLC0415 - imported in the fixture
        from nanobanana_async.simulator.server import SimulatorServer  # noqa: PLC0415 - imported in the fixture
    except ModuleNotFoundError as exc:
        pytest.fail(
            f"nanobanana_server: {exc}. Run: pip install '.[simulator]' in a clone of nanobanana-async", pytrace=False
        )

    with SimulatorServer(FAST_PROFILE) as server:
        monkeypatch.setenv("DEFAPI_BASE_URL", server.url)
        monkeypatch.setenv("DEFAPI_API_KEY", min(FAST_PROFILE.keys))
        yield server
