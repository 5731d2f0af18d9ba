"""Trials: a batch is killed, possibly again, and then finishes. Every charge is checked."""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections import Counter
from pathlib import Path
from random import Random

import anyio
import attrs

from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.ledger.schema import LedgerRow, RowState
from nanobanana_async.simulator import SimulatorProfile
from nanobanana_async.simulator.in_memory import tiny_png
from nanobanana_async.simulator.server import SimulatorServer
from nanobanana_async.simulator.service import SimulatedResponse
from nanobanana_async.simulator.specs import requested_spec
from tests.kills import child

ROWS = 8
PROFILE = SimulatorProfile(median_s=0.03, sigma=0.5, visibility_delay_s=0.0)
_LONGEST_S = 60


@attrs.define
class Tally:
    """The sum over all trials."""

    kills: int = 0
    charges: int = 0
    unknown: int = 0
    duplicates: list[str] = attrs.field(factory=list)
    lost: list[str] = attrs.field(factory=list)
    points: Counter[str] = attrs.field(factory=Counter)
    """Where the kills hit."""


class Harness:
    """Kills child processes that run batches against one simulator."""

    def __init__(self, server: SimulatorServer, seed: int) -> None:
        self._server = server
        self._rng = Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.kills.child"])
        self._posts_to_live: int | None = None
        self._victim: multiprocessing.process.BaseProcess | None = None
        self._points = 0
        self.tally = Tally()
        handle = server.service.handle

        def watched(method: str, *rest: object) -> SimulatedResponse:
            result = handle(method, *rest)  # type: ignore[arg-type]
            if method == "POST":
                self._posted()
            return result

        server.service.handle = watched  # type: ignore[assignment]

    def _posted(self) -> None:
        """Kill the child while its submit is charged and the response is on its way."""
        if self._posts_to_live is None or self._victim is None or self._victim.pid is None:
            return
        self._posts_to_live -= 1
        if self._posts_to_live < 0:
            self._posts_to_live = None
            os.kill(self._victim.pid, signal.SIGKILL)

    def trial(self, name: str, kills: int) -> None:
        """Run a batch, kill it *kills* times, let it finish, and check every charge."""
        with tempfile.TemporaryDirectory() as folder:
            prompts = tuple(f"{name}, row {number}" for number in range(ROWS))
            plan = child.Plan(self._server.url, Path(folder, "run"), prompts, child.NEVER, Path(folder, "points"))
            for _ in range(kills):
                self._killed_run(plan)
            assert self._run(plan) == 0, "a run without a kill failed"
            self._check(plan)

    def _killed_run(self, plan: child.Plan) -> None:
        """Kill a run at a point by its index, or with a submit in flight, or at a random time."""
        plan.log.write_bytes(b"")
        rng = self._rng.random()
        if rng < 0.15:
            self._posts_to_live = self._rng.randrange(ROWS)
            code = self._run(plan)
            self._posts_to_live = None
            where = "POST charged, response on its way"
        elif rng < 0.3:
            code = self._run(plan, kill_after_s=self._rng.uniform(0.02, 0.5))
            where = "any time"
        else:
            code = self._run(attrs.evolve(plan, kill_at=self._rng.randrange(max(self._points, 1))))
            where = (plan.log.read_text().splitlines() or ["?"])[-1]
        self._points = max(self._points, len(plan.log.read_text().splitlines()))
        if code == -signal.SIGKILL:
            self.tally.kills += 1
            self.tally.points[where] += 1

    def _run(self, plan: child.Plan, kill_after_s: float | None = None) -> int | None:
        process = self._context.Process(target=child.run, args=(plan,))
        process.start()
        self._victim = process
        timer = threading.Timer(_LONGEST_S if kill_after_s is None else kill_after_s, process.kill)
        timer.start()
        process.join()
        timer.cancel()
        self._victim = None
        return process.exitcode

    def learn_points(self, name: str) -> None:
        """Run a batch without a kill, and store the number of crash points."""
        with tempfile.TemporaryDirectory() as folder:
            prompts = tuple(f"{name}, row {number}" for number in range(ROWS))
            plan = child.Plan(self._server.url, Path(folder, "run"), prompts, child.NEVER, Path(folder, "points"))
            assert self._run(plan) == 0
            self._points = len(plan.log.read_text().splitlines())

    def _check(self, plan: child.Plan) -> None:
        """Assert that each charge is bound to its row or unknown, none came twice, and each image is complete."""
        records = {record.prompt: record for record in anyio.run(_records, plan.folder)}
        charged = [charge for charge in self._server.charges if charge.prompt in plan.prompts]
        tally = self.tally
        tally.charges += len(charged)
        tally.unknown += sum(record.state is RowState.UNKNOWN for record in records.values())
        tally.duplicates += [prompt for prompt, times in Counter(c.prompt for c in charged).items() if times > 1]
        for charge in charged:
            record = records[charge.prompt]
            if record.state is not RowState.UNKNOWN and record.task_id != charge.task_id:
                tally.lost.append(f"{charge.prompt}: {charge.task_id} is not known")
        for prompt in plan.prompts:
            record = records[prompt]
            if record.state is not RowState.UNKNOWN and not _is_whole(record):
                tally.lost.append(f"{prompt}: {record.state}, and no complete image")
        if stray := [path.name for path in plan.folder.iterdir() if path.name.endswith(".part")]:
            tally.lost.append(f"left behind: {stray}")


def _is_whole(record: LedgerRow) -> bool:
    image = tiny_png(requested_spec({"prompt": record.prompt}))
    return record.state is RowState.SAVED and [file.path.read_bytes() for file in record.files] == [image]


async def _records(folder: Path) -> list[LedgerRow]:
    ledger = await BatchLedger.open(folder, create=False)
    try:
        return await ledger.list_rows()
    finally:
        await ledger.aclose()


def run_trials(kills: int, seed: int) -> Tally:
    """Kill batches until *kills* kills have hit, and return the sum."""
    with SimulatorServer(PROFILE, render=tiny_png, seed=seed) as server:
        harness = Harness(server, seed)
        harness.learn_points("a rehearsal")
        number = 0
        while harness.tally.kills < kills:
            number += 1
            harness.trial(f"trial {number} of {seed}", kills=1 + (number % 4 == 0))
        return harness.tally
