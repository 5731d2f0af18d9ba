"""Run jobs concurrently, each from prompt to file."""

from collections.abc import Callable, Sequence
from contextlib import aclosing
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import anyio
import attrs
import click

from nanobanana_async._text import format_credits, sanitize_line
from nanobanana_async.cli.progress import JobProgressBar
from nanobanana_async.cli.runtime import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_UNKNOWN,
    CommandContext,
    error_record,
    exit_code,
    files_record,
    one_line,
    task_record,
)
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import NanoBananaError, TaskLost, TaskNotFound
from nanobanana_async.events import Finished, Queued, StatusChanged, Submitted
from nanobanana_async.handle import no_image_error
from nanobanana_async.images.formats import split_suffix
from nanobanana_async.models import Eta, GenerationRequest, JsonValue, Task
from nanobanana_async.regenerate import Generated, has_wrong_size, regenerate
from nanobanana_async.saved import SavedImage

_NO_ERROR: Final = {"error": None, "error_type": None, "reason_kind": None, "may_be_charged": False}


@attrs.define(kw_only=True)
class Job:
    """One prompt and its result."""

    request: GenerationRequest
    output: Path
    """File or folder to save to."""
    name: str | None = None
    """File name in a folder; None derives it from prompt and task id."""
    task: Task | None = None
    files: tuple[SavedImage, ...] = ()
    error: Exception | None = None
    owner: str | None = None
    """Whom the image is for."""
    is_recorded: bool = False
    """Whether the client has a ledger."""
    earlier: tuple[Task, ...] = ()
    """Final tasks that were followed by another one (`--regenerate`)."""
    possible_duplicates: int = 0
    """Submits beyond the first that may have been charged."""
    seconds: float | None = None
    """Time from submit to file."""

    @property
    def exit_code(self) -> int:
        """Exit code of this job."""
        return exit_code(self.error)

    def record(self) -> dict[str, object]:
        """Return the fields of the job for `--json`."""
        record = {"prompt": self.request.prompt, **files_record(self.files), **task_record(self.task)}
        error = error_record(self.error) if self.error is not None else _NO_ERROR
        return {
            **record,
            **error,
            "task_id": error.get("task_id") or record["task_id"],
            "attempts": 1 + len(self.earlier),
            "earlier": [{"task_id": task.task_id, "consumed": task.consumed} for task in self.earlier],
            "possible_duplicates": error.get("possible_duplicates") or self.possible_duplicates,
        }


async def run_jobs(
    client: NanoBananaClient,
    jobs: Sequence[Job],
    *,
    context: CommandContext,
    progress: JobProgressBar,
    timeout_s: float | None,
    on_finished: Callable[[Job], None],
) -> int:
    """Run all *jobs* concurrently, call *on_finished* after each, and return the exit code."""

    async def run_one(number: int, job: Job) -> None:
        try:
            await _run_job(client, job, context, timeout_s, partial(progress.move, number))
        except (TaskLost, TaskNotFound) as exc:  # there is no image to download
            context.unsaved_tasks.pop(exc.task_id or "", None)
            job.error = exc
        except (NanoBananaError, OSError, ValueError) as exc:
            job.error = exc
        progress.move(number, {EXIT_OK: "succeeded", EXIT_FAILED: "failed", EXIT_UNKNOWN: "unknown"}[job.exit_code])
        on_finished(job)

    async with anyio.create_task_group() as outer:
        outer.start_soon(_refresh, progress)
        async with anyio.create_task_group() as group:
            for number, job in enumerate(jobs):
                group.start_soon(run_one, number, job)
        outer.cancel_scope.cancel()
    return max((job.exit_code for job in jobs), default=EXIT_OK)


async def _refresh(progress: JobProgressBar) -> None:
    while True:
        await anyio.sleep(1)
        progress.refresh()


class _Move(Protocol):
    def __call__(self, state: str, eta: Eta | None = None) -> None: ...


async def _run_job(
    client: NanoBananaClient, job: Job, context: CommandContext, timeout_s: float | None, move: _Move
) -> None:
    started_s = anyio.current_time()
    most_s = client.timeouts.task_s if timeout_s is None else timeout_s

    async def attempt(_: int) -> Generated:
        left_s = max(0.0, started_s + most_s - anyio.current_time())
        return await _generate(client, job, context, left_s, move)

    try:
        made = await regenerate(client.regenerate, attempt, has_wrong_size)
    except NanoBananaError as exc:
        job.earlier = exc.earlier
        raise
    job.task, job.files, job.earlier = made.task, made.files, made.earlier
    job.seconds = anyio.current_time() - started_s


