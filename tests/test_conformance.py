"""The fixture that audits the charges of every test can fail."""

import pytest

from nanobanana_async.simulator import Simulator
from tests.conformance import ChargeAudit

pytestmark = pytest.mark.anyio


async def test_an_undeclared_second_charge_is_found(audit: ChargeAudit, nanobanana_simulator: Simulator) -> None:
    """The audit notices a submit that is not reported to the caller."""
    async with nanobanana_simulator.client() as client:
        await client.submit("a fox")
    audit.check()
    audit.accepted.clear()
    with pytest.raises(AssertionError, match="1 undeclared charges"):
        audit.check()
    audit.declared = 1
    audit.check()


async def test_an_accepted_id_that_was_never_charged_is_found(
    audit: ChargeAudit, nanobanana_simulator: Simulator
) -> None:
    """The audit notices a client that invents ids."""
    async with nanobanana_simulator.client() as client:
        await client.submit("a fox")
    charges = nanobanana_simulator.service.charges
    charge = charges.pop()
    with pytest.raises(AssertionError, match="accepted 1 times, charged 0"):
        audit.check()
    charges.append(charge)
