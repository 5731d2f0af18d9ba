"""The specification of nanobanana-async, one sentence at a time."""
