"""What a row to a BigQuery destination costs, from the delivery in memory to the answer, and where the time goes.

`python -m bench.bigquery_sink`: 1 KB events by `deliver`, to a far side in another process that counts the rows of each
request and answers as BigQuery does, but keeps none. Counted is the CPU of this process alone. Beside it, the floor:
the same rows, encoded beforehand, by gRPC alone.
"""

import argparse
import cProfile
import json
import multiprocessing
import pstats
from collections.abc import Awaitable, Callable, Iterator
from concurrent import futures
from multiprocessing.connection import Connection
from resource import RUSAGE_SELF, getrusage
from typing import Any, Final

import grpc
import uvloop
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.cloud.bigquery_storage_v1 import types
from msgspec import Raw

from config.settings import BigQueryPlace, BigQuerySettings
from connectors.bigquery import encode
from connectors.bigquery.connector import connect
from connectors.bigquery.options import Options, Secrets
from connectors.bigquery.storage import Key, Storage
from connectors.contract import Batch, Span
from connectors.egress import Egress
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, ExternalId, TenantRef, Vendor

ACME: Final = TenantRef(Vendor("default"), ExternalId("acme"))
SINK: Final = DestinationId("sink")
BATCH: Final = 8192
SERVICE: Final = "google.cloud.bigquery.storage.v1.BigQueryWrite"
STREAM: Final = "projects/p/datasets/d/tables/t/streams/s"

_Append: Final = types.AppendRowsRequest.pb()
_Appended: Final = types.AppendRowsResponse.pb()


def _create(asked: bytes, context: Any) -> bytes:
    stream: bytes = types.WriteStream.pb()(name=STREAM).SerializeToString()
    return stream


def _append(asked: Iterator[bytes], context: Any) -> Iterator[bytes]:
    for content in asked:
        request = _Append.FromString(content)
        assert len(request.proto_rows.rows.serialized_rows) > 0
        answer = _Appended()
        answer.append_result.offset.value = request.offset.value
        yield answer.SerializeToString()


def serve(told: Connection) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    handlers = {
        "CreateWriteStream": grpc.unary_unary_rpc_method_handler(_create),
        "AppendRows": grpc.stream_stream_rpc_method_handler(_append),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    told.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    told.recv()
    server.stop(0)


def deliveries(count: int) -> tuple[Delivery, ...]:
    payload = Raw(b'{"text":"' + bytes(range(97, 123)) * 35 + b'"}')
    return tuple(
        Delivery(
            ACME,
            SINK,
            DeliveryId(f"dlv_{number:026}"),
            Event("invoice.paid", payload, f"evt_{number}", "2026-11-21T09:30:00Z", "acme", 1, "", "", f"inv_{number}"),
            "t/0/0",
            1_790_000_000_000,
            1024,
        )
        for number in range(count)
    )


def service_account() -> str:
    pem = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"client_email": "headgate@acme.example", "private_key_id": "1", "private_key": pem.decode()}
    return json.dumps({"type": "service_account", **account})


async def by_deliver(place: BigQueryPlace, key: str, every: tuple[Delivery, ...], layout: str) -> float:
    """As the stage does: batch after batch."""
    options = Options.model_validate({"project": "acme-bench", "dataset": "d", "layout": layout})
    egress = Egress(bigquery=BigQuerySettings(place))
    connector = connect(ACME, SINK, options, Secrets.model_validate({"service_account": key}), egress)
    await connector.deliver(Batch(ACME, SINK, 0, Span("t", 0, 0, 0), every[:1]))
    begun = _cpu_s()
    for at in range(0, len(every), BATCH):
        outcomes = await connector.deliver(Batch(ACME, SINK, 0, Span("t", 0, at, at), every[at : at + BATCH]))
        assert {outcome.verdict for outcome in outcomes.values()} == {"delivered"}, next(iter(outcomes.values()))
    spent = _cpu_s() - begun
    await connector.close()
    return spent


async def by_grpc(place: BigQueryPlace, key: str, every: tuple[Delivery, ...], layout: str) -> float:
    """The floor: rows that are made already, to one stream."""
    account = Secrets.model_validate({"service_account": key}).account
    assert account is not None
    storage = Storage(BigQuerySettings(place), "acme-bench", "d", Key(account))
    rows = [made for delivery in every if isinstance(made := encode.row(delivery), bytes)]
    await storage.append(STREAM, 0, rows[:1], 10)
    begun = _cpu_s()
    for at in range(0, len(rows), BATCH):
        assert (await storage.append(STREAM, at, rows[at : at + BATCH], 60)).usable
    spent = _cpu_s() - begun
    await storage.close()
    return spent


async def by_encoding(place: BigQueryPlace, key: str, every: tuple[Delivery, ...], layout: str) -> float:
    begun = _cpu_s()
    for delivery in every:
        encode.row(delivery)
    return _cpu_s() - begun


def _cpu_s() -> float:
    spent = getrusage(RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


Way = Callable[[BigQueryPlace, str, tuple[Delivery, ...], str], Awaitable[float]]
WAYS: Final[dict[str, Way]] = {"deliver": by_deliver, "gRPC alone": by_grpc, "encoding alone": by_encoding}


async def measure(place: BigQueryPlace, count: int, rounds: int, layout: str) -> None:
    every, key = deliveries(count), service_account()
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            found[name].append(count / await way(place, key, every, layout))
    for name, speeds in found.items():
        speed = sorted(speeds)[len(speeds) // 2]
        print(f"{name}: {speed:,.0f} rows per CPU-second, {1e6 / speed:.1f} us each")


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("-n", type=int, default=80_000, help="rows a round")
    parse.add_argument("--rounds", type=int, default=3)
    parse.add_argument("--layout", choices=("wide", "per_type"), default="wide")
    parse.add_argument("--profile", action="store_true", help="where the time of `deliver` goes")
    given = parse.parse_args()
    # fresh, not a copy of this process: gRPC does not live through a fork
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    far = context.Process(target=serve, args=(theirs,), daemon=True)
    far.start()
    try:
        place = BigQueryPlace("http://127.0.0.1:9", f"127.0.0.1:{ours.recv()}")
        if given.profile:
            profile = cProfile.Profile()
            profile.runcall(uvloop.run, by_deliver(place, service_account(), deliveries(given.n), given.layout))
            pstats.Stats(profile).sort_stats("tottime").print_stats(14)
        else:
            uvloop.run(measure(place, given.n, given.rounds, given.layout))
    finally:
        ours.send("end")
        far.join(5)


if __name__ == "__main__":
    main()
