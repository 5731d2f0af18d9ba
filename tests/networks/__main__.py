"""Run one case inside a network namespace, and print what became of it as JSON. See `tests/test_networks.py`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import anyio
import attrs

from nanobanana_async import HttpxTransport, NanoBananaClient, NanoBananaError, PollPolicy, RetryPolicy, Timeouts
from tests.fakes import PNG

_PORT: Final = 8787
_FILES: Final = f"http://files.test:{_PORT}/fox.png"


@attrs.frozen(kw_only=True)
class Case:
    """Addresses of this machine, what the names lead to, and where the image is."""

    addresses: tuple[str, ...]
    service: str
    files: tuple[str, ...]
    image: str = _FILES
    is_checked: bool = True


PUBLIC: Final = "93.184.216.34"
CASES: Final = {
    "fake-ip": Case(addresses=("198.18.0.5",), service="198.18.0.5", files=("198.18.0.5",)),
    "fake-ip-as-a-literal": Case(
        addresses=("198.18.0.5",), service="198.18.0.5", files=(), image=f"http://198.18.0.5:{_PORT}/fox.png"
    ),
    "fake-ip-only-for-images": Case(addresses=("198.18.0.5", PUBLIC), service=PUBLIC, files=("198.18.0.5",)),
    "fake-ip-inside-ipv6": Case(
        addresses=("64:ff9b::c612:5", "198.18.0.5"), service="198.18.0.5", files=("64:ff9b::c612:5",)
    ),
    "nat64": Case(addresses=("64:ff9b::5db8:d822", PUBLIC), service=PUBLIC, files=("64:ff9b::5db8:d822",)),
    "nat64-to-a-private-network": Case(addresses=("64:ff9b::a00:1", PUBLIC), service=PUBLIC, files=("64:ff9b::a00:1",)),
    "private-images": Case(addresses=("10.0.0.9", PUBLIC), service=PUBLIC, files=("10.0.0.9",)),
    "private-images-unchecked": Case(
        addresses=("10.0.0.9", PUBLIC), service=PUBLIC, files=("10.0.0.9",), is_checked=False
    ),
    "dead-ipv6": Case(addresses=("2606:4700::1111", PUBLIC), service=PUBLIC, files=("2606:4700::1111", PUBLIC)),
    "two-dead-ipv6": Case(
        addresses=("2606:4700::1111", "2606:4700::1112", PUBLIC),
        service=PUBLIC,
        files=("2606:4700::1111", "2606:4700::1112", PUBLIC),
    ),
    "closed-ipv6": Case(addresses=(PUBLIC,), service=PUBLIC, files=("2606:4700::9999", PUBLIC)),
}


class _Service(BaseHTTPRequestHandler):
    """The service and its file host."""

    image: str = _FILES

    def do_POST(self) -> None:
        """Accept a submit."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send({"task_id": "ta-1"})

    def do_GET(self) -> None:
        """Return a finished task, or its image."""
        if self.path.startswith("/fox.png"):
            self._reply(PNG)
        else:
            self._send({"task_id": "ta-1", "status": "success", "result": [{"image": self.image}], "consumed": "0.5"})

    def _send(self, data: object) -> None:
        self._reply(json.dumps({"code": 0, "message": "ok", "data": data}).encode())

    def _reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class _Server(ThreadingHTTPServer):
    def __init__(self, address: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, _PORT), _Service)


def _set_up(case: Case) -> None:
    """Give this namespace its addresses and names."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for address in case.addresses:
        prefix = "/128" if ":" in address else "/32"
        subprocess.run(["ip", "addr", "add", address + prefix, "dev", "lo"], check=True)
    lines = [
        "127.0.0.1 localhost",
        f"{case.service} service.test",
        *(f"{address} files.test" for address in case.files),
    ]
    hosts = Path(os.environ["HOSTS_FILE"])
    hosts.write_text("\n".join(lines) + "\n")
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)


@contextlib.contextmanager
def _dead(address: str) -> Iterator[None]:
    """Let connections to *address* hang: its queue is full, and nothing takes from it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_INET6))
        listener.bind((address, _PORT))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket(socket.AF_INET6))
            waiting.settimeout(0)
            waiting.connect_ex((address, _PORT))
        yield


async def _generate(case: Case) -> dict[str, object]:
    """Generate one image and return what became of it."""
    transport = HttpxTransport(trust_env=False, check_addresses=case.is_checked)
    polling, retry = PollPolicy.fixed(0.5), RetryPolicy(attempts=1)
    async with NanoBananaClient(
        "dk-1", base_url=f"http://service.test:{_PORT}", transport=transport, polling=polling, retry=retry
    ) as client:
        task = await client.generate("a fox")
        began_s = time.monotonic()
        try:
            data = await client.download(task.images[0])
        except NanoBananaError as exc:
            return {"error": str(exc)}
        finally:
            await transport.aclose()
        return {"bytes": len(data), "seconds": time.monotonic() - began_s}


def _run_case(case: Case) -> dict[str, object]:
    _set_up(case)
    _Service.image = case.image
    with contextlib.ExitStack() as stack:
        for address in case.addresses:
            if address.startswith("2606:"):
                stack.enter_context(_dead(address))
                continue
            server = stack.enter_context(_Server(address))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
        return anyio.run(_generate, case)


# --- proxies ---------------------------------------------------------------------------------------------------------


def _hang(peer: socket.socket) -> None:
    time.sleep(3)


def _drop(peer: socket.socket) -> None:
    peer.close()


def _lie(peer: socket.socket) -> None:
    peer.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    time.sleep(3)


def _refuse(peer: socket.socket) -> None:
    peer.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")


PROXIES: Final[dict[str, Callable[[socket.socket], None]]] = {
    "proxy-hangs": _hang,
    "proxy-drops": _drop,
    "proxy-lies": _lie,
    "proxy-refuses": _refuse,
}


def _run_proxy(behave: Callable[[socket.socket], None]) -> dict[str, object]:
    _set_up(Case(addresses=(), service=PUBLIC, files=()))
    listener = socket.create_server(("127.0.0.1", 3128))

    def serve() -> None:
        while True:
            peer, _ = listener.accept()
            peer.recv(65536)
            threading.Thread(target=behave, args=(peer,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return anyio.run(_submit_through_proxy)


async def _submit_through_proxy() -> dict[str, object]:
    transport = HttpxTransport(proxy="127.0.0.1:3128")
    timeouts, retry = Timeouts(connect_s=0.5, submit_s=1.5), RetryPolicy(attempts=1)
    async with NanoBananaClient(
        "dk-1", base_url="https://service.test", transport=transport, timeouts=timeouts, retry=retry
    ) as client:
        try:
            await client.submit("a fox")
        except NanoBananaError as exc:
            return {"error_type": type(exc).__name__, "error": str(exc)}
        finally:
            await transport.aclose()
    return {}


if __name__ == "__main__":
    name = sys.argv[1]
    record = _run_case(CASES[name]) if name in CASES else _run_proxy(PROXIES[name])
    print(json.dumps(record))
    sys.stdout.flush()
    os._exit(0)  # threads that hold connections open
