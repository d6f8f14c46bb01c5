"""The events of the benchmarks: 1 KB of JSON each, 50 tenants in turn, and a producer that puts them into a topic."""

import threading
import time
from typing import Final

from confluent_kafka import Producer

TENANTS: Final = 50
EVENT_BYTES: Final = 1024
_PRODUCE_POLL_EVERY: Final = 1000


def tenant_name(number: int) -> str:
    return f"tenant-{number:02d}"


def event(run: str, number: int) -> tuple[str, bytes]:
    """Key and value of one event; `run` keeps the ids of different runs apart."""
    tenant = tenant_name(number % TENANTS)
    head = (
        f'{{"eventId":"evt_{run}_{number:08d}","eventType":"invoice.paid","occurredAt":"2026-11-21T09:30:00Z",'
        f'"payload":{{"number":"INV-{number:08d}","country":"CH","currency":"CHF",'
        '"customer":{"name":"Example Ltd","city":"Bern","vat":"CHE-123.456.789"},'
        '"lines":[{"sku":"A-100","qty":2,"price":12.5},{"sku":"B-200","qty":1,"price":99.9},'
        '{"sku":"C-300","qty":7,"price":3.25}],'
        f'"total":{100 + number % 900}.5,"note":"'
    )
    tail = (
        f'"}},"customerExternalId":"{tenant}","schemaVersion":1,"source":"billing",'
        f'"aggregateId":"inv_{number}","metadata":{{"userId":"u1","correlationId":"c{number}"}}}}'
    )
    return tenant, (head + "x" * (EVENT_BYTES - len(head) - len(tail)) + tail).encode()


def produce(
    bootstrap: str, topic: str, run: str, count: int, *, rate_per_s: float = 0.0, stop: threading.Event | None = None
) -> int:
    """Write `count` events, or fewer if `stop` is set, and wait until the broker has acknowledged all of them.

    Evenly spread if a rate is given. Returns how many.
    """
    written = 0
    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "acks": "all",
            # evenly spread events must not wait for company: their age is what is measured
            "linger.ms": 1 if rate_per_s else 20,
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": 1_000_000,
        }
    )
    began = time.monotonic()
    for number in range(count):
        if stop is not None and stop.is_set():
            break
        while rate_per_s and number >= (time.monotonic() - began) * rate_per_s:
            producer.poll(0.0005)
        tenant, value = event(run, number)
        while True:
            try:
                producer.produce(topic, value, tenant)
                written += 1
                break
            except BufferError:
                producer.poll(0.1)
        if number % _PRODUCE_POLL_EVERY == 0:
            producer.poll(0)
    if left := producer.flush(120):
        raise TimeoutError(f"{left} of {written} events were not acknowledged within 120 s")
    return written
