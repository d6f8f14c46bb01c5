"""The floor: consume, sign, POST with a minimal client, nothing else.

No decoding, routing, dedupe, ledger, retry, log, commit or timeout: what a hand-written program could save by doing
only this. The client reads answers by the rules of HTTP (`httptools`) and stops at the first that is no success.
Headgate with everything on is held against it.
"""

import asyncio
import base64
import hashlib
import ssl
import time
from collections import deque
from typing import Any, Final, cast

import httptools
import uvloop

from bench import source
from bench.source import Options

BATCH: Final = 2000
IDLE_S: Final = 0.002
KEY: Final = b"k" * 32


class Signer:
    """HMAC-SHA256 from kept pads: half the cost of `hmac.digest`."""

    def __init__(self, key: bytes) -> None:
        block = key.ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def sign(self, content: bytes) -> bytes:
        inner = self._inner.copy()
        inner.update(content)
        outer = self._outer.copy()
        outer.update(inner.digest())
        return base64.b64encode(outer.digest())


class Pump:
    """Hands waiting messages to free connections."""

    def __init__(self, options: Options) -> None:
        self.waiting: deque[Any] = deque()
        self.free: list[Connection] = []
        self.signers: dict[bytes, Signer] = {}
        self.host = f"{options.host}:{options.port}".encode()

    def request(self, message: Any) -> bytes:
        tenant: bytes = message.key()
        signer = self.signers.get(tenant)
        if signer is None:
            signer = self.signers[tenant] = Signer(KEY)
        body: bytes = message.value()
        delivery = b"flr_%d_%d" % (message.partition(), message.offset())
        stamp = b"%d" % time.time()
        signature = signer.sign(b"%b.%b.%b" % (delivery, stamp, body))
        return (
            b"POST /%b HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\nuser-agent: floor\r\n"
            b"webhook-id: %b\r\nwebhook-timestamp: %b\r\nwebhook-signature: v1,%b\r\ncontent-length: %d\r\n\r\n%b"
            % (tenant, self.host, delivery, stamp, signature, len(body), body)
        )

    def feed(self) -> None:
        while self.waiting and self.free:
            self.free.pop().send(self.request(self.waiting.popleft()))


class Connection(asyncio.Protocol):
    def __init__(self, pump: Pump) -> None:
        self._pump = pump
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.send = self._transport.write
        self._pump.free.append(self)
        self._pump.feed()

    def data_received(self, data: bytes) -> None:
        self._feed(data)

    def on_message_complete(self) -> None:
        parser = self._parser
        if not 200 <= (status := parser.get_status_code()) < 300 or not parser.should_keep_alive():
            raise ValueError(f"the receiver answered {status}")
        pump = self._pump
        if pump.waiting:
            self.send(pump.request(pump.waiting.popleft()))
        else:
            pump.free.append(self)


async def deliver(options: Options) -> None:
    loop = asyncio.get_running_loop()
    tls = ssl.create_default_context(cafile=options.ca) if options.ca else None
    pump = Pump(options)
    for _ in range(options.in_flight):
        await loop.create_connection(lambda: Connection(pump), options.host, options.port, ssl=tls)
    consumer = source.consumer(options, "bench-floor")
    while True:
        if len(pump.waiting) < BATCH and (messages := consumer.consume(BATCH, 0)):
            pump.waiting.extend(messages)
            pump.feed()
        await asyncio.sleep(IDLE_S)


if __name__ == "__main__":
    uvloop.run(deliver(source.options("Consume, sign, POST with a minimal client, nothing else.")))
