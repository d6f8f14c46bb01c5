"""Makes the topics that Headgate needs, and holds existing ones to what it relies on (design, section 4).

Widens what is too small (record size, retention, the partitions of retry topics); refuses what would break a promise
and cannot be mended under running readers (cleanup policy, timestamp type).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeAlias

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)
from msgspec import Struct

from config.kafka import DENIED, KafkaFault, connected_admin, error_of, explain, principal_of, refuse_hidden
from schemas.topics import TopicSpec

REQUEST_TIMEOUT_S: Final = 60.0
CHUNK: Final = 100
COPIES: Final = 3  # with fewer a lost disk, or a broker that is away, is felt

_LEAST: Final = ("max.message.bytes", "retention.ms")
_EXACT: Final = ("cleanup.policy", "message.timestamp.type")

Say: TypeAlias = Callable[[str], None]


class Provisioned(Struct, frozen=True):
    """Names of topics that were created, and of those whose partitions or settings were raised."""

    created: tuple[str, ...]
    raised: tuple[str, ...]


def provision(
    kafka: Mapping[str, Any], specs: Sequence[TopicSpec], *, replication_factor: int, grow: frozenset[str], say: Say
) -> Provisioned:
    """Makes the topics that are missing and checks the others; running it again changes nothing.

    `grow` names the topics that get more partitions where they have fewer than they should. `say` hears of progress and
    of what was raised. Raises `KafkaFault`: for the first topic that could not be made, or whose settings are refused.
    """
    admin, partitions = connected_admin(kafka)
    missing = [spec for spec in specs if spec.name not in partitions]
    present = [spec for spec in specs if spec.name in partitions]
    created = _create(admin, kafka, missing, replication_factor, say)
    raised = _check(admin, kafka, present, say)
    for spec in present:
        if partitions[spec.name] < spec.partitions:
            if spec.name in grow:
                _grow(admin, kafka, spec, say)
                raised.append(spec.name)
            else:
                say(
                    f"topic {spec.name} has {partitions[spec.name]} partitions, the settings ask for "
                    f"{spec.partitions}: left as it is, since growing it moves keys"
                )
    return Provisioned(tuple(created), tuple(dict.fromkeys(raised)))


def settings_of(spec: TopicSpec, replication_factor: int) -> dict[str, str]:
    """The settings that a topic is created with.

    Of three copies two acknowledge, so that what is acknowledged outlives a lost disk, and one broker may be away. Not
    raised afterwards: a topic with fewer copies would take no more records.
    """
    return {**spec.config, **({"min.insync.replicas": "2"} if replication_factor >= COPIES else {})}


def _create(
    admin: AdminClient, kafka: Mapping[str, Any], specs: Sequence[TopicSpec], replication_factor: int, say: Say
) -> list[str]:
    created = []
    for done, chunk in _chunks(specs):
        topics = [
            NewTopic(spec.name, spec.partitions, replication_factor, config=settings_of(spec, replication_factor))
            for spec in chunk
        ]
        for name, error in _outcomes(admin.create_topics(topics, request_timeout=REQUEST_TIMEOUT_S)):
            if error is None:
                created.append(name)
            elif error.code() == KafkaError.INVALID_REPLICATION_FACTOR:
                raise KafkaFault(
                    f"cannot create topic {name}: replication factor {replication_factor} is more than there are "
                    "brokers; set HEADGATE_REPLICATION_FACTOR"
                )
            elif error.code() in DENIED:
                refuse_hidden(kafka, [name])
                raise KafkaFault(
                    f"topic {name} does not exist, and {principal_of(kafka)} may not make it ({error.name()}); "
                    "`headgate apply` makes it, run by a user that may"
                )
            elif error.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise explain(error, f"create topic {name}", kafka)
        if len(specs) > CHUNK:
            say(f"topics: {done + len(chunk)} of {len(specs)} created")
    return created


def _check(admin: AdminClient, kafka: Mapping[str, Any], specs: Sequence[TopicSpec], say: Say) -> list[str]:
    """Names of the topics whose settings were raised."""
    changes: list[ConfigResource] = []
    unchecked = 0
    for _, chunk in _chunks(specs):
        asked = {spec.name: ConfigResource(ResourceType.TOPIC, spec.name) for spec in chunk}
        futures = admin.describe_configs(list(asked.values()), request_timeout=REQUEST_TIMEOUT_S)
        by_name = {resource.name: future for resource, future in futures.items()}
        for spec in chunk:
            try:
                found = {name: entry.value for name, entry in by_name[spec.name].result().items()}
            except KafkaException as exception:
                error = error_of(exception)
                if error.code() in DENIED:
                    unchecked += 1
                    continue
                raise explain(error, f"read the settings of topic {spec.name}", kafka) from None
            change = _changes(spec, found, say)
            if change is not None:
                changes.append(change)
    if unchecked:
        say(f"the settings of {unchecked} topics are not checked: {principal_of(kafka)} may not describe them")
    for _, part in _chunks(changes):
        for resource, future in admin.incremental_alter_configs(list(part), request_timeout=REQUEST_TIMEOUT_S).items():
            try:
                future.result()
            except KafkaException as exception:
                raise explain(error_of(exception), f"change the settings of topic {resource.name}", kafka) from None
    return [change.name for change in changes]


def _changes(spec: TopicSpec, found: Mapping[str, str | None], say: Say) -> ConfigResource | None:
    for name in _EXACT:
        if name in spec.config and found.get(name) not in (None, spec.config[name]):
            raise KafkaFault(
                f"topic {spec.name} has {name}={found[name]}, but Headgate relies on {spec.config[name]}; "
                f"change it with your Kafka tools, or delete the topic if it holds nothing of worth"
            )
    raises = []
    for name in _LEAST:
        seen = found.get(name)
        if name in spec.config and seen is not None and 0 <= int(seen) < int(spec.config[name]):
            say(f"topic {spec.name}: {name} raised from {seen} to {spec.config[name]}")
            raises.append(ConfigEntry(name, spec.config[name], incremental_operation=AlterConfigOpType.SET))
    return ConfigResource(ResourceType.TOPIC, spec.name, incremental_configs=raises) if raises else None


def _grow(admin: AdminClient, kafka: Mapping[str, Any], spec: TopicSpec, say: Say) -> None:
    futures = admin.create_partitions([NewPartitions(spec.name, spec.partitions)], request_timeout=REQUEST_TIMEOUT_S)
    for name, error in _outcomes(futures):
        if error is not None and error.code() != KafkaError.INVALID_PARTITIONS:  # another process was first
            raise explain(error, f"add partitions to topic {name}", kafka)
    say(f"topic {spec.name}: raised to {spec.partitions} partitions")


def _outcomes(futures: Mapping[str, "Future[Any]"]) -> Iterator[tuple[str, KafkaError | None]]:
    for name, future in futures.items():
        try:
            future.result()
        except KafkaException as exception:
            yield name, error_of(exception)
        else:
            yield name, None


def _chunks(items: Sequence[Any]) -> Iterator[tuple[int, Sequence[Any]]]:
    for start in range(0, len(items), CHUNK):
        yield start, items[start : start + CHUNK]


def delete_topics(kafka: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """Deletes those that are there, and returns their names. Raises `KafkaFault`."""
    admin, _ = connected_admin(kafka)
    deleted = []
    for name, error in _outcomes(admin.delete_topics(list(names), request_timeout=REQUEST_TIMEOUT_S)):
        if error is None:
            deleted.append(name)
        elif error.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise explain(error, f"delete topic {name}", kafka)
    return tuple(deleted)


def topic_settings(kafka: Mapping[str, Any], name: str) -> dict[str, str]:
    """The settings in force of one topic; empty where this user may not describe them. Raises `KafkaFault`."""
    admin, _ = connected_admin(kafka)
    asked = ConfigResource(ResourceType.TOPIC, name)
    try:
        found = admin.describe_configs([asked], request_timeout=REQUEST_TIMEOUT_S)[asked].result()
    except KafkaException as exception:
        error = error_of(exception)
        if error.code() in DENIED:
            return {}
        raise explain(error, f"read the settings of topic {name}", kafka) from None
    return {setting: entry.value for setting, entry in found.items() if entry.value is not None}


def log_names(kafka: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """`<cluster id>/<topic id>` of each topic: names a log for good, whatever takes its place."""
    admin, _ = connected_admin(kafka)
    cluster = admin.list_topics(timeout=REQUEST_TIMEOUT_S).cluster_id
    return {name: f"{cluster}/{ident}" for name, ident in topic_ids(kafka, names).items()}


def topic_ids(kafka: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """The first 8 hex digits of each topic's id: what tells a topic that was made anew from the one before it."""
    admin, _ = connected_admin(kafka)
    futures = admin.describe_topics(TopicCollection(list(names)), request_timeout=REQUEST_TIMEOUT_S)
    ids = {}
    for name, future in futures.items():
        try:
            found = future.result().topic_id
        except KafkaException as exception:
            raise explain(error_of(exception), f"describe topic {name}", kafka) from None
        most, least = found.get_most_significant_bits(), found.get_least_significant_bits()
        ids[name] = f"{(most << 64 | least & (1 << 64) - 1) & (1 << 128) - 1:032x}"[:8]
    return ids
