"""Fixtures shared by all tests. Tests marked `anyio` run on asyncio and on trio."""

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from nanobanana_async.simulator import FAST_PROFILE
from nanobanana_async.simulator.server import SimulatorServer
from tests.conformance import ChargeAudit, watch_charges
from tests.virtual_time import backend_options


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """Return asyncio and trio, in virtual time for the mark `virtual_time` without `real_time`.

    With TEST_EVENT_LOOP=uvloop, asyncio runs on uvloop.
    """
    if request.node.get_closest_marker("virtual_time") and not request.node.get_closest_marker("real_time"):
        return request.param, backend_options(request.param)
    if request.param == "asyncio" and os.getenv("TEST_EVENT_LOOP") == "uvloop":
        return request.param, {"use_uvloop": True}
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out aiohttp on trio, which it does not support."""
    for item in list(items):
        params = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
        if (
            params
            and params.get("anyio_backend") == "trio"
            and any(str(one).startswith("aiohttp") for one in params.values())
        ):
            items.remove(item)


@pytest.fixture(scope="session", autouse=True)
def _as_in_a_terminal() -> None:
    """Restore signals that the parent process ignores, as nohup does, so that started commands handle them.

    `preexec_fn` hangs beside threads that import or log.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session")
def _state_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(autouse=True)
def _no_key_from_outside(monkeypatch: pytest.MonkeyPatch, _state_folder: Path) -> None:
    """Remove keys, base URLs and proxies of the environment, and the ledger of the user."""
    monkeypatch.setenv("XDG_STATE_HOME", str(_state_folder / secrets.token_hex(8)))
    for name in ("DEFAPI_API_KEY", "DEFAPI_KEY", "NANO_BANANA_API_KEY", "DEFAPI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


async def _inline(work: Callable[..., object], *args: object, **_: object) -> object:
    await anyio.lowlevel.checkpoint()
    return work(*args)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run disk work on the event loop, because virtual time does not wait for threads."""
    monkeypatch.setattr(anyio.to_thread, "run_sync", _inline)


@pytest.fixture(scope="session")
def _session_server() -> Iterator[SimulatorServer]:
    with SimulatorServer(FAST_PROFILE) as server:
        yield server


@pytest.fixture
def shared_server(_session_server: SimulatorServer, monkeypatch: pytest.MonkeyPatch) -> SimulatorServer:
    """Return a service that many tests share, for commands that are not charged."""
    monkeypatch.setenv("DEFAPI_BASE_URL", _session_server.url)
    monkeypatch.setenv("DEFAPI_API_KEY", min(FAST_PROFILE.keys))
    return _session_server


@pytest.fixture(autouse=True)
def audit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChargeAudit]:
    """Compare, after every test, what the client reported with what was charged.

    The mark `other_clients` turns it off where submits come from other processes or from the test itself.
    """
    audit = watch_charges(monkeypatch)
    yield audit
    if not request.node.get_closest_marker("other_clients"):
        audit.check()
