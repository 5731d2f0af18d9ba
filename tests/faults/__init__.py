"""Faults on the wire, played by a server in a process of its own that records the truth.

`python -m tests.faults` tries each fault on POST and GET, on asyncio and trio, and prints the table.
"""
