"""Kill a batch at every relevant point, start it again, and compare its ledger with the charges.

`python -m tests.kills` prints the histogram of the points hit, and fails if an image was charged twice or lost.
"""
