"""`nanobanana status`, `wait` and `balance`: query tasks submitted earlier, and the account."""

from collections.abc import Sequence
from pathlib import Path

import click

from nanobanana_async._text import sanitize_line
from nanobanana_async.cli.generate import (
    check_not_replaced,
    check_writable,
    force_option,
    poll_option,
    poll_policy,
    timeout_option,
)
from nanobanana_async.cli.history import acknowledge
from nanobanana_async.cli.jobs import report_suffix
from nanobanana_async.cli.runtime import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_UNKNOWN,
    CommandContext,
    files_record,
    json_option,
    print_json,
    print_result,
    run,
    task_record,
)
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import NoImage, TaskFailed
from nanobanana_async.models import Task, TaskStatus
from nanobanana_async.saved import SavedImage


@click.command()
@click.argument("task_id")
@json_option
def status(task_id: str, *, as_json: bool) -> None:
    """Print the status of a task."""

    async def work(_: CommandContext) -> int:
        async with NanoBananaClient() as client:
            task = await client.task(task_id).query()
        _show(task, as_json=as_json)
        return _failed_code(task) if task.status is TaskStatus.FAILED else EXIT_OK

    run(work, as_json=as_json)


@click.command()
@click.argument("task_id")
@click.option("-o", "--output", metavar="PATH", help="Save the images to this file or folder.")
@force_option
@timeout_option
@poll_option
@json_option
def wait(
    task_id: str, output: str | None, timeout_s: float | None, poll_s: float | None, *, force: bool, as_json: bool
) -> None:
    """Wait for a task, and save its images with -o."""
    if output is not None:
        check_not_replaced(Path(output), force=force)

    async def work(_: CommandContext) -> int:
        if output is not None:
            check_writable(Path(output))
        async with NanoBananaClient(polling=poll_policy(poll_s)) as client:
            handle = client.task(task_id)
            try:
                task = await handle.result(timeout_s=timeout_s)
            except (TaskFailed, NoImage):
                if not as_json:
                    _show(await handle.wait(), as_json=False)
                raise
            files = await client.save(task, output) if output is not None else []
            report_suffix(output, files)
        if output is not None:
            await acknowledge(task)
        _show(task, as_json=as_json, files=files)
        return EXIT_OK

    run(work, as_json=as_json)


@click.command()
@json_option
def balance(*, as_json: bool) -> None:
    """Print the credits left in the account."""

    async def work(_: CommandContext) -> int:
        async with NanoBananaClient() as client:
            credit = await client.balance()
        if as_json:
            print_json({"credits": credit})
        else:
            print_result(f"{credit:f} credits")
        return EXIT_OK

    run(work, as_json=as_json)


def _failed_code(task: Task) -> int:
    return EXIT_UNKNOWN if task.consumed is None else EXIT_FAILED


def _show(task: Task, *, as_json: bool, files: Sequence[SavedImage] = ()) -> None:
    if as_json:
        print_json({**task_record(task), **files_record(files)})
    elif files:
        for file in files:
            print_result(file.path)
    else:
        facts = [task.task_id, task.status.value]
        facts += [image.url or "inline image" for image in task.images]
        facts += [f"{task.consumed:f} credits"] if task.consumed is not None else []
        facts += ["may have been charged"] if task.status is TaskStatus.FAILED and task.consumed is None else []
        facts += [task.reason] if task.reason else []
        print_result("  ".join(map(sanitize_line, [*facts, *task.texts])))
