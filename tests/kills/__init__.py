"""Kills a batch at every point that matters, starts it again, and compares what it believes with what was charged.

`python -m tests.kills` prints the histogram of the points hit, and fails if a picture was paid twice, or lost.
"""
