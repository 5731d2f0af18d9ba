"""`nanobanana generate`: generate images from prompts and save them."""

import errno
import math
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from nanobanana_async.cli.history import open_ledger
from nanobanana_async.cli.jobs import Job, report_cost, report_failures, report_mismatches, run_jobs
from nanobanana_async.cli.progress import JobProgressBar
from nanobanana_async.cli.runtime import CommandContext, json_option, print_json, run
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.handle import TaskHandle
from nanobanana_async.images.formats import SUFFIXES, split_suffix
from nanobanana_async.images.references import parse_reference
from nanobanana_async.models import DEFAULT_MODEL, GenerationRequest
from nanobanana_async.policies import PollPolicy, ReferencePolicy, RegeneratePolicy


def _check_seconds(
    _: click.Context, __: click.Parameter, value: float | None, *, max_s: float = math.inf
) -> float | None:
    if value is not None and not 0 < value <= max_s:  # false for nan, too
        most = "" if max_s == math.inf else f" and at most {max_s:g}"
        raise click.BadParameter(f"expected more than 0{most} seconds, got {value:g}.")
    return value


timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=float,
    callback=_check_seconds,
    metavar="SECONDS",
    help="Stop waiting after this time.  [default: 900]",
)
poll_option = click.option(
    "--poll",
    "poll_s",
    type=float,
    callback=partial(_check_seconds, max_s=86_400),
    metavar="SECONDS",
    help="Poll each task at this interval.  [default: learned]",
)

_OTHER_SUFFIXES: Final = frozenset({".tif", ".tiff", ".bmp", ".heic", ".heif", ".avif", ".svg", ".pdf", ".psd", ".jxl"})
"""Suffixes of images that the service does not return. As a folder they would be a surprise."""

regenerate_option = click.option(
    "--regenerate",
    type=click.IntRange(0, 10),
    default=0,
    metavar="N",
    help="Submit up to N more times if there is no image, or one of the wrong size. Each is charged. Not if refused.",
)
shrink_option = click.option(
    "--shrink-references", is_flag=True, help="Turn reference images upright, and shrink them to 10 MiB if larger."
)
force_option = click.option("--force", is_flag=True, help="Replace an image with the name of -o.")


