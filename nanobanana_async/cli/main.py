"""Where `nanobanana` starts: says what is missing instead of showing a traceback."""

import io
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        from nanobanana_async.cli.commands import cli  # noqa: PLC0415 - its libraries are an extra
    except ModuleNotFoundError as exc:
        if exc.name not in ("click", "rich"):
            raise
        sys.exit("nanobanana: the command line needs more packages: pip install 'nanobanana-async[cli]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter must not cost a paid picture
            stream.reconfigure(errors="backslashreplace")
    cli()
    sys.exit(0)
