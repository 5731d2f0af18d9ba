"""How every command runs and ends: the event loop, signals, exit codes, one line per error."""

import asyncio
import contextlib
import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from decimal import Decimal
from typing import Final, NoReturn

import anyio
import attrs
import click

from nanobanana_async.errors import InvalidBatchFile, NanoBananaError, SubmissionUnknown
from nanobanana_async.models import Task
from nanobanana_async.wire.body import sanitize_line

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_UNKNOWN: Final = 3

_SIGNALS: Final = () if sys.platform == "win32" else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_MAX_ERROR_LINES: Final = 25
"""Of a file whose rows are all wrong in the same way, nobody reads more."""


@attrs.define
class CommandContext:
    """What a command leaves behind when it ends before its time."""

    unsaved_tasks: dict[str, tuple[str, str]] = attrs.field(factory=dict)
    """Task id to prompt and output path: paid, and not on disk yet."""
    received_signal: int | None = None
    """The signal that ended it."""
    force_exit: bool = False
    """Whether a second signal said not to wait for anything."""
    print_summary: Callable[[], Awaitable[None]] | None = None
    """What there is to say at the end, however it comes, and when the event loop is gone."""

    def print_resume_hints(self) -> None:
        """Print the command that picks up each paid task. On stderr, whatever else went wrong."""
        for task_id, (prompt, output) in self.unsaved_tasks.items():
            about = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
            command = f"nanobanana wait {shlex.quote(sanitize_line(task_id))} -o {shlex.quote(output)}"
            click.echo(f"paid, and not saved: {sanitize_line(about)!r}; to fetch it: {command}", err=True)


def run(work: Callable[[CommandContext], Awaitable[int]], *, as_json: bool = False) -> NoReturn:
    """Run *work* and exit with the code it returns: 0 all done, 1 something failed, 3 something is unknown.

    Interrupted, it exits with 130 (129 and 143 after SIGHUP and SIGTERM): what is on the wire is settled first, and a
    second Ctrl-C does not wait for that. However it ends, tasks that are paid and not saved are named.
    """
    session = CommandContext()
    try:
        code = anyio.run(_until_signalled, work, session)
    except KeyboardInterrupt:  # where signals cannot be received, on Windows
        code = 128 + signal.SIGINT
    except (NanoBananaError, ValueError, OSError) as exc:
        code = print_error(exc, as_json=as_json)
    except RuntimeError:
        if not session.force_exit:
            raise
        code = EXIT_FAILED
    finally:
        session.print_resume_hints()
    if session.print_summary is not None:
        with contextlib.suppress(NanoBananaError):
            anyio.run(session.print_summary)
    if session.received_signal is not None:
        code = 128 + session.received_signal
    if code > 128:
        click.echo("interrupted", err=True)
    if session.force_exit:  # a thread may be at work on a slow disk, and nobody wants to wait for it
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


async def _until_signalled(work: Callable[[CommandContext], Awaitable[int]], session: CommandContext) -> int:
    """Run *work* until it ends, or a signal cancels it.

    The handlers stay to the end of the process, longer than the event loop: an impatient third Ctrl-C must not tear
    what the second one has begun, nor the last words.
    """
    loop = asyncio.get_running_loop()
    scope = anyio.CancelScope()

    def on_signal(number: int, _: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and there is nothing left to stop
            if session.received_signal is None:
                session.received_signal = number
                loop.call_soon_threadsafe(scope.cancel)
            elif not session.force_exit:  # settling takes too long for somebody: every task is torn, shielded or not
                session.force_exit = True
                loop.call_soon_threadsafe(loop.stop)

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup, or a script with a job in its background, wants
            signal.signal(number, on_signal)
    with scope:
        return await work(session)
    return EXIT_FAILED


@contextlib.contextmanager
def exit_on_bind_error(host: str, port: int) -> Iterator[None]:
    """Say in one line why a port cannot be listened on, and exit."""
    try:
        yield
    except OSError as exc:
        hint = "; --port 0 picks a free one" if exc.errno == errno.EADDRINUSE else ""
        sys.exit(f"nanobanana: cannot listen on {host}:{port}: {exc.strerror or exc}{hint}")


def print_error(exc: Exception, *, as_json: bool = False) -> int:
    """Print one line that says what is wrong; return the exit code that goes with it."""
    if as_json:
        print_json(error_record(exc))
    else:
        lines = str(exc).splitlines() if isinstance(exc, InvalidBatchFile) else [one_line(exc)]
        if len(lines) > _MAX_ERROR_LINES:
            lines[_MAX_ERROR_LINES:] = [f"and {len(lines) - _MAX_ERROR_LINES} more"]
        click.echo("\n".join(f"nanobanana: {sanitize_line(line)}" for line in lines), err=True)
    return exit_code(exc)


def exit_code(exc: Exception | None) -> int:
    """Return what *exc* makes of a command: 0 for none, 3 when something may have been paid, else 1."""
    if exc is None:
        return EXIT_OK
    return EXIT_UNKNOWN if isinstance(exc, SubmissionUnknown) else EXIT_FAILED


def error_record(exc: Exception) -> dict[str, object]:
    """Return what `--json` shows of an error."""
    kind = type(exc).__name__
    return {"task_id": getattr(exc, "task_id", None), "error": one_line(exc), "error_type": kind}


def one_line(exc: Exception) -> str:
    """Return what *exc* says, on one line, with the path if it is about a file."""
    text = f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) and exc.filename else str(exc)
    return sanitize_line(text) or type(exc).__name__


def task_record(task: Task | None) -> dict[str, object]:
    """Return what `--json` shows of a task; the same names when none is known."""
    if task is None:
        return {"task_id": None, "status": None, "images": [], "texts": [], "consumed": None, "reason": None}
    return {
        "task_id": task.task_id,
        "status": task.status.value,
        "images": [image.url or f"inline {image.media_type or 'picture'}" for image in task.images],
        "texts": list(task.texts),
        "consumed": task.consumed,
        "reason": task.reason,
    }


def print_result(line: object) -> None:
    """Print a result. When nobody reads any more (`| head`), go on in silence: what is paid is still to be saved."""
    try:
        click.echo(line)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(record: dict[str, object]) -> None:
    """Print one JSON object on a line of its own."""
    text = json.dumps(record, default=_plain, ensure_ascii=False)
    print_result("".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text))


def _plain(value: object) -> str:
    return f"{value:f}" if isinstance(value, Decimal) else str(value)
