"""`nanobanana generate`: prompts in, pictures on disk."""

import tempfile
from functools import partial
from pathlib import Path

import anyio
import attrs
import click

from nanobanana_async.cli.runtime import DONE, FAILED, UNKNOWN, Session, emit, one_line, run, task_record
from nanobanana_async.cli.screen import Board
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import NanoBananaError, SubmissionUnknown, TaskUnfinished
from nanobanana_async.media.formats import SUFFIXES
from nanobanana_async.media.names import safe_name
from nanobanana_async.models import DEFAULT_MODEL, GenerationRequest


@click.command()
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option("-o", "--output", "output", default=".", metavar="PATH", help="A file (fox.png) or a folder.  [default: .]")
@click.option("--image", "images", multiple=True, metavar="PATH|URL", help="A reference image; up to four.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Which model paints.")
@click.option("--aspect-ratio", metavar="N:M", help="Such as 16:9, or auto.")
@click.option("--image-size", metavar="SIZE", help="1k, 2k or 4k, where the model can.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Give up waiting after this long.  [default: 900]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per picture on stdout, and nothing else.")
def generate(prompts: tuple[str, ...], output: str, images: tuple[str, ...], timeout_s: float | None, *, as_json: bool, **options: str | None) -> None:
    """Make one picture for each PROMPT."""
    if len(prompts) > 1 and Path(output).suffix.lower() in SUFFIXES:
        raise click.UsageError(f"-o {output} names one file, but there are {len(prompts)} prompts; name a folder")
    ...
