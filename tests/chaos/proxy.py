"""A small proxy before the object store that delays, cuts, stalls, or answers in its place."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from dataclasses import dataclass

LIFE_SECONDS = 0.3
"""How long a connection lives while the proxy is flaky, so that faults are drawn again and again."""


@dataclass(frozen=True, slots=True)
class Mood:
    """What the proxy does with a new connection. `status` and `cut` hold for a `share` of them."""

    delay: float = 0.0
    status: int | None = None
    cut: bool = False
    stall: bool = False
    share: float = 1.0


WELL = Mood()


class Proxy:
    """Listens on a port of its own. A change of mood closes every connection. Thread-safe."""

    def __init__(self, port: int, *, seed: int = 0) -> None:
        self._target = port
        self._mood = WELL
        self.misbehaved = False
        """Whether it ever was anything but well; set back by who asks."""
        self._random = random.Random(seed)
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.port = 0
        threading.Thread(target=self._serve, name="chaos-proxy", daemon=True).start()
        self._ready.wait()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def behave(self, mood: Mood) -> None:
        """From now on, and with no connection of before."""
        self._mood = mood
        self.misbehaved = self.misbehaved or mood != WELL
        self._loop.call_soon_threadsafe(self._cut_all)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _cut_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                await self._treat(self._mood, reader, writer)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _treat(self, mood: Mood, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        faulty = (mood.status or mood.cut or mood.stall) and self._random.random() < mood.share
        if not faulty:
            return await self._pass_on(mood, reader, writer)
        await reader.readuntil(b"\r\n\r\n")
        if mood.stall:
            await asyncio.sleep(3600)
        if mood.status is not None:
            head = f"HTTP/1.1 {mood.status} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            await writer.drain()
        return None

    async def _pass_on(self, mood: Mood, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers.add(far_writer)
        ways = [
            asyncio.ensure_future(copy(reader, far_writer, mood.delay)),
            asyncio.ensure_future(copy(far_reader, writer, 0.0)),
        ]
        try:
            life = LIFE_SECONDS if mood.share < 1.0 else None
            await asyncio.wait(ways, timeout=life, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            self._writers.discard(far_writer)
            far_writer.close()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            if delay:
                await asyncio.sleep(delay)
            writer.write(data)
            await writer.drain()
