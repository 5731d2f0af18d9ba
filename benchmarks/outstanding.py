"""1,000 and 10,000 outstanding tasks over real sockets: this package and others in one run.

    python benchmarks/outstanding.py [--jobs 1000 10000] [--clients ...] [--latency 12] [--limit 300]

Each client is a process of its own with its package's default settings. So is the server, which is started for each
client and gives the nth job the same latency (lognormal, sigma 0.5). Needs the extra `bench`.
"""

import argparse
import json
import statistics
import urllib.request
from importlib.metadata import PackageNotFoundError, version

import attrs

from benchmarks import launch
from benchmarks.contestant import CLIENTS


@attrs.frozen(kw_only=True)
class Result:
    """The result of one client."""

    name: str
    jobs: int
    finished: int
    errors: dict[str, int]
    cpu_s: float
    wall_s: float
    rss_mib: float
    stall_s: float
    delays_s: list[float]
    """Sorted times from the end of a job to its notice by the caller."""
    requests: float
    """Polls per finished job."""


def measure(name: str, jobs: int, latency_s: float, limit_s: float) -> Result:
    """Run one client against a server of its own."""
    with launch.server("--latency", str(latency_s)) as port:
        record = launch.client("benchmarks.contestant", name, f"http://127.0.0.1:{port}", str(jobs), str(limit_s))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/truth", timeout=60) as response:
            truth = json.load(response)
    noticed_s = record.pop("noticed_s")
    del record["began_s"]
    polls = sum(polls for _, _, polls in truth.values()) / max(len(noticed_s), 1)
    delays_s = sorted(at_s - truth[job][1] for job, at_s in noticed_s.items())
    return Result(name=name, jobs=jobs, finished=len(noticed_s), delays_s=delays_s, requests=polls, **record)


def show(result: Result, ours: Result | None) -> None:
    """Print one line."""
    try:
        release = version(result.name.replace("_", "-"))
    except PackageNotFoundError:
        release = "?"
    delays_s = result.delays_s or [float("nan")]
    errors = ", ".join(f"{count} {name}" for name, count in result.errors.items())
    ratio = "" if ours is None else f"{result.cpu_s / ours.cpu_s:6.1f}x"
    print(
        f"{result.name + ' ' + release:24} {result.finished:6d}/{result.jobs:<6d} {result.cpu_s:8.2f} {ratio:>7}"
        f" {result.rss_mib:7.0f} {result.stall_s * 1e3:8.0f} {result.requests:6.2f}"
        f" {statistics.median(delays_s):8.2f} {delays_s[int(0.95 * (len(delays_s) - 1))]:7.2f} {result.wall_s:7.0f}"
        f"  {errors}",
        flush=True,
    )


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--latency", type=float, default=12.0, help="median seconds per job")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a client is stopped")
    options = parser.parse_args()
    for jobs in options.jobs:
        print(f"\n{jobs} jobs at once, {options.latency:g} s each in the median, at most {options.limit:g} s in all")
        print(
            f"{'client':24} {'finished':>13} {'CPU s':>8} {'':>7} {'RSS MiB':>7} {'stall ms':>8} {'polls':>6}"
            f" {'median s':>8} {'p95 s':>7} {'wall s':>7}  raised"
        )
        ours = None
        for name in options.clients:
            result = measure(name, jobs, options.latency, options.limit)
            ours = ours or (result if name == "nanobanana_async" else None)
            show(result, ours)


if __name__ == "__main__":
    main()
