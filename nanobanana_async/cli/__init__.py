"""`nanobanana`: parses, calls, prints. Needs the extra `cli`."""
