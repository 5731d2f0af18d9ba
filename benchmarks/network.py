"""A distant service: how soon the images are there, for this package and others.

    python -m benchmarks.network [--jobs 1000] [--rtt 0.12] [--clients ...] [--plot benchmarks/network.svg]

The server speaks TLS in a process of its own, behind a proxy that adds a round trip, and takes 0.45 s for a submit.
With the three round trips of a new connection, a submit takes 0.8 s. All clients have their default settings, and the
nth job takes the same time for each. "No bound" submits all jobs at once. Then one request in a hundred fails and one
connection in a hundred is reset, and then the service allows 20 submits per second, in fixed windows, with and without
Retry-After.
"""

import argparse
import contextlib
import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import trustme

from benchmarks import launch
from benchmarks.contestant import CLIENTS

POST_S: Final = "0.45"
_ALLOWED_PER_S: Final = 20
_SETTLED_S: Final = 10.0
"""Time after which the rate of the service is expected to be known."""
_STOCK: Final = ("openai", "runwayml")


@attrs.define
class Distant:
    """A server behind a network."""

    url: str
    direct_url: str
    certificate: str
    connections: int = 0
    """Set at the end."""

    def get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        """Return a document of the server, past the network."""
        trust = ssl.create_default_context(cafile=self.certificate)
        with urllib.request.urlopen(f"{self.direct_url}/{path}", timeout=60, context=trust) as response:  # noqa: S310 - our own
            return json.load(response)


