"""The command group: each command in a file of its own."""

import click

from nanobanana_async.cli.batch import batch
from nanobanana_async.cli.demo import demo
from nanobanana_async.cli.generate import generate
from nanobanana_async.cli.listen import listen
from nanobanana_async.cli.simulate import simulate
from nanobanana_async.cli.tasks import balance, status, wait


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="nanobanana-async")
def cli() -> None:
    """Make pictures with the Nano Banana 2 API.

    The key is read from DEFAPI_API_KEY, the service's address from DEFAPI_BASE_URL. Without a key, try
    `nanobanana demo`.
    """


for command in (generate, batch, status, wait, balance, listen, simulate, demo):
    cli.add_command(command)
