"""Topic names, keys and policies (design, section 4). `config/provision.py` makes them."""

import re
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct

from schemas.ids import DestinationId, Tag, TenantRef, Vendor, percent

MINUTE_MS: Final = 60_000
DAY_MS: Final = 86_400_000
FEW: Final = 4
RECORD_SLACK_BYTES: Final = 64 * 1024
_SEED: Final = 0x9747B28C
_MIX: Final = 0x5BD1E995
_WORD: Final = 0xFFFFFFFF
COMPACTION_MS: Final = 10 * MINUTE_MS


class Topics(Struct, frozen=True):
    """Every topic name under one prefix."""

    prefix: str = "headgate"

    @property
    def control(self) -> str:
        return f"{self.prefix}.control"

    @property
    def keys(self) -> str:
        return f"{self.prefix}.keys"

    @property
    def state(self) -> str:
        return f"{self.prefix}.state"

    def ingress(self, vendor: Vendor) -> str:
        return f"{self.prefix}.{vendor}.ingress"

    def attempts(self, vendor: Vendor) -> str:
        return f"{self.prefix}.{vendor}.attempts"

    def audit(self, vendor: Vendor) -> str:
        return f"{self.prefix}.{vendor}.audit"

    def unrouted(self, vendor: Vendor) -> str:
        return f"{self.prefix}.{vendor}.dlq.unrouted"

    def retry(self, vendor: Vendor, tag: Tag) -> str:
        return f"{self.prefix}.{vendor}.retry.{tag}"

    def dead_letters(self, vendor: Vendor, tag: Tag) -> str:
        return f"{self.prefix}.{vendor}.dlq.{tag}"

    def stage(self, vendor: Vendor, tag: Tag) -> str:
        return f"{self.prefix}.{vendor}.stage.{tag}"

    def stage_cursor(self, vendor: Vendor, tag: Tag) -> str:
        return f"{self.prefix}.{vendor}.stage-cursor.{tag}"

    def retry_pattern(self, vendors: Sequence[Vendor]) -> str:
        """A regular expression for every retry topic of the vendors."""
        names = "|".join(re.escape(vendor) for vendor in vendors)
        return rf"^{re.escape(self.prefix)}\.(?:{names})\.retry\.[a-z0-9-]+$"

    def stage_patterns(self, vendors: Sequence[Vendor]) -> list[str]:
        """Regular expressions for every stage topic of the vendors, and for none of their cursors, in the few words
        that librdkafka's own ones have."""
        prefix = self.prefix.replace(".", "[.]")
        return [rf"^{prefix}[.]{vendor}[.]stage[.][a-z0-9-]+$" for vendor in vendors]

    def group(self, name: str) -> str:
        return f"{self.prefix}.{name}"


def delivery_key(tenant: TenantRef, destination: DestinationId) -> bytes:
    """The key of retry, stage and dead-letter records: `<tenant>/<destination>`."""
    return f"{percent(tenant.tenant)}/{destination}".encode()


def partition_of(key: bytes, partitions: int) -> int:
    """The partition that Java's client, and our producers, give a key: murmur2, without its sign. 1 us for 10 bytes."""
    words, rest = divmod(len(key), 4)
    found = _SEED ^ len(key)
    for word in struct.unpack_from(f"<{words}I", key):
        mixed = word * _MIX & _WORD
        found = (found * _MIX ^ (mixed ^ mixed >> 24) * _MIX) & _WORD
    if rest:
        found = (found ^ int.from_bytes(key[-rest:], "little")) * _MIX & _WORD
    found = (found ^ found >> 13) * _MIX & _WORD
    return ((found ^ found >> 15) & 0x7FFFFFFF) % partitions


def record_bytes(max_event_bytes: int) -> int:
    """What every topic but ingress takes, and every producer of ours sends: what replaces a record always fits."""
    return 2 * (max_event_bytes + RECORD_SLACK_BYTES)


class TopicSpec(Struct, frozen=True):
    """A topic as it should be: partitions and the broker's settings."""

    name: str
    partitions: int
    config: Mapping[str, str]


class Sizes(Struct, frozen=True):
    """The settings that topic policies depend on."""

    max_event_bytes: int
    ingress_partitions: int
    retry_tiers_s: tuple[float, ...]
    ingress_retention_ms: int
    attempts_retention_ms: int
    dlq_retention_ms: int
    longest_max_age_ms: int


_UNROUTED_RETENTION_MS: Final = 7 * DAY_MS


def _delete(name: str, partitions: int, retention_ms: int, max_bytes: int, **more: str) -> TopicSpec:
    return _topic(name, partitions, max_bytes, cleanup_policy="delete", retention_ms=str(retention_ms), **more)


def _compacted(name: str, partitions: int, max_bytes: int, **more: str) -> TopicSpec:
    """Its segments roll within minutes: the one that is written is never cleaned."""
    return _topic(name, partitions, max_bytes, cleanup_policy="compact", segment_ms=str(COMPACTION_MS), **more)


def _topic(name: str, partitions: int, max_bytes: int, **more: str) -> TopicSpec:
    config = {
        **{name.replace("_", "."): value for name, value in more.items()},
        "retention.bytes": "-1",
        "max.message.bytes": str(max_bytes),
    }
    return TopicSpec(name, partitions, config)


def base_topics(topics: Topics, vendors: Sequence[Vendor], sizes: Sizes) -> list[TopicSpec]:
    """The topics that exist before any tenant does."""
    big = record_bytes(sizes.max_event_bytes)
    # cleaned within minutes too, so that a shredded key leaves the disk (design, section 8)
    soon = {"max_compaction_lag_ms": str(COMPACTION_MS), "min_cleanable_dirty_ratio": "0.01"}
    specs = [_compacted(name, 1, big, **soon) for name in (topics.control, topics.keys, topics.state)]
    for vendor in vendors:
        ingress_bytes = sizes.max_event_bytes + RECORD_SLACK_BYTES
        specs += [
            _delete(topics.ingress(vendor), sizes.ingress_partitions, sizes.ingress_retention_ms, ingress_bytes),
            _delete(topics.attempts(vendor), FEW, sizes.attempts_retention_ms, big),
            _delete(topics.audit(vendor), FEW, sizes.attempts_retention_ms, big),
            _delete(topics.unrouted(vendor), FEW, _UNROUTED_RETENTION_MS, big),
        ]
    return specs


def tenant_topics(topics: Topics, vendor: Vendor, tag: Tag, sizes: Sizes, *, staged: bool) -> list[TopicSpec]:
    """The topics of one tag: those of one tenant (`topics: own`) or of one pool.

    `staged`: whether it has a destination of a stage kind. A stage never gets more partitions: its destinations would
    move to others, away from their cursors.
    """
    big = record_bytes(sizes.max_event_bytes)
    waiting_ms = sizes.longest_max_age_ms + 7 * DAY_MS
    append_time = {"message_timestamp_type": "LogAppendTime"}
    specs = [
        _delete(topics.retry(vendor, tag), len(sizes.retry_tiers_s), waiting_ms, big, **append_time),
        _delete(topics.dead_letters(vendor, tag), FEW, sizes.dlq_retention_ms, big),
    ]
    if staged:
        specs += [
            _delete(topics.stage(vendor, tag), FEW, waiting_ms, big, **append_time),
            # a reader reads all of it before it begins: it stays small
            _compacted(topics.stage_cursor(vendor, tag), FEW, big, min_cleanable_dirty_ratio="0.1"),
        ]
    return specs
