"""`python -m nanobanana_async` is `nanobanana`."""

from nanobanana_async.cli.main import main

main()
