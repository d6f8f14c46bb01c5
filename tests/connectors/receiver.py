"""A far side on loopback that says exactly the bytes a test scripts, when it scripts them."""

import asyncio
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from msgspec import Struct

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Request(Struct, frozen=True):
    line: str
    headers: dict[str, str]
    body: bytes


class Peer:
    """One connection, seen from the far side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> Request:
        """The next whole request. Raises IncompleteReadError where the connection ends."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = head[:-4].split("\r\n")
        headers = {}
        for text in rest:
            name, _, value = text.partition(": ")
            headers[name.lower()] = value
        return Request(line, headers, await self.reader.readexactly(int(headers["content-length"])))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Closes with RST."""
        found: socket.socket = self.writer.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close(self) -> None:
        self.writer.close()

    async def gone(self) -> None:
        """Waits until the other side has closed; reads and drops what still comes."""
        while await self.reader.read(65536):
            pass


Script = Callable[[Peer], Awaitable[None]]


class Receiver:
    """Runs `script` for each connection; counts them; keeps the requests of scripts that hand them in."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self._script = script
        self._tls = tls
        self._port = port
        self._running: set[asyncio.Task[None]] = set()
        self._peers: set[Peer] = set()
        self.connections = 0
        self.requests: list[Request] = []
        self.problems: list[BaseException] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for peer in self._peers:
            peer.writer.transport.abort()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if kind is None and self.problems:
            raise self.problems[0]

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._play(Peer(reader, writer)))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _play(self, peer: Peer) -> None:
        self._peers.add(peer)
        try:
            await self._script(peer)
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass  # the client went away
        except AssertionError as problem:
            self.problems.append(problem)
        finally:
            self._peers.discard(peer)
            peer.writer.close()

    async def answer(self, peer: Peer, answer: bytes = OK) -> None:
        """A script: answers every request of the connection."""
        while True:
            self.requests.append(await peer.request())
            await peer.send(answer)


def answering(*answers: bytes) -> "Receiver":
    """A receiver that gives these answers in turn, over all connections; the last one for ever."""
    left = list(answers)

    async def script(peer: Peer) -> None:
        while True:
            receiver.requests.append(await peer.request())
            await peer.send(left.pop(0) if len(left) > 1 else left[0])

    receiver = Receiver(script)
    return receiver
