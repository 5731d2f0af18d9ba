"""Run `nanobanana` in processes of its own."""

import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

COMMAND = [sys.executable, "-W", "error", "-m", "nanobanana_async.cli"]

# Starting an interpreter and importing the command line takes half a second. Commands without signals, pipes and
# encodings of their own are forked from a process that has done both.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["nanobanana_async.cli.commands", "nanobanana_async.simulator.server", "rich.console"]
)


@attrs.frozen
class Ended:
    """A command that has ended, and its folder."""

    code: int
    out: str
    err: str
    folder: Path


def environment(**variables: str) -> dict[str, str]:
    """Return the environment with *variables*; an empty value removes one."""
    merged = {**os.environ, "NO_COLOR": "1", **variables}
    return {name: value for name, value in merged.items() if value}


def nanobanana(*arguments: str, cwd: Path | None = None, **variables: str) -> Ended:
    """Run one command to its end, in a process forked from a prepared one."""
    folder = Path.cwd() if cwd is None else cwd
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = (DupFd(out.fileno()), DupFd(err.fileno()))
        process = _PROCESSES.Process(target=_command, args=(arguments, folder, environment(**variables), streams))
        process.start()
        process.join(60)
        assert process.exitcode is not None, "the command did not end within a minute"
        out.seek(0)
        err.seek(0)
        return Ended(process.exitcode, out.read().decode(), err.read().decode(), folder)


def _command(arguments: tuple[str, ...], folder: Path, variables: dict[str, str], streams: tuple[Any, Any]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.detach(), number)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    sys.argv = ["nanobanana", *arguments]
    warnings.simplefilter("error")
    from nanobanana_async.cli.main import main  # noqa: PLC0415 - imported in the child, as a real command does

    main()


def run_command(
    *arguments: str, cwd: Path, script: str = 'exec "$@"', variables: Mapping[str, str] = MappingProxyType({})
) -> Ended:
    """Run one command to its end from a shell *script*, whose arguments are the command."""
    done = subprocess.run(  # noqa: S603 - the command of this package
        ["/bin/sh", "-c", script, "_", *COMMAND, *arguments],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr, cwd)


@contextmanager
def started(
    *arguments: str, cwd: Path | None = None, first: str = ":", variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator["subprocess.Popen[str]"]:
    """Start a command from a shell that has run *first*, and end it with the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(  # noqa: S603 - the command of this package
        ["/bin/sh", "-c", f'{first}; exec "$@"', "_", *COMMAND, *arguments],
        cwd=cwd,
        env=environment(**variables),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait until *condition* is true."""
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)
