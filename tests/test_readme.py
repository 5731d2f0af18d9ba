"""The README and the guides contain only code that runs, and names that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from attrs import frozen

import nanobanana_async as nb
import nanobanana_async.simulator
from nanobanana_async.simulator.server import SimulatorServer

pytestmark = pytest.mark.other_clients

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = [
    README,
    *sorted(ROOT.glob("nanobanana_async/*/README.md")),
    *(ROOT / room / "README.md" for room in ("tests", "benchmarks")),
]


def blocks(guide: Path, language: str) -> list[str]:
    """Return the code blocks of one guide in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", guide.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


CODE = {
    f"{guide.relative_to(ROOT).as_posix()}#{number}": code
    for guide in GUIDES
    for number, code in enumerate(blocks(guide, "python"), 1)
}


@frozen
class Effect:
    """What a code block leaves behind: the charges at the service, and the images in a folder."""

    charges: int = 0
    images: int = 0
    folder: str = "out"


EFFECTS = {
    "README.md#1": Effect(charges=1, images=1),
    "README.md#2": Effect(charges=20, images=20),
    "README.md#3": Effect(charges=1),
    "README.md#4": Effect(charges=1, images=1),
    "README.md#5": Effect(),  # fox.png is missing, which is reported before anything is charged
    "README.md#6": Effect(charges=2),
    "nanobanana_async/batch/README.md#1": Effect(charges=2, images=2, folder="runs/spring"),
    "nanobanana_async/integrations/README.md#1": Effect(),
    "nanobanana_async/ledger/README.md#1": Effect(charges=1),
    "nanobanana_async/ledger/README.md#2": Effect(charges=1),
    "nanobanana_async/simulator/README.md#1": Effect(),
    "nanobanana_async/tracking/README.md#1": Effect(),
    "nanobanana_async/transport/README.md#1": Effect(),
    "nanobanana_async/transport/README.md#2": Effect(),
    "nanobanana_async/transport/README.md#3": Effect(),
}


@pytest.mark.slow
@pytest.mark.parametrize("block", CODE)
def test_every_python_block_runs_as_printed(
    block: str, nanobanana_server: SimulatorServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block runs in a process and a folder of its own, against the simulator, with warnings as errors."""
    monkeypatch.setenv("NB_SECRET", "s" * 32)
    ran = subprocess.run(  # noqa: S603 - code of this repository
        [sys.executable, "-W", "error", "-c", CODE[block]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    folder = EFFECTS[block].folder
    images = len(list((tmp_path / folder).glob("*.png")))
    assert Effect(len(nanobanana_server.service.charges), images, folder) == EFFECTS[block]


@pytest.mark.slow
@pytest.mark.parametrize(
    "checker",
    [
        pytest.param(("mypy", "--strict", "--no-incremental"), id="mypy"),
        pytest.param(("pyright", "--pythonpath", sys.executable), id="pyright"),
    ],
)
def test_every_python_block_is_typed(checker: tuple[str, ...], tmp_path: Path) -> None:
    """The code of the guides passes mypy and pyright in strict mode."""
    for block, code in CODE.items():
        (tmp_path / (re.sub(r"\W", "_", block) + ".py")).write_text(code)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    ran = subprocess.run(  # noqa: S603 - a type checker, on code of this repository
        [sys.executable, "-m", *checker, "."], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_python_block_has_a_stated_effect() -> None:
    """A new block in a guide comes with the charges and images that it is expected to cause."""
    assert list(EFFECTS) == list(CODE)


def test_the_first_block_is_ten_lines() -> None:
    """The first example of the README is short."""
    assert len([line for line in blocks(README, "python")[0].splitlines() if line.strip()]) <= 10


def test_there_are_exactly_two_set_up_commands() -> None:
    """The README has one command for the demo and one for the tests; `.ci/run` runs both as printed."""
    commands = [command.split()[-1] for command in blocks(README, "sh") if "venv .venv" in command]
    assert commands == ["demo", ".venv/bin/pytest"]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.relative_to(ROOT).as_posix())
def test_every_name_in_a_guide_exists(guide: Path) -> None:
    """A class, method or field in backticks is public, a script exists, and a link leads to a file."""
    text = guide.read_text(encoding="utf-8")
    public = {**vars(nanobanana_async.simulator), **{name: getattr(nb, name) for name in nb.__all__}}
    public["AiohttpTransport"] = nb.AiohttpTransport  # imported when it is used, because it needs an extra
    for name, member in re.findall(r"`([A-Z][a-z][A-Za-z]*)(?:\.(\w+))?[^`]*`", text):
        assert name in public, name
        assert not member or member in dir(public[name]), f"{name}.{member}"
    for script in re.findall(r"python -m ((?:tests|benchmarks)\.\w+)", text):
        assert list(ROOT.glob(script.replace(".", "/") + ".py")) or (ROOT / script.replace(".", "/")).is_dir(), script
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (guide.parent / link).exists(), link
