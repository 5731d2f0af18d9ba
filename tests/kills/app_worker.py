"""One worker of an application with a ledger, which kills itself after a given number of crash points."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import attrs

from nanobanana_async import NanoBananaClient, SqliteLedger, TaskHandle
from nanobanana_async.ledger import folder as ledger_folder
from nanobanana_async.simulator import FAST_LIMITS, FAST_POLLING
from tests.kills.child import arm


@attrs.frozen
class WorkerPlan:
    """The task of one worker."""

    url: str
    state: Path
    prompts: tuple[tuple[str, str], ...]
    """Owner and prompt of each image to submit."""
    kill_at: int
    points: Path
    """Where the names of the crash points go, a line each as it is passed."""
    journal: Path
    """What the application knows: a JSON object per line, appended by all workers."""


def run(plan: WorkerPlan) -> None:
    """Deliver what earlier workers left, submit, deliver, and end, or die on the way."""
    ledger_folder.TAKE_OVER_INTERVAL_S = 0.05  # type: ignore[misc]  # as after 30 s
    with plan.points.open("ab", buffering=0) as points, plan.journal.open("ab", buffering=0) as journal:
        arm(plan.kill_at, points.write)

        def note(**fact: object) -> None:
            journal.write(json.dumps(fact).encode() + b"\n")

        anyio.run(_Worker(plan, note).run)


class _Worker:
    def __init__(self, plan: WorkerPlan, note: Callable[..., None]) -> None:
        self._plan = plan
        self._note = note
        self._claimed: set[str] = set()

    async def run(self) -> None:
        """Run the worker."""
        plan = self._plan
        ledger = SqliteLedger(plan.state, group_commit_s=0.002)
        async with (
            NanoBananaClient(
                "dk-test", base_url=plan.url, limits=FAST_LIMITS, polling=FAST_POLLING, ledger=ledger
            ) as client,
            anyio.create_task_group() as group,
        ):
            async for handle in client.resume():
                self._note(yielded=handle.task_id)
                group.start_soon(self._deliver, handle)
            async for attempt in client.unresolved():
                self._note(unresolved=attempt.prompt, owner=attempt.owner)
                await attempt.ack()
            async with _following(self, client), anyio.create_task_group() as submits:
                for owner, prompt in plan.prompts:
                    submits.start_soon(self._generate, client, owner, prompt)

    async def _generate(self, client: NanoBananaClient, owner: str, prompt: str) -> None:
        handle = await client.submit(prompt, owner=owner, note={"prompt": prompt})
        self._claimed.add(handle.task_id)
        await self._deliver(handle)

    async def deliver_new(self, handle: TaskHandle) -> None:
        """Deliver a task that was taken over."""
        if handle.task_id not in self._claimed:
            self._note(yielded=handle.task_id)
            await self._deliver(handle)

    async def _deliver(self, handle: TaskHandle) -> None:
        self._claimed.add(handle.task_id)
        task = await handle.result()
        self._note(delivered=task.task_id, owner=handle.owner, note=handle.note)
        await handle.ack()
        self._note(acknowledged=task.task_id)


@asynccontextmanager
async def _following(worker: _Worker, client: NanoBananaClient) -> AsyncIterator[None]:
    """Deliver the tasks of workers that die meanwhile."""

    async def follow() -> None:
        async with anyio.create_task_group() as deliveries:
            async for handle in client.resume(follow=True):
                deliveries.start_soon(worker.deliver_new, handle)

    async with anyio.create_task_group() as group:
        group.start_soon(follow)
        yield
        group.cancel_scope.cancel()
