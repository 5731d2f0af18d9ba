"""`python -m nanobanana_async.cli`: the same as `nanobanana`."""

from nanobanana_async.cli.entry import main

main()
