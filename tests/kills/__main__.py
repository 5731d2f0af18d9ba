"""`python -m tests.kills [--app] [--kills 200] [--seed 0]`: print the points hit, second charges and losses."""

import argparse
import sys

from tests.kills.app_harness import run_rounds
from tests.kills.harness import run_trials


def main() -> int:
    """Parse the options, run the trials, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--app", action="store_true", help="four workers with a ledger instead of a batch")
    options = parser.parse_args()
    tally = (run_rounds if options.app else run_trials)(options.kills, options.seed)
    for point, times in sorted(tally.points.items()):
        print(f"{times:5} {point}")
    for line in tally.duplicates + tally.lost:
        print(f"WRONG {line}")
    print(
        f"{tally.kills} kills, {tally.charges} charges: {len(tally.duplicates)} undeclared duplicates,"
        f" {len(tally.lost)} lost, {tally.unknown} {'attempts unresolved' if options.app else 'rows unknown'}"
    )
    return 1 if tally.duplicates or tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
