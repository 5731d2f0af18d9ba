"""`python -m nanobanana_async.cli`: the same as `nanobanana`."""

from nanobanana_async.cli.main import main

main()
