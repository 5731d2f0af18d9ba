"""The simulated service in a process of its own, for demos, benchmarks and tests."""

import json
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

import anyio
import attrs
from anyio.streams.text import TextReceiveStream

from nanobanana_async.errors import ConfigurationError

_CLOSE_TIMEOUT_S: Final = 5.0


@attrs.frozen
class RunningSimulator:
    """Base URL of the process, and the key that it accepts."""

    url: str
    key: str


@asynccontextmanager
async def simulator_process(*options: str) -> AsyncGenerator[RunningSimulator]:
    """Run `nanobanana simulate` with *options* on a free port. It ends with the block, or with this process.

    Raises:
        ConfigurationError: It did not start. Its stderr has the reason.
    """
    command = [sys.executable, "-m", "nanobanana_async.cli", "simulate", "--port", "0", "--json", "--until-eof"]
    # A session of its own, so that Ctrl-C reaches the client first. The pipe closes when this process ends.
    async with await anyio.open_process(
        [*command, *options], stdin=subprocess.PIPE, stderr=None, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None  # noqa: S101 - always a pipe here
            line = ""
            async for text in TextReceiveStream(process.stdout):
                line += text
                if line.endswith("\n"):
                    break
            if not line:
                raise ConfigurationError("simulator: did not start. See its output on stderr.")
            yield RunningSimulator(**json.loads(line))
        finally:
            process.terminate()
            with anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
                await process.wait()
