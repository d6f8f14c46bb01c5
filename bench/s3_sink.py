"""What an event to an S3 destination costs, from memory to the store's answer.

`python -m bench.s3_sink`: 1 KB events in batches of 10,000 to a store in another process, that reads and answers.
Counted is the CPU of this process alone, its threads included. `--pretty`: payloads with white space between tokens.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
from collections.abc import Iterator
from ipaddress import ip_network
from multiprocessing.connection import Connection
from resource import RUSAGE_SELF, getrusage
from typing import Final

import uvloop
from msgspec import Raw

from connectors.contract import Batch, Span
from connectors.egress import Egress
from connectors.s3 import encode
from connectors.s3.connector import S3Connector, connect
from connectors.s3.encode import Squeezer
from connectors.s3.options import Options, Secrets
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, ExternalId, TenantRef, Vendor

ACME: Final = TenantRef(Vendor("default"), ExternalId("acme"))
LAKE: Final = DestinationId("lake")
BATCH: Final = 10_000
BAR: Final = 100_000


def deliveries(count: int, types: int, pretty: bool) -> tuple[Delivery, ...]:
    """Of 1 KB, as orders look: names of fields that repeat, and values that do not."""
    dice = random.Random(7)
    made = []
    for number in range(count):
        payload = {
            "order": f"ord_{dice.getrandbits(64):016x}",
            "customer": {"id": dice.randrange(10**6), "email": f"user{dice.randrange(10**6)}@example.com"},
            "lines": [
                {
                    "sku": f"sku-{dice.randrange(10**5)}",
                    "quantity": dice.randrange(9),
                    "price": dice.randrange(9999) / 100,
                }
                for _ in range(14)
            ],
            "note": f"{dice.getrandbits(256):064x}",
        }
        separators = (", ", ": ") if pretty else (",", ":")
        event = Event(
            f"order.{number % types}", Raw(json.dumps(payload, separators=separators).encode()), f"evt_{number}",
            "2026-11-21T09:30:00Z", "acme", 1, "", "shop",
        )  # fmt: skip
        size = len(bytes(event.payload)) + 300
        made.append(Delivery(ACME, LAKE, DeliveryId(f"dlv_{number:026}"), event, "t/0/0", 1_795_512_600_000, size))
    return tuple(made)


def serve(told: Connection) -> None:
    """A store that reads what it is sent, and says that it has it."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
                # what is not compressed goes in parts
                body = b"<R><UploadId>u</UploadId></R>" if head.startswith(b"post") else b""
                writer.write(b'HTTP/1.1 200 OK\r\netag: "x"\r\ncontent-length: %d\r\n\r\n%b' % (len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(one, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


async def sent(connector: S3Connector, batches: list[Batch]) -> float:
    """CPU seconds, of as many batches at once as the pipeline has under way."""
    begun = _cpu_s()
    waiting = iter(batches)

    async def work() -> None:
        for batch in waiting:
            outcomes = await connector.deliver(batch)
            assert {outcome.verdict for outcome in outcomes.values()} == {"delivered"}, next(iter(outcomes.values()))

    await asyncio.gather(*(work() for _ in range(connector.batching.max_in_flight)))
    return _cpu_s() - begun


async def measure(port: int, every: tuple[Delivery, ...], compression: str, rounds: int) -> None:
    egress = Egress([ip_network("127.0.0.0/8")])
    options = Options.model_validate(
        {
            "bucket": "acme-events",
            "region": "eu-central-1",
            "endpoint": f"http://127.0.0.1:{port}",
            "path_style": True,
            "compression": compression,
        }
    )
    secrets = Secrets.model_validate({"access_key_id": "AKIA", "secret_access_key": "secret"})
    connector = connect(ACME, LAKE, options, secrets, egress)
    batches = list(_batches(every))
    await sent(connector, batches[:1])  # botocore's models, the connections
    speeds = sorted([len(every) / await sent(connector, batches) for _ in range(rounds)])
    middle = speeds[len(speeds) // 2]
    await connector.close()
    egress.close()
    print(f"deliver(), {compression}: {middle:,.0f} events per CPU-second, {1e6 / middle:.1f} us each")


def _batches(every: tuple[Delivery, ...]) -> Iterator[Batch]:
    for first in range(0, len(every), BATCH):
        some = every[first : first + BATCH]
        yield Batch(ACME, LAKE, 0, Span("cluster/topic", 0, first, first + len(some) - 1), some)


def parts(every: tuple[Delivery, ...], compression: str) -> None:
    """Where it goes."""
    begun = _cpu_s()
    lines = list(encode.slices(list(every)))
    made = _cpu_s()
    squeezer = Squeezer(compression)
    content = squeezer.end(b"".join(lines))
    ended = _cpu_s()
    size = sum(map(len, lines))
    of_lines, of_bytes = (1e6 * spent / len(every) for spent in (made - begun, ended - made))
    print(f"  of which lines {of_lines:.1f} us, {compression} {of_bytes:.1f} us", end=" ")
    print(f"({size / len(every):.0f} bytes a line, {len(content) / size:.2f} of it stored)")


def _cpu_s() -> float:
    spent = getrusage(RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("-n", type=int, default=100_000, help="events a round")
    parse.add_argument("--rounds", type=int, default=5)
    parse.add_argument("--types", type=int, default=1, help="of events, each with an object of its own in every batch")
    parse.add_argument("--pretty", action="store_true")
    given = parse.parse_args()
    ours, theirs = multiprocessing.Pipe()
    store = multiprocessing.Process(target=serve, args=(theirs,), daemon=True)
    store.start()
    port = ours.recv()
    every = deliveries(given.n, given.types, given.pretty)
    for compression in ("gzip", "zstd", "none"):
        uvloop.run(measure(port, every, compression, given.rounds))
        parts(every[:20_000], compression)
    print(f"the bar: {BAR:,} with gzip")
    store.terminate()


if __name__ == "__main__":
    main()
