"""Images from one distant host: how many per second, and against another checkout of this package.

    python -m benchmarks.downloads [--images 500] [--bytes 2000000] [--rtt 0.12] [--against FOLDER]

The server speaks TLS in a process of its own, behind a proxy that adds a round trip. The images are saved to a
temporary folder, as fast as the default settings allow.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import launch
from benchmarks.network import Distant, distant


def download(checkout: Path, service: Distant, images: int, transport: str) -> dict[str, Any]:
    """Run the downloads with the package in *checkout*, and return the record."""
    script = Path(__file__).with_name("downloader.py")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(script), service.url, str(images), folder, transport],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(checkout), "SSL_CERT_FILE": service.certificate},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--bytes", type=int, default=2_000_000, help="size of one image")
    parser.add_argument("--rtt", type=float, default=0.12, help="round trip, in seconds")
    parser.add_argument("--against", type=Path, help="folder with another checkout of this package")
    options = parser.parse_args()
    contestants = [("this checkout", launch.ROOT, "httpx"), ("  over aiohttp", launch.ROOT, "aiohttp")]
    if options.against is not None:
        contestants.insert(0, (str(options.against), options.against.resolve(), "httpx"))
    print(f"{options.images} images of {options.bytes:,} bytes, round trip {options.rtt * 1e3:g} ms")
    first_s = 0.0
    for name, checkout, transport in contestants:
        with distant(options.rtt, "--latency", "0.01", "--image-bytes", str(options.bytes)) as service:
            record = download(checkout, service, options.images, transport)
        first_s = first_s or record["took_s"]
        print(
            f"{name:24} {record['saved']:5} in {record['took_s']:6.1f} s  {first_s / record['took_s']:5.2f}x"
            f"  CPU {record['cpu_s']:5.1f} s  {service.connections:5} connections",
            flush=True,
        )


if __name__ == "__main__":
    main()
