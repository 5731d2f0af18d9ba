"""The service, played: for demos, for benchmarks, and for your own test-suite.

`Simulator` works in memory and needs nothing more; `SimulatorServer` listens on a real port and needs the extra
`simulator`, so it is imported from `nanobanana_async.simulator.server`. For pytest, load the fixtures with
`pytest_plugins = ["nanobanana_async.simulator.pytest_plugin"]`.
"""

from nanobanana_async.simulator.in_memory import FAST_LIMITS, FAST_POLLING, FAST_PROFILE, Simulator
from nanobanana_async.simulator.service import Charge, SimulatorProfile

__all__ = ["FAST_LIMITS", "FAST_POLLING", "FAST_PROFILE", "Charge", "Simulator", "SimulatorProfile"]
