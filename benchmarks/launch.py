"""Start the server of the benchmarks, and a measured client, in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent


@contextmanager
def server(*options: str) -> Iterator[str]:
    """Run `benchmarks.server` with *options* and yield its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.server", *options],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None  # noqa: S101 - always a pipe here
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


def client(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module to its end and return the JSON object that it prints last."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


async def nothing(scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - an ASGI application
    """Serve nothing."""
