"""`nanobanana simulate`: the simulated service on a local port."""

import sys
import threading
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING

import click

from nanobanana_async.cli.runtime import exit_on_bind_error, print_json
from nanobanana_async.simulator.profile import SimulatorProfile

if TYPE_CHECKING:
    from nanobanana_async.simulator.server import SimulatorServer

_TEST_KEY = "dk-test"


@click.command()
@click.option("--port", default=8787, show_default=True, type=click.IntRange(0, 65535), help="0 selects a free port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--latency",
    "median_s",
    default=5.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Median latency of an image.",
)
@click.option(
    "--faults",
    default="",
    metavar="NAME=RATE,...",
    help="Pairs such as failed_tasks=0.05. The guide of the simulator lists the names.",
)
@click.option(
    "--balance", default=100_000.0, show_default=True, type=click.FloatRange(min=0), help="Credits in the account."
)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same ids, latencies and errors.")
@click.option("--key", default=_TEST_KEY, show_default=True, help="API key that is accepted.")
@click.option("--json", "as_json", is_flag=True, help="Print URL and key as one JSON object.")
@click.option("--until-eof", is_flag=True, hidden=True, help="Stop when stdin closes.")
def simulate(  # noqa: PLR0913 - one parameter per option
    *,
    port: int,
    host: str,
    median_s: float,
    faults: str,
    balance: float,
    seed: int,
    key: str,
    as_json: bool,
    until_eof: bool,
) -> None:
    """Run a simulated service on this machine: no key, no network, no cost."""
    settings = {"median_s": median_s, "visibility_delay_s": median_s / 20, "balance": Decimal(str(balance))}
    server = _make_server(faults, {**settings, "keys": frozenset({key})}, seed=seed, address=(host, port))
    if as_json:
        print_json({"url": server.url, "key": key})
    else:
        click.echo(f"simulator listening on {server.url} (press Ctrl-C to stop). To use it, run in another terminal:")
        click.echo(f'DEFAPI_BASE_URL={server.url} DEFAPI_API_KEY={key} nanobanana generate "a fox in snow" -o fox.png')
    sys.stdout.flush()
    if until_eof:
        threading.Thread(target=_stop_at_eof, args=(server,), daemon=True).start()
    try:
        server.run()
    except KeyboardInterrupt:  # uvicorn shuts down, then raises the signal again
        sys.exit(130)


def _make_server(
    faults: str, settings: Mapping[str, object], *, seed: int, address: tuple[str, int]
) -> "SimulatorServer":
    try:
        from nanobanana_async.simulator.server import SimulatorServer  # noqa: PLC0415 - needs an extra
    except ModuleNotFoundError as exc:
        sys.exit(f"nanobanana: simulate needs {exc.name}. In a clone, run: pip install '.[cli,simulator]'")
    try:
        profile = SimulatorProfile.from_faults(faults, **settings)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    with exit_on_bind_error(*address):
        return SimulatorServer(profile, seed=seed, host=address[0], port=address[1])


def _stop_at_eof(server: "SimulatorServer") -> None:
    sys.stdin.buffer.read()
    server.stop()