@click.command()
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    default=".",
    metavar="PATH",
    help="A file with an image suffix (fox.png), or a folder, created if missing.  [default: .]",
)
@click.option("--image", "images", multiple=True, metavar="PATH|URL", help="Reference image; up to four.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, metavar="MODEL", help="Name of the model.")
@click.option("--aspect-ratio", metavar="N:M", help="Aspect ratio, such as 16:9, or auto.")
@click.option("--image-size", metavar="SIZE", help="Image size, such as 2k, if the model supports it.")
@force_option
@click.option("--n", "variants", type=click.IntRange(1, 1000), default=1, metavar="N", help="Images per prompt.")
@regenerate_option
@shrink_option
@click.option("--owner", metavar="NAME", help="Whom the images are for. To filter by it, run: nanobanana list --owner.")
@click.option("--no-ledger", is_flag=True, help="Keep no record of the tasks for: nanobanana list.")
@timeout_option
@poll_option
@json_option
def generate(  # noqa: PLR0913 - one parameter per option
    prompts: tuple[str, ...],
    output: str,
    images: tuple[str, ...],
    owner: str | None,
    timeout_s: float | None,
    poll_s: float | None,
    *,
    variants: int,
    regenerate: int,
    shrink_references: bool,
    force: bool,
    no_ledger: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - the remaining options above
) -> None:
    """Generate one image for each PROMPT, and for each line of standard input if it is -.

    Tasks are recorded, so that none is lost if the program is killed. To list them, run: nanobanana list.
    """
    path = Path(output)
    prompts = tuple(prompt for prompt in _with_stdin(prompts) for _ in range(variants))
    if owner is not None and not owner.strip():
        raise click.UsageError("--owner: expected text.")
    _check_output(output, len(prompts), force=force)
    try:
        references = [parse_reference(image, Path()) for image in images]
        requests = [GenerationRequest(prompt, images=references, **options) for prompt in prompts]
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc

    async def work(context: CommandContext) -> int:
        def keep(handle: TaskHandle) -> None:
            context.unsaved_tasks.setdefault(handle.task_id, ("accepted during the interrupt", output))

        async with (
            open_ledger(skip=no_ledger) as ledger,
            NanoBananaClient(
                polling=poll_policy(poll_s),
                regenerate=RegeneratePolicy(attempts=regenerate),
                references=reference_policy(shrink=shrink_references),
                on_orphan=keep,
                ledger=ledger,
            ) as client,
        ):
            check_writable(path)
            is_recorded = ledger is not None
            jobs = [Job(request=one, output=path, owner=owner, is_recorded=is_recorded) for one in requests]
            with JobProgressBar(len(jobs), quiet=as_json) as progress:
                code = await run_jobs(
                    client,
                    jobs,
                    context=context,
                    progress=progress,
                    timeout_s=timeout_s,
                    on_finished=lambda job: _show(job, progress, as_json=as_json),
                )
            if not as_json:
                report_failures(jobs)
                report_mismatches(jobs)
                report_cost(jobs)
        return code

    run(work, as_json=as_json)


def _with_stdin(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Return *prompts* with the lines of standard input in place of `-`. Lines that begin with `#` are comments."""
    if "-" not in prompts:
        return prompts
    lines = [line.strip() for line in sys.stdin.read().splitlines()]
    read = [line for line in lines if line and not line.startswith("#")]
    found = tuple(one for prompt in prompts for one in (read if prompt == "-" else [prompt]))
    if not found:
        raise click.UsageError("PROMPT: standard input contains no prompts.")
    return found


def _check_output(output: str, count: int, *, force: bool) -> None:
    """Exit before anything is charged if *output* cannot be what *count* images are saved to."""
    if output == "-":
        raise click.UsageError("-o: expected a file or a folder, got '-'. Images are not written to stdout.")
    suffix = Path(output).suffix.lower()
    if suffix in _OTHER_SUFFIXES:
        raise click.UsageError(f"-o: expected .png, .jpg, .webp, .gif, or a folder, got {suffix}.")
    if count > 1 and split_suffix(output)[1]:
        raise click.UsageError(f"-o: expected a folder for {count} images, got the file {output}.")
    check_not_replaced(Path(output), force=force)


def poll_policy(poll_s: float | None) -> PollPolicy:
    """Return the policy for `--poll`; the learned schedule if it is None."""
    return PollPolicy() if poll_s is None else PollPolicy.fixed(poll_s)


def reference_policy(*, shrink: bool) -> ReferencePolicy:
    """Return the policy for `--shrink-references`."""
    return ReferencePolicy(on_too_large="shrink" if shrink else "error")


def _show(job: Job, progress: JobProgressBar, *, as_json: bool) -> None:
    if as_json:
        print_json(job.record())
    else:
        for file in job.files:
            progress.print_result(str(file.path))


def check_not_replaced(path: Path, *, force: bool) -> None:
    """Exit before anything is charged if *path* is an image that exists, with this or another image suffix."""
    stem, suffix = split_suffix(path.name)
    if suffix and not force:
        for other in (path, *(path.with_name(stem + one) for one in sorted(SUFFIXES))):
            if other.is_file():
                raise click.UsageError(f"-o: {other} exists. To replace it, pass --force.")


def check_writable(path: Path, *, is_folder: bool = False) -> None:
    """Raise before anything is charged if images could not be saved to *path*.

    A *path* with an image suffix is a file, unless *is_folder*.

    Raises:
        OSError: The folder cannot be written.
    """
    folder = path.parent if path.suffix.lower() in SUFFIXES and not is_folder else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder, got a file", str(folder)) from None
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(folder)) from None
    if path != folder and path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder", str(path))
