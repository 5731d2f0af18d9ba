"""`Simulator`: the simulated service as a transport without sockets, in virtual or real time."""

import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Final

import anyio

from nanobanana_async.client import NanoBananaClient
from nanobanana_async.policies import Limits, PollPolicy, RegeneratePolicy, RetryPolicy, Timeouts
from nanobanana_async.protocols import ExchangeError, Phase, Transport, WireRequest, WireResponse
from nanobanana_async.simulator.profile import SimulatorProfile
from nanobanana_async.simulator.service import Charge, SimulatedService
from nanobanana_async.simulator.specs import ImageSpec

FAST_PROFILE: Final = SimulatorProfile(median_s=0.02, sigma=0.3, visibility_delay_s=0.0)
"""Images after a median of 0.02 s, for tests in real time."""
FAST_POLLING: Final = PollPolicy.backoff(first_poll_s=0.01, initial_s=0.01, multiplier=1.2, max_s=0.2)
FAST_LIMITS: Final = Limits(requests_per_s=10_000, burst=1_000)


class Simulator:
    """The simulated service in memory: a `Transport` for `NanoBananaClient(transport=...)`.

    Images are tiny but real PNGs. Time is that of the event loop, so it can be virtual.

    Args:
        profile: Behaviour of the service.
        seed: The same seed and the same calls give the same ids, latencies and errors.
        delay_s: Duration of every exchange.
    """

    def __init__(self, profile: SimulatorProfile = FAST_PROFILE, *, seed: int = 0, delay_s: float = 0.0) -> None:
        self.service: Final = SimulatedService(profile, seed=seed, now_s=anyio.current_time, render=tiny_png)
        self.delay_s = delay_s

    @property
    def charges(self) -> list[Charge]:
        """Every charge in order, to compare with what a program believes."""
        return self.service.charges

    def client(  # noqa: PLR0913 - the policies of a client
        self,
        *,
        limits: Limits = FAST_LIMITS,
        retry: RetryPolicy = RetryPolicy(),
        regenerate: RegeneratePolicy = RegeneratePolicy(),
        polling: PollPolicy = FAST_POLLING,
        timeouts: Timeouts = Timeouts(),
        wrap: Callable[[Transport], Transport] | None = None,
        api_key: str | None = None,
    ) -> NanoBananaClient:
        """Return a client of this service with poll intervals that fit `FAST_PROFILE`.

        *api_key* is one of the keys that the profile accepts; None uses the first.
        *wrap* gets the simulator and returns the transport of the client, which may change, fail or count requests.
        """
        transport = self if wrap is None else wrap(self)
        if transport is None:  # the client would use the network
            raise TypeError("wrap: expected a function that returns a Transport, got None from it")
        key = api_key or min(self.service.profile.keys)
        return NanoBananaClient(
            key,
            limits=limits,
            retry=retry,
            regenerate=regenerate,
            polling=polling,
            timeouts=timeouts,
            transport=transport,
        )

    async def send(self, request: WireRequest, *, timeout_s: float) -> WireResponse:
        """See `Transport.send`. The request arrives after half of `delay_s`."""
        with anyio.move_on_after(timeout_s):
            await anyio.sleep(self.delay_s / 2)
            headers = {name.lower(): value for name, value in request.headers.items()}
            simulated = self.service.handle(request.method, request.url, headers, request.body or b"")
            await anyio.sleep(self.delay_s / 2)
            response = WireResponse(
                status=simulated.status,
                headers={
                    "content-type": simulated.media_type,
                    "content-length": str(len(simulated.body)),
                    **simulated.headers,
                },
                body=simulated.body,
            )
            if len(response.body) > request.max_bytes:
                raise ExchangeError("the body exceeds the limit", phase=Phase.RESPONSE, permanent=True)
            return response
        raise ExchangeError(f"no complete response within {timeout_s:.3g} s", phase=Phase.SEND)

    async def aclose(self) -> None:
        """Do nothing, because nothing needs to be closed."""


def tiny_png(spec: ImageSpec) -> bytes:
    """Return a PNG of the right size, in two colours that depend on the prompt. Needs no Pillow."""
    colours = struct.pack(">II", zlib.crc32(spec.prompt.encode()), zlib.crc32(spec.prompt[::-1].encode()))[:6]
    header = struct.pack(">IIBBBBB", spec.width, spec.height, 1, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", colours),
        _pixels(spec.width, spec.height, is_blank=spec.is_blank),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@lru_cache(64)
def _pixels(width: int, height: int, *, is_blank: bool) -> tuple[bytes, bytes]:
    row = bytes(1 + (width + 7) // 8) if is_blank else b"\0" + b"\x0f" * ((width + 7) // 8)
    return b"IDAT", zlib.compress(row * height)
