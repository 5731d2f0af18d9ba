"""Count how often a plain httpx loop and the `openai` package are charged for the same lost responses."""

import importlib.util
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import anyio
import anyio.to_thread
import attrs
import httpx

from tests.faults.table import FAULTS, Fault
from tests.faults.trial import DEADLINES, FaultServer, Result

Submit: TypeAlias = Callable[[str], Awaitable[bool]]
"""Submits once to a base URL, and returns whether a task id was received."""

CHARGED: Final = tuple(fault for fault in FAULTS if fault.charges)
"""The faults after which the service has charged."""


@attrs.define
class Row:
    """The sum over all faults for one client."""

    name: str
    jobs: int = 0
    charges: int = 0
    duplicates: int = 0
    """Charges beyond one per job."""
    undeclared: int = 0
    """Duplicates that the client did not declare."""
    lost: int = 0
    """Charged jobs whose id was in the received bytes but is not known to the client."""


async def compare(server: FaultServer, own: list[Result]) -> list[Row]:
    """Return a row each for this client, a plain loop, and openai if it is installed."""
    mine = Row("nanobanana_async")
    for result in own:
        if result.fault.charges:
            _add(
                mine,
                result.fault,
                result.charges,
                found=result.verdict == "accepted",
                declared=result.possible_duplicates,
            )
    rows = [mine]
    others: list[tuple[str, Submit]] = [("httpx, three tries", _httpx_loop)]
    if importlib.util.find_spec("openai"):
        others.append(("openai, stock settings", _openai))
    for name, submit in others:
        row = Row(name)
        for number, fault in enumerate(CHARGED):
            nonce = f"{name.partition(',')[0]}{number}"
            found = await submit(server.url(fault, times=99, nonce=nonce))
            _, charged = await anyio.to_thread.run_sync(server.truth, nonce)
            _add(row, fault, len(charged), found=found, declared=0)
        rows.append(row)
    return rows


def _add(row: Row, fault: Fault, charges: int, *, found: bool, declared: int) -> None:
    row.jobs += 1
    row.charges += charges
    row.duplicates += max(0, charges - 1)
    row.undeclared += max(0, charges - 1 - declared)
    row.lost += fault.post == "accepted" and not found


async def _httpx_loop(base_url: str) -> bool:
    async with httpx.AsyncClient(timeout=DEADLINES.submit_s) as client:
        for _ in range(3):
            try:
                with anyio.fail_after(DEADLINES.submit_s + 1):  # it has no deadline of its own
                    response = await client.post(f"{base_url}/api/image/gen", json={"prompt": "a fox"})
                response.raise_for_status()
                return bool(response.json()["data"]["task_id"])
            except (httpx.HTTPError, ValueError, LookupError, TypeError, TimeoutError, RecursionError):
                await anyio.sleep(0.01)
    return False


async def _openai(base_url: str) -> bool:
    openai: Any = importlib.import_module("openai")
    async with openai.AsyncOpenAI(base_url=base_url, api_key="dk-test", timeout=DEADLINES.submit_s) as client:
        with anyio.move_on_after(3 * (DEADLINES.submit_s + 2)):
            try:
                await client.images.generate(prompt="a fox", model="m")
            except Exception:  # noqa: BLE001 - whatever it raises, no id came of it
                return False
            return True  # it decoded something; its ids differ, so it is counted in its favour
    return False
