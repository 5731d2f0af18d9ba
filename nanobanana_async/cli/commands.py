"""The command group: each command in a file of its own."""

import click

from nanobanana_async.cli.batch import batch
from nanobanana_async.cli.demo import demo
from nanobanana_async.cli.generate import generate
from nanobanana_async.cli.history import list_tasks
from nanobanana_async.cli.listen import listen
from nanobanana_async.cli.simulate import simulate
from nanobanana_async.cli.tasks import balance, status, wait
from nanobanana_async.wire.endpoint import USER_AGENT


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(USER_AGENT.rpartition("/")[2])
def cli() -> None:
    """Generate images with the Nano Banana 2 API.

    Set your API key in DEFAPI_API_KEY. To use another base URL, set DEFAPI_BASE_URL. To try it without a key, run:
    nanobanana demo.
    """


for command in (generate, list_tasks, batch, status, wait, balance, listen, simulate, demo):
    cli.add_command(command)
