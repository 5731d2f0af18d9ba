"""The measured client of `downloads.py`. It runs with any checkout of this package.

    python downloader.py URL IMAGES FOLDER TRANSPORT

Prints one JSON object.
"""

import asyncio
import json
import sys
import time

import nanobanana_async
from nanobanana_async import NanoBananaClient


async def run(url: str, images: int, folder: str, transport: str) -> dict[str, float]:
    """Make one task, then save its image so many times, under different names."""
    sender = nanobanana_async.AiohttpTransport() if transport == "aiohttp" else None
    async with NanoBananaClient("dk-test", base_url=url, transport=sender) as client:
        task = await client.generate("a fox")
        cpu_s, wall_s = time.process_time(), time.monotonic()
        saved = await asyncio.gather(*(client.save(task, folder, name=f"image-{number}") for number in range(images)))
        took_s, used_s = time.monotonic() - wall_s, time.process_time() - cpu_s
    return {"saved": sum(map(len, saved)), "took_s": took_s, "cpu_s": used_s}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]))))
