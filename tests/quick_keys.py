"""A `keys` topic that forgets within seconds instead of minutes, and what lies on the broker's disk of it."""

import base64
from pathlib import Path

from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from config.kafka import connected_admin
from config.provision import provision
from config.settings import Settings
from config.writer import read_current
from dev.stack import Stack
from schemas.ids import TenantRef
from schemas.topics import TopicSpec, base_topics

QUICK = {
    "segment.ms": "1000",
    "max.compaction.lag.ms": "1000",
    "file.delete.delay.ms": "100",
    "compression.type": "uncompressed",  # so that what is searched for on the disk stands there as it was written
}


def make_quick_keys(settings: Settings) -> None:
    """Before the first apply, which takes the topic as it is."""
    (spec,) = (one for one in base_topics(settings.topics, (), settings.sizes) if one.name == settings.topics.keys)
    quick = TopicSpec(spec.name, spec.partitions, {**spec.config, **QUICK})
    provision(settings.kafka.confluent(), [quick], replication_factor=1, grow=frozenset(), say=lambda _: None)


def change_keys(settings: Settings, **to: int) -> None:
    """Settings of the topic from now on; `segment_ms` is `segment.ms`."""
    entries = [
        ConfigEntry(name.replace("_", "."), str(value), incremental_operation=AlterConfigOpType.SET)
        for name, value in to.items()
    ]
    topic = ConfigResource(ResourceType.TOPIC, settings.topics.keys, incremental_configs=entries)
    admin, _ = connected_admin(settings.kafka.confluent())
    admin.incremental_alter_configs([topic])[topic].result(60)


def wrapped_keys(settings: Settings, tenant: TenantRef) -> list[bytes]:
    """The tenant's wrapped data keys, as they are spelled in the topic."""
    known = read_current(settings.kafka.confluent(), settings.topics, tenant.vendor).tenants[tenant.tenant]
    return [base64.b64encode(key.wrapped) for key in known.keys.values()]


def on_disk(stack: Stack, topic: str, bytes_: bytes) -> list[Path]:
    """The files of the topic's log that hold these bytes, those that the broker has put aside included."""
    found = []
    for path in (stack.dir / "kafka" / "data" / f"{topic}-0").iterdir():
        try:
            if bytes_ in path.read_bytes():
                found.append(path)
        except FileNotFoundError:
            continue  # deleted meanwhile
    return found
