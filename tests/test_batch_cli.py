"""`nanobanana batch` in real processes, with signals and a real port, run again after each interruption."""

import json
import re
import signal
import socket
import sys
import time
from decimal import Decimal
from pathlib import Path

import attrs
import pytest

from nanobanana_async.cli.batch_reporter import eta_s
from nanobanana_async.simulator import FAST_PROFILE
from nanobanana_async.simulator.server import SimulatorServer
from tests.commands import Ended, nanobanana, started, wait_for
from tests.kills.harness import run_trials
from tests.raw_server import serving

pytestmark = pytest.mark.other_clients

PROMPTS = [f"a fox, number {number}" for number in range(4)]


BATCH = ("batch", "prompts.txt", "--out", "run")


def holder_of(folder: Path) -> int | None:
    """Return the process that holds the ledger of *folder*; None if none does."""
    try:
        holder: int | None = json.loads((folder / "ledger.lock").read_text())["pid"]
    except (FileNotFoundError, ValueError):
        return None
    return holder


@attrs.define
class CliScenario:
    """A folder with prompts, and a server for its commands."""

    folder: Path
    server: SimulatorServer

    def batch(self, *options: str) -> Ended:
        """Run the command to its end."""
        return nanobanana(*BATCH, "--poll", "0.05", *options, cwd=self.folder)

    def batch_until(self, number: signal.Signals) -> Ended:
        """Run the command until all rows are submitted, then send a signal."""
        with started(*BATCH, cwd=self.folder) as process:
            wait_for(lambda: holder_of(self.folder / "run") == process.pid)
            wait_for(lambda: len(self.server.charges) == len(PROMPTS))
            process.send_signal(number)
            out, err = process.communicate(timeout=20)
        return Ended(process.returncode, out, err, self.folder)


