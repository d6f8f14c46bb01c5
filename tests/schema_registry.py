"""A small schema registry that speaks Confluent's API on a real socket, and misbehaves on command.

Also a producer's half: `record` is a value in the Confluent wire format, written by fastavro.
"""

import asyncio
import io
import json
import ssl
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal

import fastavro

Mode = Literal["up", "500", "garbled", "no http", "endless", "redirects", "closes", "hangs"]


def record(number: int, schema: Any, value: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), value, strict_allow_default=True)
    return b"\x00" + number.to_bytes(4, "big") + out.getvalue()


class FarRegistry:
    """`async with FarRegistry() as registry`. `asked` are the paths of the requests that came."""

    def __init__(self, *, user: str = "", password: str = "", tls: ssl.SSLContext | None = None) -> None:
        self.mode: Mode = "up"
        self.asked: list[str] = []
        self.port = 0
        self._tls = tls
        self._token = f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}" if user else ""
        self._schemas: dict[int, dict[str, Any]] = {}
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[Any]] = set()
        self._asked_more = asyncio.Event()

    async def __aenter__(self) -> "FarRegistry":
        await self.come()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, fault: Any, trace: TracebackType | None) -> None:
        await self.go()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://localhost:{self.port}"

    def register(self, schema: Any, **more: Any) -> int:
        """A schema as JSON, or as any text; its id. `more` of the answer: schemaType, references."""
        number = len(self._schemas) + 1
        self._schemas[number] = {"schema": schema if isinstance(schema, str) else json.dumps(schema), **more}
        return number

    async def questions(self, count: int) -> None:
        """Waits until so many were asked."""
        async with asyncio.timeout(30):
            while len(self.asked) < count:
                self._asked_more.clear()
                await self._asked_more.wait()

    async def come(self) -> None:
        self._server = await asyncio.start_server(self._serve, "localhost", self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def go(self) -> None:
        """Nobody listens any more, and open connections are cut."""
        assert self._server is not None
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._answer(reader, writer):
                    pass
        finally:
            self._open.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ", 2)[1]
        self.asked.append(path)
        self._asked_more.set()
        match self.mode:
            case "closes":
                return False
            case "hangs":
                await asyncio.Event().wait()
            case "no http":
                writer.write(b"220 mail.example ESMTP\r\n")
                return False
            case "garbled":
                writer.write(_http(200, b'{"schema": 7}'))
            case "500":
                writer.write(_http(500, b'{"error_code": 50001, "message": "Error in the backend data store"}'))
            case "redirects":
                writer.write(_http(302, b"", f"location: {self.url}{path}\r\n"))
            case "endless":
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                while True:
                    writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                    await writer.drain()
            case "up":
                authorized = not self._token or f"authorization: {self._token}".lower() in head.lower()
                writer.write(self._found(path) if authorized else _http(401, b'{"error_code": 40101}'))
        await writer.drain()
        return True

    def _found(self, path: str) -> bytes:
        if path == "/schemas/types":
            return _http(200, b'["JSON", "PROTOBUF", "AVRO"]')
        number = path.removeprefix("/schemas/ids/")
        if number.isdecimal() and int(number) in self._schemas:
            return _http(200, json.dumps(self._schemas[int(number)]).encode())
        return _http(404, b'{"error_code": 40403, "message": "Schema %b not found"}' % number.encode())


def _http(status: int, body: bytes, more: str = "") -> bytes:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/vnd.schemaregistry.v1+json\r\n"
    return f"{head}{more}content-length: {len(body)}\r\n\r\n".encode() + body
