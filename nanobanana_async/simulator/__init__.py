"""A simulated service, for demos, benchmarks and tests.

`Simulator` works in memory. `SimulatorServer` listens on a port and needs the extra `simulator`, so import it from
`nanobanana_async.simulator.server`. pytest loads the fixtures `nanobanana_simulator` and `nanobanana_server` through an
entry point.
"""

from nanobanana_async.simulator.in_memory import FAST_LIMITS, FAST_POLLING, FAST_PROFILE, Simulator
from nanobanana_async.simulator.profile import SimulatorProfile
from nanobanana_async.simulator.service import Charge

__all__ = ["FAST_LIMITS", "FAST_POLLING", "FAST_PROFILE", "Charge", "Simulator", "SimulatorProfile"]