@pytest.fixture
def scenario(nanobanana_server: SimulatorServer, tmp_path: Path) -> CliScenario:
    """Return a folder with four prompts, and a server that the environment points at."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return CliScenario(tmp_path, nanobanana_server)


def test_a_file_of_prompts_becomes_a_folder_of_images(scenario: CliScenario) -> None:
    """The gallery path is on stdout, the summary on stderr, and there is no live bar without a terminal."""
    first = scenario.batch()
    assert (first.code, first.out) == (0, "run/index.html\n")
    assert first.err.splitlines()[-1] == "4 of 4 saved; 2 credits spent"
    assert "\x1b" not in first.err
    assert len(list((first.folder / "run").glob("*.png"))) == 4


def test_the_same_command_again_costs_nothing(scenario: CliScenario) -> None:
    """With --json it prints one object per line, marked as replayed."""
    scenario.batch()
    again = scenario.batch("--json")
    lines = [json.loads(line) for line in again.out.splitlines()]
    assert (again.code, again.err) == (0, "")
    assert sorted(line["prompt"] for line in lines) == PROMPTS
    assert all(line["outcome"] == "succeeded" and line["replayed"] and line["files"] for line in lines)
    assert len(scenario.server.charges) == 4


def test_an_interrupted_run_finishes_submits_and_prints_the_resume_command(scenario: CliScenario) -> None:
    """The exit code is 130 or 143, and the same command downloads what was charged."""
    interrupted = [scenario.batch_until(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert [command.code for command in interrupted] == [130, 143]
    for command in interrupted:
        *_, summary, hint, last = command.err.splitlines()
        assert summary == "0 of 4 saved, 4 remaining (4 submitted); 0 credits spent, price of 4 not yet known"
        assert hint == "To resume, run: nanobanana batch prompts.txt --out run"
        assert last == "interrupted"
        assert "Traceback" not in command.err
    assert scenario.batch().code == 0
    assert sorted(charge.prompt for charge in scenario.server.charges) == PROMPTS
    assert len(list((scenario.folder / "run").glob("*.png"))) == 4


def test_an_empty_account_saves_what_is_charged_and_prints_the_resume_command(scenario: CliScenario) -> None:
    """Charged images are saved, and the command to resume is printed."""
    scenario.server.service.profile = attrs.evolve(FAST_PROFILE, balance=Decimal("1.2"))
    poor = scenario.batch()
    assert poor.code == 1
    assert "insufficient credit" in poor.err
    assert "2 of 4 saved, 2 remaining; 1 credits spent" in poor.err
    assert "To resume, run: nanobanana batch prompts.txt --out run" in poor.err
    assert len(scenario.server.charges) == 2


def test_a_second_process_is_refused(scenario: CliScenario) -> None:
    """A second process is refused with the pid of the first, which is not disturbed."""
    with started(*BATCH, "--poll", "1", cwd=scenario.folder) as process:
        wait_for(lambda: holder_of(scenario.folder / "run") == process.pid)
        second = scenario.batch()
        _, err = process.communicate(timeout=30)
    assert (process.returncode, second.code) == (0, 1)
    assert f"run/ledger.lock: in use by process {process.pid} on " in second.err
    assert "Traceback" not in err
    assert len(scenario.server.charges) == 4


def test_the_summary_tells_held_charges_duplicates_and_the_balance(scenario: CliScenario) -> None:
    """B4, B5, M6: what may have been charged is counted, and the account tells whether it was."""
    scenario.server.service.profile = attrs.evolve(FAST_PROFILE, failed_tasks=1.0)
    failed = scenario.batch("--budget", "9")
    assert failed.code == 3
    assert "0 of 4 saved, 1 failed, 3 remaining; 0 credits spent, price of 1 not yet known" in failed.err
    assert "the balance fell by" in failed.err
    scenario.server.service.profile = FAST_PROFILE
    again = scenario.batch("--budget", "9", "--max-price", "0.5", "--retry-failed", "--json")
    assert again.code == 0
    lines = [json.loads(line) for line in (scenario.folder / "run" / "manifest.jsonl").read_text().splitlines()]
    assert sum(line["possible_duplicates"] for line in lines) == len(scenario.server.charges) - 4
    summary = scenario.batch("--budget", "9").err.splitlines()
    charged = len(scenario.server.charges) * Decimal("0.5")
    held, duplicates = charged - 2, len(scenario.server.charges) - 4
    assert summary[0].startswith(f"4 of 4 saved; 2 credits spent, up to {held.normalize():f} more may be charged")
    assert f"{duplicates} possible duplicate" in summary[0]


def _respond_never(peer: socket.socket, _: bytes) -> None:
    peer.recv(1)


@pytest.mark.slow
@pytest.mark.parametrize("more", [0, pytest.param(6, marks=pytest.mark.slow)])
def test_a_second_interrupt_exits_at_once_and_lists_unknown_rows(tmp_path: Path, more: int) -> None:
    """A submit without a response may be charged, and `resolve` lists it without a key."""
    (tmp_path / "prompts.txt").write_text("a fox\na hare")
    with serving(_respond_never) as server:
        variables = {"DEFAPI_BASE_URL": server.url, "DEFAPI_API_KEY": "dk-test"}
        with started("batch", "prompts.txt", "--out", "run", cwd=tmp_path, variables=variables) as process:
            assert process.stderr is not None
            wait_for(lambda: any(request.startswith(b"POST") for request in server.requests))
            process.send_signal(signal.SIGINT)
            assert "Ctrl-C again to exit now" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            for _ in range(more):
                time.sleep(0.01)
                process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "1 unknown, 1 remaining" in err
    assert "nanobanana batch resolve --out run" in err
    assert "Traceback" not in err
    listed = nanobanana("batch", "resolve", "--out", "run", cwd=tmp_path, DEFAPI_API_KEY="")
    assert listed.code == 0
    assert re.fullmatch(r"\w{16}  price unknown  'a fox'  the program ended before a response arrived\n", listed.out)
    key = listed.out.split()[0]
    for arguments, code in (
        (["abandon"], 2),
        (["resubmit", key, "--all"], 2),
        (["bind", key, "nonsense"], 2),
        (["resubmit", key], 0),
        (["list"], 0),
        (["abandon", key], 1),
    ):
        ended = nanobanana("batch", "resolve", *arguments, "--out", "run", cwd=tmp_path)
        assert (ended.code, ended.out) == (code, "")


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "says"),
    [
        pytest.param(["p.txt", "--out", "run"], {"DEFAPI_API_KEY": "dk-wrong"}, 1, "Invalid API key", id="wrong-key"),
        pytest.param(["bad.csv", "--out", "run"], {}, 1, "line 3: prompt: expected text", id="bad-row"),
        pytest.param(
            ["many.csv", "--out", "run"],
            {},
            1,
            "line 25: prompt: expected text, got ''\nnanobanana: and 36 more\n",
            id="bad-rows",
        ),
        pytest.param(
            ["p.txt", "--out", "run", "--aspect-ratio", "1x1"], {}, 1, "nanobanana: aspect_ratio: ", id="bad-ratio"
        ),
        pytest.param(["none.txt", "--out", "run"], {}, 1, "none.txt: No such file", id="no-file"),
        pytest.param(["p.txt", "--out", "p.txt"], {}, 1, "p.txt: expected a folder, got a file", id="out-is-a-file"),
        pytest.param(["p.txt", "--out", "/proc/no"], {}, 1, "/proc/no", id="unwritable"),
        pytest.param(["p.txt"], {}, 2, "Missing option '-o' / '--out'", id="no-out"),
        pytest.param([], {}, 2, "Missing argument 'FILE'", id="no-arguments"),
        pytest.param(
            ["p.txt", "--out", "run", "--budget", "lots"], {}, 2, "expected a number, got 'lots'", id="bad-budget"
        ),
        pytest.param(["p.txt", "--out", "run", "--budget", "nan"], {}, 2, "expected more than 0", id="nan-budget"),
        pytest.param(["p.txt", "--out", "run", "--max-in-flight", "0"], {}, 2, "not in the range", id="none-in-flight"),
        pytest.param(["resolve", "--out", "none"], {}, 1, "not found", id="nothing-to-resolve"),
        pytest.param(["resolve", "bind", "k", "ta-1", "--out", "none"], {}, 2, "at least 16 letters", id="bind-what"),
    ],
)
def test_errors_are_reported_before_anything_is_charged(
    shared_server: SimulatorServer,
    tmp_path: Path,
    arguments: list[str],
    variables: dict[str, str],
    code: int,
    says: str,
) -> None:
    """An invalid command prints one clear error, no traceback, and submits nothing."""
    (tmp_path / "p.txt").write_text("a fox")
    (tmp_path / "bad.csv").write_text("prompt,key\nfox,\n,k\n")
    (tmp_path / "many.csv").write_text("prompt,key\n" + ",k\n" * 60)
    ended = nanobanana("batch", *arguments, cwd=tmp_path, **variables)
    assert (ended.code, ended.out) == (code, "")
    assert says in ended.err
    assert "Traceback" not in ended.err
    assert shared_server.charges == []


def test_the_time_left_follows_from_the_median_and_then_from_the_rate() -> None:
    """The estimate uses Little's law at first, and is never less than one latency."""
    assert eta_s(0, 20, 200, None) == 0
    assert eta_s(1000, 20, 200, None) == 100
    assert eta_s(1000, 20, 200, 5.0) == 200
    assert eta_s(1, 20, 200, 5.0) == 20


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_charge_nothing_twice() -> None:
    """The kill harness finds every image saved and charged once; `python -m tests.kills` does more kills."""
    tally = run_trials(20, seed=sys.maxsize)
    assert (tally.duplicates, tally.lost) == ([], [])
    assert len(tally.points) > 5
