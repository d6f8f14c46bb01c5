"""What an event to a batching kind, or to Kafka, costs on its whole way: from ingress to settled, in a real worker.

`python -m bench sinks`. The far sides are those of the kinds' own benchmarks, in processes of their own, which take
what they are sent and keep nothing. Counted is the worker's CPU, from when the events begin to come until its metrics
say that all are delivered.
"""

import multiprocessing
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from confluent_kafka.admin import AdminClient, NewTopic
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from bench import bigquery_sink, headgate, s3_sink
from bench import rig as bench
from bench.events import TENANTS, tenant_name
from bench.measures import Figure
from bench.rig import BenchError, Rig

BARS: Final = {"s3": 40_000, "bigquery": 25_000, "kafka": 25_000}
FLUSH: Final = "5s"
LOOK_S: Final = 1.0
STALL_S: Final = 120.0


@contextmanager
def _far_side(serve: Callable[..., None]) -> Iterator[int]:
    """The port that it serves on."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


@contextmanager
def _s3(rig: Rig) -> Iterator[tuple[Mapping[str, Any], Mapping[str, str]]]:
    with _far_side(s3_sink.serve) as port:
        options = {
            "bucket": "acme-events",
            "region": "eu-central-1",
            "endpoint": f"http://127.0.0.1:{port}",
            "path_style": True,
            "flush_interval": FLUSH,
        }
        secrets = {"access_key_id": {"value": "AKIA"}, "secret_access_key": {"value": "secret"}}
        yield {"type": "s3", "options": options, "secrets": secrets}, {}


@contextmanager
def _bigquery(rig: Rig) -> Iterator[tuple[Mapping[str, Any], Mapping[str, str]]]:
    with _far_side(bigquery_sink.serve) as port:
        options = {"project": "acme-bench", "dataset": "d", "flush_interval": FLUSH}
        secrets = {"service_account": {"value": bigquery_sink.service_account()}}
        env = {"HEADGATE_BIGQUERY_ENDPOINT": f"http://127.0.0.1:9,127.0.0.1:{port}"}
        yield {"type": "bigquery", "options": options, "secrets": secrets}, env


@contextmanager
def _kafka(rig: Rig) -> Iterator[tuple[Mapping[str, Any], Mapping[str, str]]]:
    topic = f"{rig.prefix}-sink"
    admin = AdminClient({"bootstrap.servers": rig.bootstrap})
    admin.create_topics([NewTopic(topic, 12, 1)])[topic].result(bench.ADMIN_TIMEOUT_S)
    limits = {"in_flight": 1000}
    yield (
        {"type": "kafka", "options": {"bootstrap": rig.bootstrap, "topic": topic, "tls": False}, "limits": limits},
        {},
    )


KINDS: Final = {"s3": _s3, "bigquery": _bigquery, "kafka": _kafka}


def measure(rig: Rig, count: int, rounds: int, say: Callable[[str], None]) -> list[Figure]:
    """Events per CPU-second of the worker, by kind; the rounds of the kinds interleave."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in KINDS:
            one = replace(rig, prefix=f"{rig.prefix}-{kind}-{number}")
            found[kind].append(_run(one, kind, count))
            say(f"{kind}: {found[kind][-1]:,.0f} events per CPU-second")
    return [
        Figure(f"ingress to settled: {kind}", "events/CPU-s", tuple(speeds), at_least=BARS[kind])
        for kind, speeds in found.items()
    ]


def _run(rig: Rig, kind: str, count: int) -> float:
    bench.make_topic(rig, rig.ingress)
    with KINDS[kind](rig) as (destination, more):
        env = {**headgate.environ(rig, tenants="pooled"), **more}
        headgate.apply(
            env,
            [
                {
                    "externalId": tenant_name(number),
                    "destinations": [{"id": "sink", **destination}],
                    "routes": [{"id": "all", "match": {"types": ["*"]}, "to": ["sink"]}],
                }
                for number in range(TENANTS)
            ],
        )
        with bench.running("headgate", headgate.WORKER, rig.folder, env, pinned=True) as pid:
            headgate.until_ready(env, pid)
            begun = bench.cpu_s(pid)
            bench.load(rig, kind, count)
            _until_delivered(int(env["HEADGATE_HTTP_PORT"]), count)
            return count / (bench.cpu_s(pid) - begun)


def _until_delivered(port: int, count: int) -> None:
    done, moved_at = 0.0, time.monotonic()
    while done < count:
        time.sleep(LOOK_S)
        now = _delivered(port)
        if now > done:
            done, moved_at = now, time.monotonic()
        elif time.monotonic() - moved_at > STALL_S:
            raise BenchError(f"{done:.0f} of {count} events were delivered, and no more for {STALL_S:.0f} s")


def _delivered(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "headgate_deliveries_total" and sample.labels["end"] == "delivered"
    )
