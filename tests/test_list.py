"""`nanobanana list`, and what `generate` leaves in the ledger, also if it is killed."""

import json
from pathlib import Path

import pytest

from nanobanana_async.simulator import FAST_PROFILE, SimulatorProfile
from nanobanana_async.simulator.server import SimulatorServer
from tests.commands import nanobanana, started, wait_for
from tests.kills.app_harness import run_rounds

pytestmark = pytest.mark.other_clients


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> object:
    """Yield a service whose images take half a second."""
    with SimulatorServer(SimulatorProfile(median_s=0.5, sigma=0.01, visibility_delay_s=0)) as server:
        monkeypatch.setenv("DEFAPI_BASE_URL", server.url)
        monkeypatch.setenv("DEFAPI_API_KEY", min(FAST_PROFILE.keys))
        yield server


def test_a_killed_generate_loses_nothing(server: SimulatorServer, tmp_path: Path) -> None:
    """`list --unsaved` prints the command that downloads each charged image, and forgets it once it has run."""
    with started("generate", "a fox", "a hare", "-o", "out", "--owner", "me", cwd=tmp_path) as process:
        wait_for(lambda: len(server.charges) == 2)
        process.kill()
    listed = nanobanana("list", "--unsaved", cwd=tmp_path)
    assert listed.code == 0
    for charge in server.charges:
        command_line = f"To download it, run: nanobanana wait {charge.task_id} -o {tmp_path / 'out'}\n"
        if charge.task_id in listed.out:
            assert command_line in listed.out
            assert nanobanana("wait", charge.task_id, "-o", "out", cwd=tmp_path).code == 0
        else:  # the response was on its way
            assert "its task id is not known" in listed.out
    assert len(listed.out.splitlines()) == 4
    left = [line for line in nanobanana("list", "--unsaved", "--json").out.splitlines() if json.loads(line)["task_id"]]
    assert left == []
    assert len(server.charges) == 2


def test_list_shows_what_was_saved_and_what_it_has_cost(server: SimulatorServer, tmp_path: Path) -> None:
    """One line per task, one JSON object with --json, and one owner with --owner."""
    assert nanobanana("list").out == ""
    assert nanobanana("generate", "a fox", "--owner", "me", "--poll", "0.1", cwd=tmp_path).code == 0
    assert nanobanana("generate", "a hare", "--poll", "0.1", cwd=tmp_path).code == 0
    assert nanobanana("generate", "an owl", "--no-ledger", "--poll", "0.1", cwd=tmp_path).code == 0
    listed = nanobanana("list")
    first, second = listed.out.splitlines()
    assert first.endswith(f"  saved         0.5 credits   {server.charges[0].task_id}  me  a fox")
    assert second.endswith("a hare")
    assert listed.err == "2 tasks, 1 credits charged\n"
    (record,) = [json.loads(line) for line in nanobanana("list", "--json", "--owner", "me").out.splitlines()]
    assert (record["prompt"], record["status"], record["consumed"]) == ("a fox", "saved", "0.500000")
    assert record["note"] == {"output": str(tmp_path)}
    assert nanobanana("list", "--unsaved").out == ""


def test_a_ledger_that_cannot_be_used_does_not_stop_generate(server: SimulatorServer, tmp_path: Path) -> None:
    """A container without a home still gets its image, with a warning."""
    (tmp_path / "state").write_text("")
    ended = nanobanana("generate", "a fox", "--poll", "0.1", cwd=tmp_path, XDG_STATE_HOME=str(tmp_path / "state"))
    assert ended.code == 0
    assert "tasks are not recorded: " in ended.err


def test_list_says_what_is_wrong_with_its_arguments(tmp_path: Path) -> None:
    """A folder without a ledger, and an id that is not there."""
    missing = nanobanana("list", "--ledger", str(tmp_path / "nowhere"))
    assert (missing.code, missing.out) == (2, "")
    assert "not found. Pass the folder of a SqliteLedger." in missing.err
    assert nanobanana("list", "--ack", "ta-1").code == 1
    assert nanobanana("generate", "a fox", "--owner", " ").code == 2
    unknown = nanobanana("list", "--ledger", str(tmp_path), "--ack", "ta-1")
    assert unknown.code == 1
    assert "ta-1: not in the ledger" in unknown.err


@pytest.mark.slow
def test_twenty_kills_of_an_application_lose_nothing_and_yield_nothing_twice() -> None:
    """Four workers share a folder; `python -m tests.kills --app` does more kills."""
    tally = run_rounds(20, seed=7)
    assert (tally.duplicates, tally.lost) == ([], [])
    assert len(tally.points) > 5
