"""Print the table of faults, and what other clients make of them.

python -m tests.faults [--compare]

`--compare` adds a plain httpx loop, and the `openai` package if it is installed, for faults that cost money.
"""

import argparse
import logging
import sys

import anyio

from tests.faults.compare import compare
from tests.faults.table import FAULTS
from tests.faults.trial import RUNS, Query, Result, fault_server, try_all


def _shown(post: Result, query: Query) -> str:
    right = post.as_expected and query.as_expected
    return f"{post.verdict:9} {post.charges}/{1 + post.possible_duplicates:<6}{query.ending:9} {' ' if right else '!'}"


def main() -> int:
    """Try all faults and print the table; return 1 if any result is unexpected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()
    logging.getLogger("nanobanana_async").setLevel(logging.ERROR)
    with fault_server() as server:
        runs = {run: anyio.run(try_all, server, FAULTS, run[0], backend=run[1]) for run in RUNS}
        print(f"{'':40}" + "".join(f"{', '.join(run):28}" for run in RUNS))
        print(f"{'fault':40}" + f"{'POST':9} {'charges':8}{'GET':9}  " * len(RUNS))
        for fault in FAULTS:
            cells = "  ".join(_shown(*runs[run][fault]) for run in RUNS)
            print(f"{fault.number:4}{fault.name:36}{cells}")
        posts = [post for run in runs.values() for post, _ in run.values()]
        wrong = [each for run in runs.values() for pair in run.values() for each in pair if not each.as_expected]
        print(f"\n{len(posts)} submits, {sum(post.charges for post in posts)} charges,", end=" ")
        print(f"{sum(not post.conforms for post in posts)} not in accord with what the client says;", end=" ")
        print(f"{len(wrong)} of {2 * len(posts)} exchanges not as expected")
        for each in wrong:
            print(f"{each.fault.number} {each.fault.name}: {each.message}")
        if options.compare:
            columns = ("jobs", "charges", "duplicates", "undeclared", "lost ids")
            print(f"\n{'the faults that cost money':28}" + "".join(f"{column:>12}" for column in columns))
            for row in anyio.run(compare, server, [runs[RUNS[0]][fault][0] for fault in FAULTS]):
                sums = (row.jobs, row.charges, row.duplicates, row.undeclared, row.lost)
                print(f"{row.name:28}" + "".join(f"{cell:12}" for cell in sums))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
