"""Rounds of an application: four workers on one folder, killed and started again. Every charge is checked."""

import json
import multiprocessing
import signal
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

from nanobanana_async.simulator.in_memory import tiny_png
from nanobanana_async.simulator.server import SimulatorServer
from tests.kills.app_worker import WorkerPlan, run
from tests.kills.harness import PROFILE, Tally

WORKERS = 4
OWNERS = 20
_PROMPTS_PER_WORKER = 5
_NEVER = 10**9
_LONGEST_S = 60


class AppHarness:
    """Runs rounds of workers against one simulator."""

    def __init__(self, server: SimulatorServer, folder: Path, seed: int) -> None:
        self._server = server
        self._folder = folder
        self._journal = folder / "journal"
        self._rng = Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.kills.app_worker"])
        self._points = 60
        self._submitted = 0
        self.tally = Tally()

    def round(self, *, is_last: bool = False) -> None:
        """Start four workers, of which some die, and wait for their ends."""
        plans = [self._plan(number, is_last=is_last) for number in range(WORKERS)]
        workers = [self._context.Process(target=run, args=(plan,)) for plan in plans]
        for worker in workers:
            worker.start()
        if not is_last and self._rng.random() < 0.5:
            workers[0].join(self._rng.uniform(0.1, 0.8))
            workers[0].kill()
        for worker, plan in zip(workers, plans, strict=True):
            worker.join(_LONGEST_S)
            passed = plan.points.read_text().splitlines() if plan.points.exists() else []
            plan.points.unlink(missing_ok=True)
            self._points = max(self._points, len(passed))
            if worker.exitcode == -signal.SIGKILL:
                self.tally.kills += 1
                self.tally.points["any time" if plan.kill_at == _NEVER else passed[-1]] += 1
            elif worker.exitcode != 0:
                self.tally.lost.append(f"a worker ended with {worker.exitcode}")

    def _plan(self, number: int, *, is_last: bool) -> WorkerPlan:
        prompts: list[tuple[str, str]] = []
        for _ in range(0 if is_last else _PROMPTS_PER_WORKER):
            self._submitted += 1
            prompts.append((f"owner {self._submitted % OWNERS}", f"image {self._submitted}"))
        dies = not is_last and number > 0 and self._rng.random() < 0.8
        return WorkerPlan(
            url=self._server.url,
            state=self._folder / "state",
            prompts=tuple(prompts),
            kill_at=self._rng.randrange(self._points) if dies else _NEVER,
            points=self._folder / f"points-{number}",
            journal=self._journal,
        )

    def check(self) -> None:
        """Assert that each charge was delivered or unresolved, and that nothing was yielded after its `ack`."""
        delivered: set[str] = set()
        acknowledged: set[str] = set()
        unresolved: set[str] = set()
        for line in self._journal.read_text().splitlines():
            fact = json.loads(line)
            if fact.get("yielded") in acknowledged and "yielded" in fact:
                self.tally.lost.append(f"{fact['yielded']} was yielded after its acknowledgement")
            delivered |= {fact["delivered"]} if "delivered" in fact else set()
            acknowledged |= {fact["acknowledged"]} if "acknowledged" in fact else set()
            unresolved |= {fact["unresolved"]} if "unresolved" in fact else set()
        charges = self._server.charges
        tally = self.tally
        tally.charges = len(charges)
        tally.unknown = len(unresolved)
        tally.duplicates += [prompt for prompt, times in Counter(c.prompt for c in charges).items() if times > 1]
        for charge in charges:
            if charge.task_id not in delivered and charge.prompt not in unresolved:
                tally.lost.append(f"{charge.prompt}: {charge.task_id} was never yielded")


def run_rounds(kills: int, seed: int) -> Tally:
    """Kill workers until *kills* kills have hit, let the last ones finish, and return the sum."""
    with SimulatorServer(PROFILE, render=tiny_png, seed=seed) as server, tempfile.TemporaryDirectory() as folder:
        harness = AppHarness(server, Path(folder), seed)
        while harness.tally.kills < kills:
            harness.round()
        harness.round(is_last=True)
        harness.round(is_last=True)
        harness.check()
        return harness.tally
