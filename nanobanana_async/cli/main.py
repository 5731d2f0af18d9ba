"""Entry point of `nanobanana`. Prints which packages are missing instead of a traceback."""

import sys
from typing import NoReturn

from nanobanana_async.cli.streams import protect_standard_streams


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        from nanobanana_async.cli.commands import cli  # noqa: PLC0415 - needs an extra
    except ModuleNotFoundError as exc:
        if exc.name not in ("click", "platformdirs", "rich"):
            raise
        sys.exit("nanobanana: packages are missing. In a clone, run: pip install '.[cli]'")
    protect_standard_streams()
    cli()
    sys.exit(0)
