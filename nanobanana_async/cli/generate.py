"""`nanobanana generate`: prompts in, pictures on disk."""

import errno
import tempfile
from pathlib import Path
from typing import Any

import click

from nanobanana_async.cli.jobs import Job, report_failures, run_jobs
from nanobanana_async.cli.progress import JobProgressBar
from nanobanana_async.cli.runtime import CommandContext, print_json, print_result, run
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.handle import TaskHandle
from nanobanana_async.images.formats import SUFFIXES
from nanobanana_async.models import DEFAULT_MODEL, GenerationRequest, ImageSource

timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Give up waiting after this long.  [default: 900]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, and nothing else.")


@click.command()
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    default=".",
    metavar="PATH",
    help="A file, if it ends like a picture (fox.png); else a folder, made if missing.  [default: here]",
)
@click.option("--image", "images", multiple=True, metavar="PATH|URL", help="A reference image; up to four.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, metavar="MODEL", help="Which model paints.")
@click.option("--aspect-ratio", metavar="N:M", help="Such as 16:9, or auto.")
@click.option("--image-size", metavar="SIZE", help="1k, 2k or 4k, where the model can.")
@timeout_option
@json_option
def generate(
    prompts: tuple[str, ...],
    output: str,
    images: tuple[str, ...],
    timeout_s: float | None,
    *,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - click hands over what the options above say
) -> None:
    """Make one picture for each PROMPT."""
    where = Path(output)
    if output == "-":
        raise click.UsageError("-o -: pictures are not written to stdout; name a file or a folder.")
    if len(prompts) > 1 and where.suffix.lower() in SUFFIXES:
        raise click.UsageError(f"-o {output} names one file, but there are {len(prompts)} prompts; name a folder.")
    references = [_reference(image) for image in images]
    try:
        requests = [GenerationRequest(prompt, images=references, **options) for prompt in prompts]
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    jobs = [Job(request=request, output=where) for request in requests]

    async def work(session: CommandContext) -> int:
        def keep(handle: TaskHandle) -> None:
            session.unsaved_tasks.setdefault(handle.task_id, ("accepted while this was interrupted", output))

        async with NanoBananaClient(on_orphan=keep) as client:
            check_writable(where)
            with JobProgressBar(len(jobs), quiet=as_json) as board:
                code = await run_jobs(
                    client,
                    jobs,
                    session=session,
                    board=board,
                    timeout_s=timeout_s,
                    on_finished=lambda job: _show(job, as_json=as_json),
                )
        report_failures([] if as_json else jobs)
        return code

    run(work, as_json=as_json)


def _reference(text: str) -> ImageSource:
    return text if text.startswith(("https://", "http://", "data:")) else Path(text)


def _show(job: Job, *, as_json: bool) -> None:
    if as_json:
        print_json(job.record())
    else:
        for file in job.files:
            print_result(file)


def check_writable(where: Path) -> None:
    """Fail before anything is paid when pictures could not be saved to *where*.

    Raises:
        OSError: They could not.
    """
    folder = where.parent if where.suffix.lower() in SUFFIXES else where
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "is a file, and not a folder", str(folder)) from None
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(folder)) from None
    if where != folder and where.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, and not a file", str(where))
