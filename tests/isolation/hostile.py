"""Far sides that mean harm: they answer for ever, slowly or all at once. `hostile()` runs them in a process of their
own, since what they cost must not delay the publisher beside them.
"""

import asyncio
import json
import sys
import zlib
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from tests.connectors.receiver import Peer, Receiver, Script

MIB: Final = 1 << 20
OK: Final = b"HTTP/1.1 200 OK\r\n"

# The codes that an attempt may end with.
CODES: Final[Mapping[str, str]] = {
    "slow-loris": "timeout",
    "slow-body": "ok timeout",
    "endless-headers": "headers_too_large",
    "endless-line": "headers_too_large",
    "endless-chunks": "ok",
    "gigabyte": "ok",
    "gzip-bomb": "ok",
}


@asynccontextmanager
async def hostile() -> AsyncIterator[Mapping[str, int]]:
    """The ports of those that `CODES` names."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.isolation.hostile", stdin=PIPE, stdout=PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        yield json.loads(await process.stdout.readline())
    finally:
        process.kill()
        await process.wait()


def _forever(head: bytes, more: bytes, pause_s: float = 0.0) -> Script:
    """Answers each request with `head` and then `more`, again and again, until the other side is gone."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(head)
            while True:
                await peer.send(more)
                if pause_s:
                    await asyncio.sleep(pause_s)

    return script


def _once(answer: bytes) -> Script:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(answer)

    return script


def _bomb() -> bytes:
    """Gzip of 1 GiB of zeros: 1 MiB. Each of its parts unpacks by itself, so that one is made and repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + part * 1024 + b"\x03\x00" + bytes(8)


def _scripts() -> Mapping[str, Script]:
    bomb = _bomb()
    return {
        "slow-loris": _forever(OK + b"x-more: ", b"y", 0.2),
        "slow-body": _forever(OK + b"content-length: 1000\r\n\r\n", b"x", 0.2),
        "endless-headers": _forever(OK, b"x-more: " + b"y" * 1000 + b"\r\n"),
        "endless-line": _forever(OK + b"x-more: ", b"y" * 1000),
        "endless-chunks": _forever(OK + b"transfer-encoding: chunked\r\n\r\n", b"3e8\r\n" + b"z" * 1000 + b"\r\n"),
        "gigabyte": _forever(OK + b"content-length: 1073741824\r\n\r\n", bytes(65536)),
        "gzip-bomb": _once(OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb) + bomb),
    }


async def _serve() -> None:
    """Until stdin ends."""
    async with AsyncExitStack() as open_:
        receivers = {name: await open_.enter_async_context(Receiver(script)) for name, script in _scripts().items()}
        print(json.dumps({name: receiver.port for name, receiver in receivers.items()}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve())
