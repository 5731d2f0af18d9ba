"""Run a command: event loop, signals, exit codes, error lines."""

import asyncio
import contextlib
import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Generator, Iterable
from decimal import Decimal
from typing import Final, NoReturn

import anyio
import attrs
import click

from nanobanana_async._text import sanitize_line
from nanobanana_async.errors import (
    InvalidBatchFile,
    NanoBananaError,
    NoImage,
    SubmissionUnknown,
    TaskFailed,
    TaskLost,
    TaskTimeout,
)
from nanobanana_async.models import Task
from nanobanana_async.saved import SavedImage

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_UNKNOWN: Final = 3

_SIGNALS: Final = () if sys.platform == "win32" else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")

_MAX_ERROR_LINES: Final = 25
"""Number of errors printed for a file of invalid rows."""


@attrs.define
class CommandContext:
    """State of a command that is needed if it ends early."""

    unsaved_tasks: dict[str, tuple[str, str]] = attrs.field(factory=dict[str, tuple[str, str]])
    """Prompt and output path by task id, of tasks that are charged and not saved."""
    code: int = EXIT_OK
    """Exit code of what has ended so far."""
    received_signal: int | None = None
    """The signal that ended the command; None if there was none."""
    force_exit: bool = False
    """Whether a second signal asked for an immediate exit."""
    print_summary: Callable[[], Awaitable[None]] | None = None
    """Prints the closing summary, after the event loop has ended."""

    def print_resume_hints(self) -> None:
        """Print the command that downloads each unsaved task, on stderr."""
        for task_id, (prompt, output) in self.unsaved_tasks.items():
            about = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
            command = f"nanobanana wait {shlex.quote(sanitize_line(task_id))} -o {shlex.quote(output)}"
            click.echo(f"charged but not saved: {sanitize_line(about)!r}. To download it, run: {command}", err=True)


def run(work: Callable[[CommandContext], Awaitable[int]], *, as_json: bool = False) -> NoReturn:
    """Run *work* and exit with the code it returns: 0 success, 1 failure, 3 unknown.

    If a signal arrives, submits in flight finish first, and the exit code is 129, 130 or 143. A second Ctrl-C exits at
    once. Tasks that are charged and not saved are always listed.
    """
    context = CommandContext()
    try:
        code = anyio.run(_until_signalled, work, context)
    except KeyboardInterrupt:  # on Windows, which has no signal handlers here
        code = 128 + signal.SIGINT
    except (NanoBananaError, ValueError, OSError) as exc:
        code = max(context.code, print_error(exc, as_json=as_json))
    except RuntimeError:
        if not context.force_exit:
            raise
        code = EXIT_FAILED
    finally:
        context.print_resume_hints()
    if context.print_summary is not None:
        with contextlib.suppress(NanoBananaError):
            anyio.run(context.print_summary)
    if context.received_signal is not None:
        code = 128 + context.received_signal
    if code > 128:
        click.echo("interrupted", err=True)
    if context.force_exit:  # do not wait for threads that write to a slow disk
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


async def _until_signalled(work: Callable[[CommandContext], Awaitable[int]], context: CommandContext) -> int:
    """Run *work* until it ends, or a signal cancels it.

    The handlers outlive the event loop, so that a third Ctrl-C does not interrupt the summary.
    """
    loop = asyncio.get_running_loop()
    scope = anyio.CancelScope()

    def on_signal(number: int, _: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            if context.received_signal is None:
                context.received_signal = number
                loop.call_soon_threadsafe(scope.cancel)
            elif not context.force_exit:  # exit now: stop the event loop with all tasks, also shielded ones
                context.force_exit = True
                loop.call_soon_threadsafe(loop.stop)

    for number in _SIGNALS:
        # Ignored signals stay ignored, as nohup and background jobs expect.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    with scope:
        return await work(context)
    return EXIT_FAILED


@contextlib.contextmanager
def exit_on_bind_error(host: str, port: int) -> Generator[None]:
    """Exit with one line if the port cannot be opened."""
    try:
        yield
    except OSError as exc:
        hint = ". To select a free port, pass --port 0." if exc.errno == errno.EADDRINUSE else ""
        sys.exit(f"nanobanana: cannot listen on {host}:{port}: {exc.strerror or exc}{hint}")


def print_error(exc: Exception, *, as_json: bool = False) -> int:
    """Print the error and return its exit code."""
    if as_json:
        print_json(error_record(exc))
    else:
        lines = str(exc).splitlines() if isinstance(exc, InvalidBatchFile) else [one_line(exc)]
        if len(lines) > _MAX_ERROR_LINES:
            lines[_MAX_ERROR_LINES:] = [f"and {len(lines) - _MAX_ERROR_LINES} more"]
        click.echo("\n".join(f"nanobanana: {sanitize_line(line)}" for line in lines), err=True)
    return exit_code(exc)


def exit_code(exc: Exception | None) -> int:
    """Return the exit code for *exc*: 0 for None, 3 if a charge is possible, else 1."""
    if exc is None:
        return EXIT_OK
    if isinstance(exc, TaskFailed | NoImage):
        return EXIT_UNKNOWN if exc.task.consumed is None else EXIT_FAILED
    return EXIT_UNKNOWN if isinstance(exc, SubmissionUnknown | TaskLost | TaskTimeout) else EXIT_FAILED


def error_record(exc: Exception) -> dict[str, object]:
    """Return the fields of an error for `--json`."""
    return {
        "task_id": getattr(exc, "task_id", None),
        "error": one_line(exc),
        "error_type": type(exc).__name__,
        "reason_kind": getattr(exc, "reason_kind", None),
        "may_be_charged": exit_code(exc) == EXIT_UNKNOWN,
        "possible_duplicates": getattr(exc, "possible_duplicates", 0),
    }


def one_line(exc: Exception) -> str:
    """Return the message of *exc* on one line, with the path if it is an error of a file."""
    text = f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) and exc.filename else str(exc)
    return sanitize_line(text) or type(exc).__name__


def task_record(task: Task | None) -> dict[str, object]:
    """Return the fields of a task for `--json`. Without a task, their values are empty."""
    if task is None:
        return {"task_id": None, "status": None, "images": [], "texts": [], "consumed": None, "reason": None}
    return {
        "task_id": task.task_id,
        "status": task.status.value,
        "images": [image.url or f"inline {image.media_type or 'image'}" for image in task.images],
        "texts": list(task.texts),
        "consumed": task.consumed,
        "reason": task.reason,
    }


def files_record(files: Iterable[SavedImage]) -> dict[str, object]:
    """Return the fields of saved images for `--json`."""
    files = list(files)
    return {
        "files": [str(file.path) for file in files],
        "mismatch": [one.message for file in files for one in file.mismatch],
    }


def print_result(line: object) -> None:
    """Print a result on stdout."""
    click.echo(line)


def print_json(record: dict[str, object]) -> None:
    """Print one JSON object on a line."""
    text = json.dumps(record, default=_plain, ensure_ascii=False)
    print_result("".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text))


def _plain(value: object) -> str:
    return f"{value:f}" if isinstance(value, Decimal) else str(value)