@contextlib.contextmanager
def distant(rtt_s: float, *options: str, loss: float = 0.0) -> Iterator[Distant]:
    """Run a server with TLS, and a network in front of it."""
    authority = trustme.CA()
    with tempfile.TemporaryDirectory() as folder:
        trust, identity = Path(folder, "ca.pem"), Path(folder, "server.pem")
        authority.cert_pem.write_to_path(trust)
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(identity)
        with launch.server("--tls", str(identity), *options) as port:
            command = [sys.executable, "-m", "benchmarks.delay_proxy", port, "--rtt", str(rtt_s), "--loss", str(loss)]
            proxy = subprocess.Popen(command, cwd=launch.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert proxy.stdout is not None  # noqa: S101 - always a pipe here
            url = f"https://127.0.0.1:{proxy.stdout.readline().strip()}"
            service = Distant(url, f"https://127.0.0.1:{port}", str(trust))
            os.environ["SSL_CERT_FILE"] = service.certificate
            try:
                yield service
            finally:
                service.connections = json.loads(proxy.communicate()[0])


@attrs.frozen(kw_only=True)
class Run:
    """One client, one service."""

    name: str
    jobs: int
    done_s: list[float]
    """When each job was done, from the start."""
    errors: dict[str, int]
    cpu_s: float
    connections: int
    accepted_s: list[float]
    throttled_s: list[float]

    def share_s(self, share: float) -> float:
        """Return when that share of the jobs was done."""
        index = round(share * self.jobs) - 1
        return self.done_s[index] if index < len(self.done_s) else float("nan")

    def used(self) -> float:
        """Return the share of the allowed submits that were made while jobs waited."""
        return len(self.accepted_s) / _ALLOWED_PER_S / self.accepted_s[-1]

    def late_throttles(self) -> float:
        """Return the share of the submits after the first ten seconds that were throttled."""
        late = sum(at_s > _SETTLED_S for at_s in self.throttled_s)
        return late / max(1, late + sum(at_s > _SETTLED_S for at_s in self.accepted_s))


def measure(name: str, jobs: int, rtt_s: float, *options: str, loss: float = 0.0, limit_s: float = 200.0) -> Run:
    """Run one client against a service of its own."""
    with distant(rtt_s, "--latency", "12", "--submit-delay", POST_S, *options, loss=loss) as service:
        arguments = (name, service.url, str(jobs), str(limit_s))
        began_s = time.time()
        record = launch.client("benchmarks.contestant", *arguments)
        accepted_s = sorted(accepted - record["began_s"] for accepted, _, _ in service.get("truth").values())
        throttled_s = [at_s - record["began_s"] for at_s in service.get("throttled")]
    assert record["began_s"] >= began_s  # noqa: S101 - the clocks of this machine agree
    return Run(
        name=name,
        jobs=jobs,
        done_s=sorted(at_s - record["began_s"] for at_s in record["noticed_s"].values()),
        errors=record["errors"],
        cpu_s=record["cpu_s"],
        connections=service.connections,
        accepted_s=accepted_s,
        throttled_s=throttled_s,
    )


def show(title: str, runs: list[Run]) -> None:
    """Print a table. Ratios are to the first row."""
    print(f"\n{title}")
    shares = f"{'half':>8}{'95 %':>8}{'all':>8}{'half':>7}{'all':>7}"
    print(f"{'client':28}{'done':>11}{shares}{'CPU s':>7}{'conns':>7}  raised")
    for run in runs:
        half_s, most_s, all_s = (run.share_s(share) for share in (0.5, 0.95, 1.0))
        ratios = [half_s / runs[0].share_s(0.5), all_s / runs[0].share_s(1.0)]
        errors = ", ".join(f"{count} {name}" for name, count in run.errors.items())
        print(
            f"{run.name:28}{f'{len(run.done_s)}/{run.jobs}':>11}{half_s:8.1f}{most_s:8.1f}{all_s:8.1f}"
            f"{ratios[0]:6.2f}x{ratios[1]:6.2f}x{run.cpu_s:7.1f}{run.connections:7}  {errors}",
            flush=True,
        )


def show_throttled(title: str, runs: list[Run]) -> None:
    """Print how much of the allowed rate was used, and what was throttled."""
    print(f"\n{title}")
    print(f"{'client':28}{'done':>11}{'all':>8}{'used':>7}{'429s':>7}{'429s after 10 s':>17}  raised")
    for run in runs:
        errors = ", ".join(f"{count} {name}" for name, count in run.errors.items())
        print(
            f"{run.name:28}{f'{len(run.done_s)}/{run.jobs}':>11}{run.share_s(1.0):8.1f}{run.used():7.0%}"
            f"{len(run.throttled_s):7}{run.late_throttles():17.1%}  {errors}",
            flush=True,
        )


def plot(runs: list[Run], path: str) -> None:
    """Draw when how many images were there."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "network"
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for run in runs:
        axes.plot([0, *run.done_s], range(len(run.done_s) + 1), label=run.name.replace("_", " "))
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--rtt", type=float, default=0.12, help="round trip, in seconds")
    parser.add_argument("--clients", nargs="*", choices=CLIENTS, default=["nanobanana_async_aiohttp", *_STOCK])
    parser.add_argument("--plot", metavar="FILE", help="draw an SVG of the first table")
    options = parser.parse_args()
    jobs, rtt_s = options.jobs, options.rtt
    names = ["nanobanana_async", "nanobanana_async_no_bound", *options.clients]
    runs = [measure(name, jobs, rtt_s) for name in names]
    show(f"{jobs} jobs, round trip {rtt_s * 1e3:g} ms, submits take {POST_S} s", runs)
    if options.plot:
        plot(runs, options.plot)
    faulty = measure("nanobanana_async", jobs, rtt_s, "--fail", "0.01", loss=0.01)
    show("One request in a hundred answered 503, one connection in a hundred reset", [runs[0], faulty])
    for title, states in (("with", ()), ("without", ("--no-retry-after",))):
        throttled = [
            measure(name, 400, rtt_s, "--allow", str(_ALLOWED_PER_S), *states)
            for name in ("nanobanana_async", *options.clients)
        ]
        show_throttled(f"400 jobs, {_ALLOWED_PER_S} submits per second allowed, {title} Retry-After", throttled)


if __name__ == "__main__":
    main()
