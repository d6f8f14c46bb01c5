"""What one webhook delivery costs through the connector: `python -m bench.http_client [--tls] [--unlike] [--tasks]`.

CPU of this process only, receiver in another: encode, sign, POST over a kept connection, classify. No Kafka, no Redis.
`--tasks` goes the way of `deliver`, a task and a time limit for each delivery, instead of `start` (ADR 0002).
`--unlike` has the receiver answer as large services do, no two answers alike; without it all are the same.
"""

import argparse
import asyncio
import multiprocessing
import socket
import ssl
import tempfile
import time
from ipaddress import ip_network
from multiprocessing.synchronize import Event as Ready
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import cast

import trustme
import uvloop
from msgspec import Raw

from connectors.contract import Batch
from connectors.egress import Egress
from connectors.webhook.connector import WebhookConnector, connect
from connectors.webhook.options import Options, Secrets, generate_secrets
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, ExternalId, TenantRef, Vendor
from schemas.outcome import Outcome

AT_MS = 1_790_000_000_000
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
UNLIKE = (
    b"HTTP/1.1 200 OK\r\nDate: Sat, 21 Nov 2026 09:30:00 GMT\r\nContent-Type: application/json\r\n"
    b"Content-Length: 15\r\nConnection: keep-alive\r\nX-Request-Id: %032d\r\n\r\n" + b'{"status":"ok"}'
)


class Receiver(asyncio.Protocol):
    """Counts whole requests by their length and answers each; reads nothing else of them."""

    unlike = False
    answered = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            at = self.buffer.rfind(b"content-length: ", 0, end)
            size = end + 4 + int(self.buffer[at + 16 : self.buffer.index(b"\r\n", at)])
            if len(self.buffer) < size:
                return
            self.buffer = self.buffer[size:]
            Receiver.answered += 1
            self.transport.write(UNLIKE % Receiver.answered if self.unlike else ANSWER)


def receive(listener: socket.socket, certificate: str | None, unlike: bool, ready: Ready) -> None:
    Receiver.unlike = unlike

    async def serve() -> None:
        context = None
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
        server = await asyncio.get_running_loop().create_server(Receiver, sock=listener, ssl=context)
        ready.set()
        await server.serve_forever()

    uvloop.run(serve())


class Run:
    """Keeps so many deliveries in flight as were started, until all wanted ones have ended."""

    def __init__(self, connectors: list[WebhookConnector], deliveries: list[Delivery], wanted: int) -> None:
        self.connectors = connectors
        self.deliveries = deliveries
        self.wanted = wanted
        self.started = 0
        self.ended = 0
        self.failed = 0
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        number = self.started
        self.started += 1
        delivery = self.deliveries[number % len(self.deliveries)]
        self.begin(self.connectors[number % len(self.connectors)], delivery)

    def begin(self, connector: WebhookConnector, delivery: Delivery) -> None:
        connector.start(delivery, AT_MS, self.done)

    def done(self, outcome: Outcome) -> None:
        self.ended += 1
        if outcome.verdict != "delivered":
            self.failed += 1
        if self.started < self.wanted:
            self.start()
        elif self.ended == self.wanted:
            self.over.set_result(None)


class TaskRun(Run):
    """The same with a task, a time limit and a future for each delivery, as the kinds with batches are run."""

    def __init__(self, connectors: list[WebhookConnector], deliveries: list[Delivery], wanted: int) -> None:
        super().__init__(connectors, deliveries, wanted)
        self.tasks: set[asyncio.Task[None]] = set()

    def begin(self, connector: WebhookConnector, delivery: Delivery) -> None:
        task = asyncio.get_running_loop().create_task(self.deliver(connector, delivery))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def deliver(self, connector: WebhookConnector, delivery: Delivery) -> None:
        batch = Batch(delivery.tenant, delivery.destination, AT_MS, None, (delivery,))
        async with asyncio.timeout(connector.batching.timeout_s):
            outcomes = await connector.deliver(batch)
        self.done(outcomes[delivery.id])


async def measure(run_of: type[Run], url: str, ca_file: str | None, count: int, tenants: int, in_flight: int) -> None:
    egress = Egress([ip_network("127.0.0.0/8")], ca_file=ca_file)
    refs = [TenantRef(Vendor("default"), ExternalId(f"tenant-{i}")) for i in range(tenants)]
    connectors = [
        connect(ref, DestinationId("hook"), Options(url=url), Secrets.model_validate(generate_secrets()), egress)
        for ref in refs
    ]
    payload = Raw(b'{"text":"' + b"x" * 900 + b'"}')
    event = Event("invoice.paid", payload, "evt_1", "2026-11-21T09:30:00Z", "acme", 1, "evt_1")
    deliveries = [
        Delivery(refs[0], DestinationId("hook"), DeliveryId(f"dlv_{i:026}"), event, "t/0/0", 0, 1024)
        for i in range(100)
    ]
    for wanted in (min(count, 5_000), count):  # the first round connects and warms up
        opened = egress.http.opened
        run = run_of(connectors, deliveries, wanted)
        begun, wall = getrusage(RUSAGE_SELF), time.perf_counter()
        for _ in range(min(in_flight, wanted)):
            run.start()
        await run.over
        ended, wall = getrusage(RUSAGE_SELF), time.perf_counter() - wall
    opened = egress.http.opened - opened
    system = ended.ru_stime - begun.ru_stime
    cpu = ended.ru_utime - begun.ru_utime + system
    print(
        f"{url.partition(':')[0]}: {cpu / count * 1e6:.1f} us of CPU a delivery, {system / count * 1e6:.1f} "
        f"of them in the system, {count / cpu:,.0f} per CPU-second, {count / wall:,.0f}/s; {run.failed} failed, "
        f"{opened} connections opened, {1 - opened / count:.2%} reused"
    )
    egress.http.close()


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--tls", action="store_true")
    parse.add_argument("--tasks", action="store_true", help="a task for each delivery")
    parse.add_argument("--unlike", action="store_true", help="no two answers alike")
    parse.add_argument("-n", type=int, default=100_000, help="deliveries")
    parse.add_argument("--tenants", type=int, default=50)
    parse.add_argument("--in-flight", type=int, default=128)
    given = parse.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        ca_file = certificate = None
        if given.tls:
            authority = trustme.CA()
            ca_file, certificate = f"{folder}/ca.pem", f"{folder}/server.pem"
            authority.cert_pem.write_to_path(ca_file)
            authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
            Path(certificate).chmod(0o600)
        ready = multiprocessing.Event()
        receiver = multiprocessing.Process(
            target=receive, args=(listener, certificate, given.unlike, ready), daemon=True
        )
        receiver.start()
        ready.wait()
        url = f"{'https' if given.tls else 'http'}://127.0.0.1:{port}/in"
        uvloop.run(measure(TaskRun if given.tasks else Run, url, ca_file, given.n, given.tenants, given.in_flight))
        receiver.terminate()
        receiver.join()


if __name__ == "__main__":
    main()
