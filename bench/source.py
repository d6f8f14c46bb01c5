"""What both baselines share: their command line, and a consumer that begins where a run's events begin."""

import argparse
import json
from typing import Any

from confluent_kafka import Consumer, TopicPartition
from msgspec import Struct


class Options(Struct, frozen=True):
    """`first` is the offset of the run's first event for each partition; `ca` makes the receiver's link TLS."""

    bootstrap: str
    topic: str
    first: dict[int, int]
    host: str
    port: int
    in_flight: int
    ca: str
    uvloop: bool


def options(title: str) -> Options:
    parser = argparse.ArgumentParser(description=f"{title} Runs until it is ended.")
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--first", required=True, help='where to begin: {"<partition>": <offset>, ...}')
    parser.add_argument("--receiver", required=True, help="host:port")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--ca", default="", help="certificate authority of the receiver; speaks TLS")
    parser.add_argument("--uvloop", action="store_true")
    got = parser.parse_args()
    host, port = got.receiver.rsplit(":", 1)
    first = {int(partition): offset for partition, offset in json.loads(got.first).items()}
    return Options(got.bootstrap, got.topic, first, host, int(port), got.in_flight, got.ca, got.uvloop)


def consumer(options: Options, group: str) -> Any:
    source = Consumer(
        {
            "bootstrap.servers": options.bootstrap,
            "group.id": group,
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            # the backlog of a run is larger than what librdkafka fetches ahead by default: no waiting for the broker
            "queued.min.messages": 100_000,
        }
    )
    source.assign([TopicPartition(options.topic, partition, offset) for partition, offset in options.first.items()])
    return source
