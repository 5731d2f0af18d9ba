"""`nanobanana` in real processes, with real signals and a real port."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Literal

import anyio
import pytest
from PIL import Image

from nanobanana_async import NanoBananaClient
from nanobanana_async.simulator import SimulatorProfile
from nanobanana_async.simulator.server import SimulatorServer
from tests.commands import COMMAND, environment, nanobanana, run_command, started, wait_for
from tests.fakes import PNG
from tests.raw_server import response, sending, serving

pytestmark = pytest.mark.other_clients


@pytest.fixture
def server(nanobanana_server: SimulatorServer) -> SimulatorServer:
    """Return a service on a port that the environment points at."""
    return nanobanana_server


def test_a_prompt_becomes_an_image_on_disk(server: SimulatorServer, tmp_path: Path) -> None:
    """The path is on stdout, nothing else is, the cost is on stderr, and the exit code is 0."""
    options = ["-o", "fox.png", "--aspect-ratio", "16:9", "--poll", "0.05"]
    one = run_command("generate", "a fox in snow", *options, cwd=tmp_path)
    assert (one.code, one.out, one.err) == (0, "fox.png\n", "1 image, 0.5 credits charged\n")
    with Image.open(one.folder / "fox.png") as image:
        assert (image.format, image.size) == ("PNG", (1360, 768))
    assert [charge.prompt for charge in server.charges] == ["a fox in snow"]


def test_several_prompts_are_one_json_line_each(server: SimulatorServer, tmp_path: Path) -> None:
    """Each line has the prompt, the files and the cost."""
    (tmp_path / "ref.png").write_bytes(PNG)
    options = ["--json", "-o", "out", "--image", "ref.png", "--poll", "0.05"]
    two = nanobanana("generate", "a", "b", *options, cwd=tmp_path)
    lines = [json.loads(line) for line in two.out.splitlines()]
    assert (two.code, two.err) == (0, "")
    assert {line["prompt"] for line in lines} == {"a", "b"}
    assert all((two.folder / line["files"][0]).is_file() and line["consumed"] == "0.500000" for line in lines)
    assert sorted(charge.prompt for charge in server.charges) == ["a", "b"]


def test_a_full_disk_prints_the_command_that_downloads_the_image(server: SimulatorServer, tmp_path: Path) -> None:
    """The charged image can still be saved elsewhere."""
    options = ["-o", "fox.png", "--poll", "0.05"]
    full = run_command("generate", "too large", *options, cwd=tmp_path, script='ulimit -f 8; exec "$@"')
    assert full.code == 1
    assert "fox.png: cannot be written" in full.err
    command = r"To download it, run: nanobanana wait ta\S+ -o fox\.png"
    assert re.search(rf"charged but not saved: 'too large'\. {command}", full.err)
    assert list(full.folder.iterdir()) == []
    assert len(server.charges) == 1


def test_a_closed_pipe_does_not_stop_images_from_being_saved(server: SimulatorServer, tmp_path: Path) -> None:
    """All images are saved when stdout is closed, as by `head -1`."""
    closed = run_command("generate", "c", "d", "--poll", "0.05", cwd=tmp_path, script='"$@" | :')
    assert closed.err == "2 images, 1 credits charged\n"
    assert len(list(closed.folder.glob("*.png"))) == len(server.charges) == 2


@pytest.mark.slow
def test_the_demo_generates_24_images_and_a_gallery(tmp_path: Path) -> None:
    """The demo needs no key and no network, and prints plain lines without a terminal."""
    demo = run_command("demo", "-o", "shown", cwd=tmp_path)
    assert (demo.code, "\x1b" in demo.out + demo.err) == (0, False)
    page = (demo.folder / "shown" / "index.html").read_text()
    images = sorted((demo.folder / "shown").glob("*.png"))
    assert len(images) == 24
    assert all(image.name in page for image in images)
    assert (demo.folder / "shown" / "index.html").as_uri() in demo.out


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "says"),
    [
        pytest.param(["generate", "x"], {"DEFAPI_API_KEY": "dk-wrong"}, 1, "Invalid API key", id="wrong-key"),
        pytest.param(["generate", "x"], {"DEFAPI_API_KEY": ""}, 1, "set DEFAPI_API_KEY", id="no-key"),
        pytest.param(["balance"], {"DEFAPI_BASE_URL": "http://127.0.0.1:9"}, 1, "Connect", id="connection-refused"),
        pytest.param(["balance"], {"DEFAPI_BASE_URL": "http://api.defapi.org"}, 1, "unencrypted", id="no-tls"),
        pytest.param(["generate", "x", "-o", "/proc/no/x.png"], {}, 1, "/proc/no", id="unwritable"),
        pytest.param(["generate", "x", "--image", "none.png"], {}, 1, "none.png: cannot be read", id="no-image"),
        pytest.param(["status", "ta-none"], {}, 1, "ta-none: task not found", id="no-task"),
        pytest.param(["wait", "ta-none"], {}, 1, "ta-none: task not found", id="nothing-to-wait-for"),
        pytest.param(["generate"], {}, 2, "Missing argument", id="no-prompt"),
        pytest.param(["generate", ""], {}, 2, "prompt: expected text", id="empty-prompt"),
        pytest.param(["generate", "x", "--aspect-ratio", "wide"], {}, 2, "such as '16:9'", id="bad-ratio"),
        pytest.param(["generate", "x", "-o", "-"], {}, 2, "not written to stdout", id="to-stdout"),
        pytest.param(["generate", "x", "-o", "file/x.png"], {}, 1, "file: expected a folder", id="no-folder"),
        pytest.param(["generate", "a", "b", "-o", "c.png"], {}, 2, "a folder for 2 images", id="two-into-one"),
        pytest.param(["simulate", "--faults", "fire=1"], {}, 2, "got 'fire'", id="bad-fault"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    shared_server: SimulatorServer,
    tmp_path: Path,
    arguments: list[str],
    variables: dict[str, str],
    code: int,
    says: str,
) -> None:
    """The code is 1 for a failure and 2 for wrong usage, without a traceback, the key, or a charge."""
    (tmp_path / "file").touch()
    ended = nanobanana(*arguments, cwd=tmp_path, **variables)
    assert ended.code == code
    last = ended.err.strip().splitlines()[-1]
    assert says in last
    assert last.startswith("nanobanana: " if code == 1 else "Error: ")
    assert "Traceback" not in ended.err
    assert "dk-wrong" not in ended.err
    assert shared_server.charges == []


@pytest.mark.parametrize(
    ("number", "code", "first"),
    [
        pytest.param(signal.SIGINT, 130, ":", id="ctrl-c"),
        pytest.param(signal.SIGTERM, 143, ":", id="terminate"),
        pytest.param(
            signal.SIGTERM, 143, "trap '' INT", id="terminate-in-the-background-of-a-script", marks=pytest.mark.slow
        ),
        pytest.param(signal.SIGHUP, 129, ":", id="terminal-closed", marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_prints_the_resume_command_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals, code: int, first: str
) -> None:
    """The printed command downloads the charged image."""
    with SimulatorServer(SimulatorProfile(median_s=0.2, sigma=0, visibility_delay_s=0)) as server:
        monkeypatch.setenv("DEFAPI_BASE_URL", server.url)
        monkeypatch.setenv("DEFAPI_API_KEY", "dk-test")
        with started("generate", "a fox", "-o", "my images", cwd=tmp_path, first=first) as process:
            wait_for(lambda: server.service.charges)
            time.sleep(0.3)
            process.send_signal(number)
            _, errors = process.communicate(timeout=20)
        task_id = server.service.charges[0].task_id
        assert process.returncode == code
        assert (
            f"charged but not saved: 'a fox'. To download it, run: nanobanana wait {task_id} -o 'my images'" in errors
        )
        assert "Traceback" not in errors
        waited = nanobanana("wait", task_id, "-o", "fox.png", "--poll", "0.05", cwd=tmp_path)
        assert (waited.code, waited.out, len(server.service.charges)) == (0, "fox.png\n", 1)


def test_a_message_of_the_service_cannot_control_the_terminal() -> None:
    """Escape sequences are removed, and the error stays on one line."""
    message = json.dumps({"code": 1, "message": "failed", "detail": "\x1b[2J\x1b]0;owned\x07no\nsuch\nthing"}).encode()
    with serving(sending(response(message, status="400 Bad"))) as server:
        ended = nanobanana("balance", DEFAPI_BASE_URL=server.url, DEFAPI_API_KEY="dk-test")
    assert ended.err == "nanobanana: [2J ]0;owned no such thing (HTTP 400, code 1).\n"


def test_a_terminal_that_cannot_show_a_character_gets_an_escape(tmp_path: Path) -> None:
    """A limited locale does not end in a traceback after a charge."""
    with serving(sending(response('{"code":1,"detail":"日本"}'.encode(), status="400 Bad"))) as server:
        variables = {"DEFAPI_BASE_URL": server.url, "DEFAPI_API_KEY": "dk-test", "PYTHONIOENCODING": "latin-1:strict"}
        ended = run_command("balance", cwd=tmp_path, variables=variables)
    assert ended.err == "nanobanana: \\u65e5\\u672c (HTTP 400, code 1).\n"


def test_status_and_balance_print_text_or_json(shared_server: SimulatorServer) -> None:
    """Both print text, or JSON with --json."""
    assert nanobanana("balance").out == "100000 credits\n"
    assert json.loads(nanobanana("balance", "--json").out) == {"credits": "100000"}


def test_errors_are_json_with_json(shared_server: SimulatorServer) -> None:
    """The error is on stdout with its type."""
    ended = nanobanana("wait", "ta-none", "--json")
    record = json.loads(ended.out)
    assert (ended.code, ended.err) == (1, "")
    assert (record["task_id"], record["error_type"]) == ("ta-none", "TaskNotFound")


@pytest.mark.parametrize(
    ("charge", "code", "fact", "says"),
    [
        ("null", 3, "may have been charged", "It may have been charged."),
        ("zero", 1, "0.000000 credits", "It was not charged."),
        ("price", 1, "0.500000 credits", "It was charged 0.5 credits."),
    ],
)
def test_a_failed_task_says_what_it_cost(
    monkeypatch: pytest.MonkeyPatch, charge: Literal["null", "zero", "price"], code: int, fact: str, says: str
) -> None:
    """B4: `wait` and `status` print the reason and the charge. The exit code is 3 if it is not known."""
    fails = SimulatorProfile(median_s=0.1, sigma=0, visibility_delay_s=0, failed_tasks=1, failed_charge=charge)
    with SimulatorServer(fails) as server:
        monkeypatch.setenv("DEFAPI_BASE_URL", server.url)
        monkeypatch.setenv("DEFAPI_API_KEY", "dk-test")

        async def submit() -> str:
            async with NanoBananaClient() as client:
                return (await client.submit("a fox")).task_id

        task_id = anyio.run(submit)
        waited = nanobanana("wait", task_id, "--poll", "0.05")
        assert (waited.code, waited.out) == (
            code,
            f"{task_id}  failed  {fact}  the image could not be generated, please try again later\n",
        )
        assert (
            waited.err
            == f"nanobanana: task {task_id} failed: the image could not be generated, please try again later. {says}\n"
        )
        queried = nanobanana("status", task_id, "--json")
        assert (queried.code, json.loads(queried.out)["status"]) == (code, "failed")


def test_the_simulator_prints_its_url_and_stops_on_a_signal() -> None:
    """Ctrl-C leaves no traceback, and a port in use is one clear line."""
    with started("simulate", "--port", "0", "--json") as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        taken = nanobanana("simulate", "--port", url.rpartition(":")[2])
        assert (taken.code, taken.err.count("\n")) == (1, 1)
        assert "cannot listen" in taken.err
        process.send_signal(signal.SIGINT)
        assert (process.wait(10), process.stderr and process.stderr.read()) == (130, "")


def test_the_simulator_ends_with_its_parent() -> None:
    """Demos and benchmarks leave no servers behind."""
    with started("simulate", "--port", "0", "--json", "--until-eof") as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdin.close()
        assert process.wait(10) == 0


def test_help_imports_neither_httpx_nor_rich() -> None:
    """Help is printed without the slow imports."""
    names = nanobanana("--help").out
    assert all(name in names for name in ("generate", "status", "wait", "balance", "simulate", "demo"))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
@pytest.mark.parametrize("option", ["--poll", "--timeout"])
def test_an_impossible_time_is_wrong_usage(option: str, value: str) -> None:
    """Nothing is submitted with a time that cannot be kept."""
    ended = nanobanana("generate", "a fox", option, value)
    assert (ended.code, option in ended.err, ended.out) == (2, True, "")


def test_a_full_stdout_does_not_stop_images_from_being_saved(server: SimulatorServer, tmp_path: Path) -> None:
    """The error is reported once, and all charged images are on disk."""
    full = run_command("generate", "a", "b", "c", "--poll", "0.05", cwd=tmp_path, script='exec "$@" > /dev/full')
    assert full.code == 0
    says = "nanobanana: stdout: cannot be written (No space left on device)\n3 images, 1.5 credits charged\n"
    assert full.err == says
    assert len(list(tmp_path.glob("*.png"))) == len(server.service.charges) == 3


@pytest.mark.usefixtures("server")
def test_on_a_terminal_results_are_printed_above_the_bar(tmp_path: Path) -> None:
    """A result does not continue the line of the bar, although both are on one terminal."""
    ours, theirs = pty.openpty()
    try:
        options = ["-o", "fox.png", "--poll", "0.05"]
        subprocess.run(  # noqa: S603 - the command of this package
            [*COMMAND, "generate", "a fox", *options],
            cwd=tmp_path,
            env=environment(TERM="xterm", COLUMNS="100"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            check=True,
        )
        shown = os.read(ours, 100_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert re.search(r"(?:^|\n|\x1b\[2K)fox\.png\r\n", shown), shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    ['exec "$@" 2> /dev/full', 'exec "$@" > /dev/full 2>&1', '"$@" 2>&1 | head -1', 'exec "$@" >&- 2>&-'],
)
@pytest.mark.parametrize("command", [["generate", "a", "b", "c"], ["batch", "p.txt", "--out", "."], ["--json"]])
def test_c1_the_display_ends_and_the_work_goes_on(
    server: SimulatorServer, tmp_path: Path, script: str, command: list[str]
) -> None:
    """A full disk, a closed terminal or a reader that has left costs no image."""
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    arguments = ["batch", "p.txt", "--out", ".", "--json"] if command == ["--json"] else command
    ended = run_command(*arguments, "--poll", "0.05", cwd=tmp_path, script=script)
    assert ended.code == 0
    assert "Traceback" not in ended.err + ended.out
    assert len(list(tmp_path.glob("*.png"))) == len(server.service.charges) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("variables", "columns"), [({}, 80), ({}, 40), ({"TERM": "dumb"}, 80)])
def test_c2_the_count_is_shown_at_any_width_and_without_a_capable_terminal(
    tmp_path: Path, variables: dict[str, str], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar and the words give way, not the count. A dumb terminal gets plain lines."""
    (tmp_path / "p.txt").write_text("\n".join(f"fox {number}" for number in range(90)))
    ours, theirs = pty.openpty()
    profile = SimulatorProfile(median_s=0.3, visibility_delay_s=0, failed_tasks=0.1)
    with SimulatorServer(profile) as server, os.fdopen(ours, "rb", buffering=0) as terminal:
        monkeypatch.setenv("DEFAPI_BASE_URL", server.url)
        monkeypatch.setenv("DEFAPI_API_KEY", "dk-test")
        environ = environment(**{"TERM": "xterm", "COLUMNS": str(columns), **variables})
        process = subprocess.Popen(  # noqa: S603 - the command of this package
            [*COMMAND, "batch", "p.txt", "--out", "out", "--poll", "0.05"],
            cwd=tmp_path, env=environ, stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):
            while chunk := terminal.read(65536):
                shown += chunk
        process.wait(60)
    text = shown.decode()
    assert "of 90 saved" in text
    assert ("90/90" in text) == ("\x1b[" in text) == (variables == {})


