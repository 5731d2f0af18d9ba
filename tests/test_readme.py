"""The README and the guides contain only code that runs."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import nanobanana_async as nb
from nanobanana_async.simulator.server import SimulatorServer

pytestmark = pytest.mark.other_clients

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    """Return the code blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_every_python_block_runs_as_printed(nanobanana_server: SimulatorServer, tmp_path: Path) -> None:
    """All at once, each in a process and a folder of its own, against the simulator."""

    def run(numbered: tuple[int, str]) -> "subprocess.CompletedProcess[str]":
        number, code = numbered
        folder = tmp_path / str(number)
        folder.mkdir()
        return subprocess.run(  # noqa: S603 - code of this repository
            [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True, check=False
        )

    codes = blocks("python")
    with ThreadPoolExecutor(len(codes)) as pool:
        for ran in pool.map(run, enumerate(codes)):
            assert (ran.returncode, ran.stderr) == (0, "")
    assert len(codes) == 6
    assert list((tmp_path / "0" / "out").glob("ta*.png"))
    assert len(list((tmp_path / "1" / "runs" / "spring").glob("*.png"))) == 2
    assert len(list((tmp_path / "3" / "out").glob("*.png"))) == 20
    assert len(nanobanana_server.service.charges) == 24


def test_the_first_block_is_ten_lines() -> None:
    """The front door is short."""
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 10


def test_there_are_exactly_two_set_up_commands() -> None:
    """One for the demo, one for the tests; `.ci/run` runs both as printed."""
    assert [command.split()[-1] for command in blocks("sh") if "venv .venv" in command] == ["demo", ".venv/bin/pytest"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Z][A-Za-z]+)`", README.read_text(encoding="utf-8")))))
def test_every_name_the_readme_drops_exists(name: str) -> None:
    """Renaming something means renaming it there."""
    assert name in nb.__all__
