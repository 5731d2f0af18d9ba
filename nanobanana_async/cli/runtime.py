"""How every command runs and ends: the event loop, signals, exit codes, one line per error."""

import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from decimal import Decimal
from types import FrameType
from typing import Final, NoReturn

import anyio
import attrs
import click

from nanobanana_async.errors import NanoBananaError, SubmissionUnknown
from nanobanana_async.models import Task
from nanobanana_async.transport.bodies import printable

DONE: Final = 0
FAILED: Final = 1
UNKNOWN: Final = 3


@attrs.define
class Session:
    """What a command leaves behind if it is interrupted."""

    unfinished: dict[str, str] = attrs.field(factory=dict)
    """Task id to prompt: paid, and not on disk yet."""
    terminated: bool = False


def run(work: Callable[[Session], Awaitable[int]]) -> NoReturn:
    """Run *work* and exit with the code it returns: 0 all done, 1 something failed, 3 something is unknown.

    Interrupted, it exits with 130 (143 after SIGTERM) and says how to go on; what is on the wire is settled first, and
    a second Ctrl-C does not wait for that.
    """
    session = Session()

    def terminate(_: int, __: FrameType | None) -> None:
        session.terminated = True
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = anyio.run(work, session)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        for task_id in session.unfinished:
            click.echo(f"task {task_id} is paid and runs on: nanobanana wait {task_id} -o .", err=True)
        sys.exit(143 if session.terminated else 130)
    except (NanoBananaError, ValueError, OSError) as exc:
        sys.exit(fail(exc))
    sys.exit(code)


def fail(exc: Exception) -> int:
    """Print one line that says what is wrong; return the exit code that goes with it."""
    click.echo(f"nanobanana: {one_line(exc)}", err=True)
    return UNKNOWN if isinstance(exc, SubmissionUnknown) else FAILED


def one_line(exc: Exception) -> str:
    """Return what *exc* says, on one line, with the path if it is about a file."""
    text = f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) and exc.filename else str(exc)
    return printable(text) or type(exc).__name__


def task_record(task: Task) -> dict[str, object]:
    """Return what `--json` shows of a task."""
    return {
        "task_id": task.task_id,
        "status": task.status.value,
        "images": [image.url or f"inline {image.media_type or 'picture'}" for image in task.images],
        "texts": list(task.texts),
        "consumed": task.consumed,
        "reason": task.reason,
    }


def say(line: object) -> None:
    """Print a result. When nobody reads any more (`| head`), go on in silence: what is paid is still to be saved."""
    try:
        click.echo(line)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def emit(record: dict[str, object]) -> None:
    """Print one JSON object on a line of its own."""
    say(json.dumps(record, default=_plain, ensure_ascii=False))


def _plain(value: object) -> str:
    return f"{value:f}" if isinstance(value, Decimal) else str(value)
