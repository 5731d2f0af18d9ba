"""Large reference images: memory and stalls of many submits at once.

    python -m benchmarks.references [--submits 256] [--transports httpx aiohttp]

Each submit has four references of 10 MiB, which are files. The server runs in a process of its own, on loopback.
"""

import argparse
import asyncio
import json
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Final

from benchmarks import launch
from benchmarks.stall import StallMeter
from nanobanana_async import AiohttpTransport, NanoBananaClient, Timeouts
from nanobanana_async.simulator.in_memory import tiny_png
from nanobanana_async.simulator.specs import ImageSpec

_BYTES: Final = 10 * 2**20 - 1000


def padded_png(path: Path) -> Path:
    """Write a PNG of 10 MiB that does not compress."""
    image = tiny_png(ImageSpec(prompt="a fox", width=64, height=64))
    noise = b"ruNd" + random.Random(1).randbytes(_BYTES)
    path.write_bytes(
        image[:-12] + struct.pack(">I", _BYTES) + noise + struct.pack(">I", zlib.crc32(noise)) + image[-12:]
    )
    return path


async def submit_all(url: str, submits: int, images: list[Path], transport: str) -> dict[str, float]:
    """Submit at once, and return what it took."""
    sender = AiohttpTransport() if transport == "aiohttp" else None
    timeouts = Timeouts(submit_s=600, task_s=1200)
    async with NanoBananaClient("dk-test", base_url=url, transport=sender, timeouts=timeouts) as client:
        began_s = time.perf_counter()
        handles = await asyncio.gather(*(client.submit(f"fox {number}", images=images) for number in range(submits)))
        took_s = time.perf_counter() - began_s
    rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"accepted": len(handles), "took_s": took_s, "rss_mib": rss_mib}


def main() -> None:
    """Parse the options, measure each transport in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--submits", type=int, default=256)
    parser.add_argument("--transports", nargs="*", default=["httpx", "aiohttp"])
    options = parser.parse_args()
    for transport in options.transports:
        with tempfile.TemporaryDirectory() as folder, launch.server("--latency", "1") as port:
            for number in range(4):
                padded_png(Path(folder, f"{number}.png"))
            found = launch.client(
                "benchmarks.references", f"http://127.0.0.1:{port}", str(options.submits), folder, transport
            )
        print(
            f"{transport:8} {found['accepted']:.0f} of {options.submits} accepted in {found['took_s']:.1f} s, "
            f"longest stall {found['stall_s'] * 1e3:.0f} ms, peak RSS {found['rss_mib']:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1].startswith("http"):  # the measured process
        url, submits, folder, transport = sys.argv[1:]
        images = sorted(Path(folder).glob("*.png"))
        meter = StallMeter()
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(meter)) as runner:
            record = runner.run(submit_all(url, int(submits), images, transport))
        print(json.dumps({**record, "stall_s": meter.longest_s}))
    else:
        main()