async def _generate(
    client: NanoBananaClient, job: Job, context: CommandContext, timeout_s: float, move: _Move
) -> Generated:
    """Submit, wait and save. The files of an attempt are also in *job*."""
    note: JsonValue = {"output": str(job.output.absolute())}
    async with aclosing(client.stream(job.request, timeout_s=timeout_s, owner=job.owner, note=note)) as events:
        async for event in events:
            match event:
                case Queued(eta=eta):
                    move("waiting", eta)
                case Submitted(task_id=task_id):
                    job.possible_duplicates += event.possible_duplicates
                    context.unsaved_tasks[task_id or ""] = (job.request.prompt, str(job.output))
                    move("submitted", client.task(task_id or "").eta())
                case StatusChanged(task=task, eta=eta):
                    job.task = task
                    move(task.status.value, eta)
                case Finished(task=task):
                    job.task = task
                    move("saving")
    assert job.task is not None  # noqa: S101 - a stream ends with the final task
    return Generated(job.task, await _save(client, job, job.task, context))


async def _save(client: NanoBananaClient, job: Job, task: Task, context: CommandContext) -> tuple[SavedImage, ...]:
    """Save the image of a finished task, and acknowledge it in the ledger."""
    files: list[SavedImage] = []
    if task.images:
        name = job.name or f"{job.request.prompt[:40]}-{task.task_id[-6:]}"
        files = await client.save(task, job.output, name=name)
        report_suffix(job.output, files)
    del context.unsaved_tasks[task.task_id]  # saved, or without an image to download
    if job.is_recorded:
        await client.task(task.task_id).ack()
    if not task.images:
        raise no_image_error(task, client.classify_reason(task))
    return tuple(files)


def report_suffix(output: Path | str | None, files: Sequence[SavedImage]) -> None:
    """Print under which name an image was saved whose format is not that of the suffix of *output*."""
    _, wanted = split_suffix(str(output or ""))
    for file in (one.path for one in files):
        if wanted and file.suffix.lower() != wanted.lower():
            click.echo(f"{file.stem}{wanted}: the image has another format, and was saved as {file}", err=True)


def report_failures(jobs: Sequence[Job]) -> None:
    """Print each distinct error once, with its prompt or its count, and the possible duplicates."""
    failed: dict[str, list[Job]] = {}
    for job in jobs:
        if job.error is not None:
            failed.setdefault(one_line(job.error), []).append(job)
    for line, about in failed.items():
        prompt = sanitize_line(about[0].request.prompt)[:60]
        note = f" ({len(about)} times)" if len(about) > 1 else f" (prompt: {prompt!r})" if len(jobs) > 1 else ""
        click.echo(f"nanobanana: {line}{note}", err=True)
    if duplicates := sum(job.possible_duplicates for job in jobs):
        click.echo(f"possible duplicates: {duplicates}. Each may have been charged.", err=True)


def report_cost(jobs: Sequence[Job]) -> None:
    """Print how many images were saved, and what the service has charged."""
    saved = sum(len(job.files) for job in jobs)
    ended = [task for job in jobs for task in (*job.earlier, job.task) if task is not None and task.is_final]
    charges = [task.consumed for task in ended]
    line = f"{saved} {'image' if saved == 1 else 'images'}"
    line += f", {format_credits(sum((one for one in charges if one is not None), Decimal(0)))} credits charged"
    unstated = charges.count(None) + sum(job.exit_code == EXIT_UNKNOWN and job.task is None for job in jobs)
    unstated += sum(getattr(job.error, "possible_duplicates", 0) or job.possible_duplicates for job in jobs)
    line += f", {unstated} more may have been charged" if unstated else ""
    if charges or unstated:
        click.echo(line, err=True)


def report_mismatches(jobs: Sequence[Job]) -> None:
    """Print each image that is not as requested."""
    for job in jobs:
        for file in job.files:
            for one in file.mismatch:
                click.echo(f"{sanitize_line(str(file.path))}: {one.message}", err=True)