def test_d3_an_image_is_not_replaced_without_force(server: SimulatorServer, tmp_path: Path) -> None:
    """Nor one with the same name and another suffix, which the image may turn out to have."""
    (tmp_path / "fox.png").write_bytes(b"mine")
    for name in ("fox.png", "fox.jpg"):
        refused = nanobanana("generate", "a fox", "-o", name, cwd=tmp_path)
        assert refused.code == 2
        assert "fox.png exists. To replace it, pass --force." in refused.err
    assert server.charges == []
    forced = nanobanana("generate", "a fox", "-o", "fox.jpg", "--force", "--poll", "0.05", cwd=tmp_path)
    assert (forced.code, forced.out) == (0, "fox.png\n")
    assert "fox.jpg: the image has another format, and was saved as fox.png" in forced.err
    assert (tmp_path / "fox.png").read_bytes() != b"mine"


def test_e5_prompts_are_read_from_standard_input(server: SimulatorServer, tmp_path: Path) -> None:
    """A pipe is a file of prompts for `generate -` and for `batch -`."""
    piped = 'printf "# mine\\na fox\\n\\na hare\\n" | "$@"'
    ended = run_command("generate", "-", "-o", "out", "--poll", "0.05", cwd=tmp_path, script=piped)
    assert ended.code == 0
    assert sorted(charge.prompt for charge in server.charges) == ["a fox", "a hare"]
    csv = 'printf "prompt,key\\nan owl,1\\n" | "$@"'
    ended = run_command("batch", "-", "--format", "csv", "--out", "run", "--poll", "0.05", cwd=tmp_path, script=csv)
    assert (ended.code, server.charges[-1].prompt) == (0, "an owl")
    empty = run_command("generate", "-", cwd=tmp_path, script='printf "" | "$@"')
    assert empty.code == 2
    assert "standard input contains no prompts" in empty.err
