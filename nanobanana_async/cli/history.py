"""`nanobanana list`: the tasks of `generate`, or of another program with a ledger."""

import shlex
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Final

import click
import platformdirs

from nanobanana_async._text import format_credits, sanitize_line
from nanobanana_async.cli.runtime import (
    EXIT_FAILED,
    EXIT_OK,
    CommandContext,
    json_option,
    print_json,
    print_result,
    run,
)
from nanobanana_async.errors import LedgerError
from nanobanana_async.ledger import browse
from nanobanana_async.ledger.folder import SqliteLedger
from nanobanana_async.ledger.schema import RowState
from nanobanana_async.ledger.tasks import LedgerTask
from nanobanana_async.models import Task

_STATUS: Final = {
    RowState.SUBMITTING: "submitting",
    RowState.SUBMITTED: "submitted",
    RowState.SUCCEEDED: "finished",
    RowState.FAILED: "failed",
    RowState.UNKNOWN: "unknown",
}


def _folder() -> Path:
    return platformdirs.user_state_path("nanobanana-async", appauthor=False)


@asynccontextmanager
async def open_ledger(*, skip: bool) -> AsyncGenerator[SqliteLedger | None]:
    """Open the ledger of this user during the block. None if *skip*, or if it cannot be opened, which is printed."""
    ledger = None if skip else SqliteLedger(_folder())
    try:
        if ledger is not None:
            await ledger.open()
    except LedgerError as exc:
        click.echo(f"nanobanana: tasks are not recorded: {sanitize_line(str(exc))}", err=True)
        ledger = None
    try:
        yield ledger
    finally:
        if ledger is not None:
            await ledger.aclose()


async def acknowledge(task: Task) -> None:
    """Record that the images of *task* are saved, if the ledger of this user has it."""
    try:
        await browse.acknowledge(_folder(), task.task_id, task)
    except LedgerError as exc:
        click.echo(
            f"nanobanana: the image is saved, and the ledger cannot be written: {sanitize_line(str(exc))}", err=True
        )


@click.command(name="list")
@click.option("--unsaved", is_flag=True, help="Only what may have been charged and is not saved.")
@click.option("--owner", metavar="NAME", help="Only tasks of this owner.")
@click.option(
    "--ack", "acknowledged", multiple=True, metavar="ID", help="Leave this task out of --unsaved from now on."
)
@click.option(
    "--ledger",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Ledger of another program.  [default: that of generate]",
)
@json_option
def list_tasks(
    *, unsaved: bool, owner: str | None, acknowledged: tuple[str, ...], folder: Path | None, as_json: bool
) -> None:
    """List the tasks that were submitted by generate, oldest first. Sends no requests."""
    home = folder or _folder()
    if folder is not None and not folder.is_dir():
        raise click.UsageError(f"--ledger: {folder} not found. Pass the folder of a SqliteLedger.")

    async def work(_: CommandContext) -> int:
        code = EXIT_OK
        missing = [one for one in acknowledged if not await browse.acknowledge(home, one)]
        tasks = await browse.read_tasks(home)
        for one in missing:
            click.echo(f"nanobanana: {sanitize_line(one)}: not in the ledger, or in use by a program", err=True)
            code = EXIT_FAILED
        tasks = [
            task for task in tasks if (owner is None or task.owner == owner) and (not unsaved or _is_unsaved(task))
        ]
        for task in tasks:
            if as_json:
                print_json(_record(task, is_own=folder is None))
            else:
                _show(task, folder, with_command=unsaved)
        if not as_json:
            _summarize(tasks)
        return code

    run(work, as_json=as_json)


def _is_unsaved(task: LedgerTask) -> bool:
    """Return whether there is, or may be, an image that the program has not used."""
    return task.acknowledged_at is None and task.possible_charges > 0


def _status(task: LedgerTask, *, is_own: bool) -> str:
    """Return the last known status. *is_own* says whether `generate` has recorded the task."""
    if task.state is RowState.SUCCEEDED and task.acknowledged_at is not None:
        return "saved" if is_own else "acknowledged"
    return _STATUS.get(task.state, "not sent" if task.task_id is None else task.state.value)


def _show(task: LedgerTask, folder: Path | None, *, with_command: bool) -> None:
    started = datetime.fromtimestamp(task.intended_at).astimezone()
    charged = "" if task.consumed is None else f"{format_credits(task.consumed)} credits"
    prompt = task.prompt if len(task.prompt) <= 60 else f"{task.prompt[:57]}..."
    texts = [task.task_id or task.key, *([task.owner] if task.owner is not None else []), prompt]
    status = _status(task, is_own=folder is None)
    line = f"{started:%Y-%m-%d %H:%M}  {status:<12}  {charged:<12}  {'  '.join(map(sanitize_line, texts))}"
    print_result(line.rstrip())
    if not with_command:
        return
    option = "" if folder is None else f" --ledger {shlex.quote(str(folder))}"
    leave_out = f"To leave it out, run: nanobanana list{option} --ack {task.task_id or task.key}"
    if task.task_id is None:
        print_result(f"    may have been charged, and its task id is not known. {leave_out}")
    elif folder is not None or task.state is RowState.FAILED:
        print_result(f"    {leave_out}")
    else:
        note = task.note if isinstance(task.note, dict) else {}
        output = note.get("output")
        target = shlex.quote(output if isinstance(output, str) else ".")
        print_result(f"    To download it, run: nanobanana wait {shlex.quote(task.task_id)} -o {sanitize_line(target)}")


def _summarize(tasks: list[LedgerTask]) -> None:
    spent = sum((task.consumed for task in tasks if task.consumed is not None), Decimal(0))
    unstated = sum(task.consumed is None and task.possible_charges > 0 for task in tasks)
    line = f"{len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}, {format_credits(spent)} credits charged"
    line += f", {unstated} whose charge is not known yet" if unstated else ""
    print(line, file=sys.stderr)  # noqa: T201 - a closing line, not a result


def _record(task: LedgerTask, *, is_own: bool) -> dict[str, object]:
    return {
        "key": task.key,
        "task_id": task.task_id,
        "status": _status(task, is_own=is_own),
        "owner": task.owner,
        "note": task.note,
        "prompt": task.prompt,
        "model": task.model,
        "image_size": task.image_size,
        "submitted_at": datetime.fromtimestamp(task.intended_at).astimezone().isoformat(),
        "consumed": task.consumed,
        "reason": task.reason,
        "may_be_charged": task.consumed is None and task.possible_charges > 0,
        "possible_duplicates": max(0, task.possible_charges - 1),
        "is_acknowledged": task.acknowledged_at is not None,
    }
