"""How long the event loop is held up."""

import asyncio
import time
from typing import Final

TICK_S: Final = 0.02


class StallMeter:
    """Sleeps for 20 ms again and again, and notes how much longer it took at the worst."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            before_s = time.perf_counter()
            await asyncio.sleep(TICK_S)
            self.longest_s = max(self.longest_s, time.perf_counter() - before_s - TICK_S)
