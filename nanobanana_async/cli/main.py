"""Entry point of `nanobanana`. Prints which packages are missing instead of a traceback."""

import io
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        from nanobanana_async.cli.commands import cli  # noqa: PLC0415 - needs an extra
    except ModuleNotFoundError as exc:
        if exc.name not in ("click", "platformdirs", "rich"):
            raise
        sys.exit("nanobanana: packages are missing. To install them, run: pip install 'nanobanana-async[cli]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character must not end the run
            stream.reconfigure(errors="backslashreplace")
    cli()
    sys.exit(0)
