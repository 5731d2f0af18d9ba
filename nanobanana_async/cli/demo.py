"""`nanobanana demo`: generate 24 images with a simulator, and write a gallery."""

from pathlib import Path
from typing import Final

import anyio.to_thread
import click

from nanobanana_async._text import format_credits
from nanobanana_async.batch import gallery
from nanobanana_async.cli.generate import check_writable
from nanobanana_async.cli.jobs import Job, report_failures, run_jobs
from nanobanana_async.cli.progress import JobProgressBar
from nanobanana_async.cli.runtime import CommandContext, run
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.models import GenerationRequest
from nanobanana_async.policies import PollPolicy
from nanobanana_async.simulator.subprocess import simulator_process

_LATENCY_S: Final = 3.0
_POLLING: Final = PollPolicy.backoff(first_poll_s=0.8, initial_s=0.4, multiplier=1.2, max_s=1.5)
"""The default backoff, scaled to images that take three seconds."""
_SUBJECTS: Final = (
    ("a fox in snow", "16:9"),
    ("a lighthouse keeper's library", "3:4"),
    ("paper boats on a green canal", "1:1"),
    ("a night train crossing the steppe", "21:9"),
    ("a tea house in the rain", "4:5"),
    ("the last tram of the evening", "3:2"),
    ("a greenhouse on the moon", "1:1"),
    ("a cellist on a rooftop", "2:3"),
)
_STYLES: Final = ("in watercolour", "as a woodcut", "at golden hour")


@click.command()
@click.option(
    "-o",
    "--output",
    default="nanobanana-demo",
    show_default=True,
    metavar="FOLDER",
    help="Folder for images and gallery.",
)
def demo(output: str) -> None:
    """Generate 24 images with a simulator: no key, no network, no cost."""
    folder = Path(output)
    pairs = [(f"{subject}, {style}", ratio) for style in _STYLES for subject, ratio in _SUBJECTS]
    jobs = [
        Job(request=GenerationRequest(prompt, aspect_ratio=ratio), output=folder, name=f"{number:02}-{prompt}")
        for number, (prompt, ratio) in enumerate(pairs, start=1)
    ]

    async def work(_: CommandContext) -> int:  # unsaved tasks are not listed: they end with the simulator
        check_writable(folder)
        async with (
            simulator_process("--latency", str(_LATENCY_S)) as simulator,
            NanoBananaClient(simulator.key, base_url=simulator.url, polling=_POLLING) as client,
        ):
            click.echo(f"generating {len(jobs)} images with a simulator on {simulator.url}", err=True)
            with JobProgressBar(len(jobs)) as progress:
                code = await run_jobs(
                    client,
                    jobs,
                    context=CommandContext(),
                    progress=progress,
                    timeout_s=60,
                    on_finished=lambda job: _print_files(progress, job),
                )
        report_failures(jobs)
        page = folder / "index.html"
        await anyio.to_thread.run_sync(gallery.write, page, "nanobanana demo", [_card(job, folder) for job in jobs])
        click.echo(f"{sum(not job.error for job in jobs)} images saved in {folder}. Gallery: {page.resolve().as_uri()}")
        return code

    run(work)


def _print_files(progress: JobProgressBar, job: Job) -> None:
    for file in job.files:
        progress.print_line(f"{job.seconds:5.1f} s  {file.path}")


def _card(job: Job, folder: Path) -> gallery.GalleryCard:
    return gallery.GalleryCard(
        prompt=job.request.prompt,
        status="failed" if job.error else "succeeded",
        file=job.files[0].path.relative_to(folder).as_posix() if job.files else None,
        seconds=job.seconds,
        cost="" if job.task is None or job.task.consumed is None else format_credits(job.task.consumed),
        note=str(job.error or ""),
        mismatch=tuple(one for file in job.files for one in file.mismatch),
    )
