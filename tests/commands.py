"""Run `nanobanana` in processes of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import attrs

COMMAND = [sys.executable, "-W", "error", "-m", "nanobanana_async.cli"]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment with *variables*; an empty value removes one."""
    merged = {**os.environ, "NO_COLOR": "1", **variables}
    return {name: value for name, value in merged.items() if value}


def nanobanana(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    env = environment(**variables)
    return subprocess.run(  # noqa: S603 - the command of this package
        [*COMMAND, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False
    )


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
            process.kill()


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait until *condition* is true."""
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@attrs.frozen
class Ended:
    """A command that has ended, and its folder."""

    code: int
    out: str
    err: str
    folder: Path
