"""A1, A4, B1: networks as users have them. Each case has a network namespace of its own, which needs root on Linux."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.networks.__main__ import CASES, PROXIES

_ROOT = Path(__file__).parent.parent
_NAMESPACE = ["unshare", "--net", "--mount"]


def _why_not() -> str | None:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "unshare and ip are not installed"
    tried = subprocess.run([*_NAMESPACE, "true"], capture_output=True, check=False)  # noqa: S603 - a fixed command
    return None if tried.returncode == 0 else "no permission to make a network namespace"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_why_not() is not None, reason=f"needs network namespaces: {_why_not()}"),
]


def result_of(name: str, folder: Path) -> dict[str, Any]:
    """Return what became of a case."""
    done = subprocess.run(  # noqa: S603 - our own command
        [*_NAMESPACE, sys.executable, "-m", "tests.networks", name],
        cwd=_ROOT,
        env={**os.environ, "HOSTS_FILE": str(folder / "hosts")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


_TAKEN = {"fake-ip", "fake-ip-inside-ipv6", "nat64", "private-images-unchecked"}
_DIALLED = {"dead-ipv6", "two-dead-ipv6", "closed-ipv6"}


@pytest.mark.parametrize("name", sorted(_TAKEN))
def test_a1_images_are_had_in_networks_that_rewrite_addresses(name: str, tmp_path: Path) -> None:
    """They were charged and refused, although `curl` gets them."""
    assert result_of(name, tmp_path).get("bytes", 0) > 0


@pytest.mark.parametrize("name", sorted(CASES.keys() - _TAKEN - _DIALLED))
def test_a1_what_leads_to_a_private_network_is_still_refused(name: str, tmp_path: Path) -> None:
    """The message names the way out."""
    error = result_of(name, tmp_path)["error"]
    assert "which is not a public address" in error
    assert "HttpxTransport(check_addresses=False)" in error


@pytest.mark.parametrize("name", sorted(_DIALLED))
def test_a4_an_address_family_that_does_not_work_costs_a_quarter_of_a_second(name: str, tmp_path: Path) -> None:
    """It took the whole timeout of a connection, ten seconds."""
    record = result_of(name, tmp_path)
    assert record["bytes"] > 0
    assert record["seconds"] < 2


@pytest.mark.parametrize("name", sorted(PROXIES))
def test_b1_a_proxy_that_fails_at_connect_has_passed_nothing_on(name: str, tmp_path: Path) -> None:
    """Nothing was charged, and no row has to be resolved by a person."""
    record = result_of(name, tmp_path)
    assert record["error_type"] == "NotSent", record
