"""`headgate doctor`: holds a deployment against what Headgate relies on, a named check at a time, and says what to do.

Changes nothing of the deployment's. Two things it writes: a broker tells its time only by the time that it gives to a
record, so a topic `<prefix>.doctor` is made for a moment and deleted again; in Redis a key of that name lives for 5 s.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, Literal, TypeAlias

import click
import msgspec
import redis
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourcePatternType,
    ResourceType,
)
from msgspec import Struct

from cli.output import counted, load_settings, output_option, printable, show_json, told
from config.acls import CLUSTER, ROLES, Acl, Role, acls_of, headgate_acls
from config.kafka import (
    CONNECT_TIMEOUT_S,
    DENIED,
    Denied,
    KafkaFault,
    client_config,
    connected_admin,
    error_of,
    principal_of,
    read_to_end,
    refuse_hidden,
)
from config.plan import Current, current_state
from config.provision import COPIES
from config.registry import Registry
from config.rights import lacking
from config.settings import SchemaRegistrySettings, Settings, SettingsError, show_bytes, show_duration
from config.upcasters import installed_upcasters
from config.vault import MasterKeys, Unsealable
from connectors.registry import any_staged
from schemas.ids import Tag, TenantRef, Vendor
from schemas.topics import DAY_MS, TopicSpec, base_topics, tenant_topics
from streams.schemas import NoAnswer, SchemaRegistry

Status: TypeAlias = Literal["ok", "warn", "fail"]
Partition: TypeAlias = tuple[str, int]

CHUNK: Final = 100
SHOWN: Final = 5
MAX_HEADS: Final = 500
LAG_WARN_S: Final = 60.0
CLOCK_WARN_S: Final = 0.5
CLOCK_FAIL_S: Final = 30.0
PINGS: Final = 20
REQUEST_TIMEOUT_S: Final = 20.0

# The newest version of Produce (key 0) that a broker speaks, and the releases of Apache Kafka that speak it
_RELEASES: Final = {9: "2.8 to 3.6", 10: "3.7", 11: "3.8 or 3.9", 12: "4.0", 13: "4.1 or newer"}
# As the ledger's scripts do: a Redis that answers a ping may still refuse every one of them
_LIKE_THE_LEDGER: Final = """
local packed = cmsgpack.pack({1})
return redis.call('SET', KEYS[1], cmsgpack.unpack(packed)[1], 'NX', 'EX', 5)
"""


class Check(Struct, frozen=True, omit_defaults=True):
    """One line: what was looked at, what was seen, and what to do about it."""

    name: str
    status: Status
    says: str
    do: str = ""


@click.command()
@output_option
@click.pass_context
@told
def command(ctx: click.Context, output: str) -> None:
    """Check a deployment, and say what to do.

    Looks at the brokers, this user's rights, the topics and their settings, the tenants' keys, the schema registry and
    the upcasters where there are any, Redis, the clock, the workers' groups and the ACLs that this user can see, with
    the settings that the workers have. Each check is a line: ok, warn (works, but not as it should) or fail. Exits 1 if
    one fails.

    Changes nothing of yours: for the broker's time it makes a topic <prefix>.doctor and deletes it again. Shows no
    secret.
    """
    settings = load_settings()
    checks = []
    for check in examine(settings):
        checks.append(check)
        if output == "text":
            what = f" → {check.do}" if check.do else ""
            click.echo(printable(f"{check.status:<4}  {check.name}: {check.says}{what}"))
    failed = any(check.status == "fail" for check in checks)
    if output == "json":
        show_json({"ok": not failed, "checks": checks})
    ctx.exit(1 if failed else 0)


def examine(settings: Settings) -> Iterator[Check]:
    """All checks, in the order in which somebody would mend things."""
    kafka = settings.kafka.confluent()
    try:
        admin, _ = connected_admin(kafka)
    except KafkaFault as fault:
        yield Check("broker", "fail", str(fault), "nothing else of Kafka can be looked at until then")
        yield from _schemas(settings)
        yield from _redis(settings)
        return
    yield _broker(settings, admin)
    yield _rights(settings, admin)
    cluster = _Cluster(settings, admin)
    tenants = _Tenants(settings)
    expected = _expected(settings, tenants)
    yield from _topics(settings, cluster, expected, tenants)
    yield from _policies(settings, cluster, expected, tenants)
    yield _replication(settings, cluster)
    yield _acknowledged(cluster)
    yield _leftovers(settings, cluster, expected, tenants)
    yield tenants.check
    yield from _keys(settings, tenants)
    yield from _schemas(settings)
    yield from _redis(settings)
    yield _clock(settings, admin)
    yield from _groups(settings, admin, cluster)
    yield _acls(settings, admin)


def _verdict(name: str, status: Status, problems: Sequence[str], fine: str, do: str) -> Check:
    """`fine` if there are no problems, else the first few of them."""
    if not problems:
        return Check(name, "ok", fine)
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return Check(name, status, "; ".join(problems[:SHOWN]) + more, do)


# ---------------------------------------------------------------- brokers


def _broker(settings: Settings, admin: AdminClient) -> Check:
    listed = admin.list_topics(timeout=CONNECT_TIMEOUT_S)
    count = counted(len(listed.brokers), "broker")
    newest = asyncio.run(_produce_version(settings))
    if newest is None:
        return Check("broker", "ok", f"{count} at {settings.kafka.bootstrap}; the version is not told")
    if newest < min(_RELEASES):
        says = f"{count} at {settings.kafka.bootstrap}, older than Kafka {_RELEASES[min(_RELEASES)].split()[0]}"
        return Check("broker", "warn", says, "Headgate is tested with Kafka 4: upgrade the brokers")
    release = _RELEASES.get(newest, _RELEASES[max(_RELEASES)])
    return Check("broker", "ok", f"{count} at {settings.kafka.bootstrap}, Kafka {release} by what they speak")


async def _produce_version(settings: Settings) -> int | None:
    """The newest version of Produce that a broker speaks: brokers do not tell their release."""
    from aiokafka.client import AIOKafkaClient
    from aiokafka.errors import KafkaError as AioKafkaError
    from aiokafka.protocol.admin import ApiVersionRequest

    client = AIOKafkaClient(**settings.kafka.aiokafka(), request_timeout_ms=5000)
    try:
        await client.bootstrap()
        node = client.get_random_node()
        answer = await client.send(node, ApiVersionRequest())
    except (AioKafkaError, OSError, TimeoutError):
        return None
    finally:
        await client.close()
    return next((newest for key, _, newest in answer.api_versions if key == 0), None)


class _Cluster:
    """The topics of our prefix: partitions, copies and settings."""

    def __init__(self, settings: Settings, admin: AdminClient) -> None:
        listed = admin.list_topics(timeout=CONNECT_TIMEOUT_S).topics
        start = settings.topics.prefix + "."
        self.topics = {name: topic for name, topic in listed.items() if name.startswith(start) and topic.error is None}
        self.config: dict[str, dict[str, str | None]] = {}
        self.unreadable: list[str] = []
        names = sorted(self.topics)
        for at in range(0, len(names), CHUNK):
            asked = [ConfigResource(ResourceType.TOPIC, name) for name in names[at : at + CHUNK]]
            futures = admin.describe_configs(asked, request_timeout=REQUEST_TIMEOUT_S)
            for resource, future in futures.items():
                try:
                    self.config[resource.name] = {name: entry.value for name, entry in future.result().items()}
                except KafkaException:
                    self.unreadable.append(resource.name)

    def partitions(self) -> Iterator[tuple[str, int, Any]]:
        for name, topic in sorted(self.topics.items()):
            for number, partition in sorted(topic.partitions.items()):
                yield name, number, partition


def _rights(settings: Settings, admin: AdminClient) -> Check:
    """What this user may do, as the roles that it could have: all of one is enough."""
    who = principal_of(settings.kafka.confluent())
    missing: dict[Role, list[Acl]] = {}
    try:
        for role in ROLES:
            missing[role] = lacking(admin, acls_of(role, settings.topics, settings.vendors))
    except KafkaException as exception:
        says = f"what {who} may do cannot be asked ({error_of(exception).name()})"
        return Check("rights", "warn", says, "see the broker's log")
    whole = [role for role in ROLES if not missing[role]]
    if whole:
        return Check("rights", "ok", f"{who} may do what is needed by: {', '.join(whole)}")
    # what it comes nearest to is what it is meant to be
    role = min(ROLES, key=lambda role: len(missing[role]) / len(acls_of(role, settings.topics, settings.vendors)))
    lacks = [f"for {role} {who} lacks {acl}" if not n else str(acl) for n, acl in enumerate(missing[role])]
    return _verdict("rights", "fail", lacks, "", f"{headgate_acls(role, who, None)}, as an administrator of Kafka")


# ---------------------------------------------------------------- control plane


class _Tenants:
    """What control, keys and state hold of each vendor; `check` says how well they can be read."""

    def __init__(self, settings: Settings) -> None:
        self.current: dict[Vendor, Current] = {vendor: Current({}) for vendor in settings.vendors}
        topics = settings.topics
        self.readable = False
        names = (topics.keys, topics.control, topics.state)
        try:
            records = [
                (message.topic() or "", message.key(), message.value())
                for message in read_to_end(settings.kafka.confluent(), names, topics.group("cli"))
            ]
            pairs = [(key, value) for _, key, value in records if key is not None]
            self.current = {vendor: current_state(vendor, pairs) for vendor in settings.vendors}
        except Denied as fault:
            self.check = Check("tenants", "warn", str(fault), "see the check of rights")
            return
        except (KafkaFault, msgspec.DecodeError) as fault:
            says = f"control, keys and state cannot be read: {fault}"
            self.check = Check("tenants", "fail", says, "use the version of Headgate that wrote them, or a newer one")
            return
        self.readable = True
        self.check = self._whole(settings, records)

    def _whole(self, settings: Settings, records: Iterable[tuple[str, bytes | None, bytes | None]]) -> Check:
        """Whether the workers' own registry makes every tenant of them."""
        try:
            registry = Registry(MasterKeys.load(settings.keys), settings.topics)
        except SettingsError:
            return Check(
                "tenants", "ok", f"{counted(self.count, 'tenant')}; whether whole or not needs the master keys"
            )
        for topic, key, value in records:
            registry.fold(topic, key, value)
        problems = [
            f"{counted(count, 'record')} left out ({reason})"
            for reason, count in registry.faults.items()
            if reason != "data_key"  # the keys' own check says which
        ]
        problems += [
            f"tenant {name!r} is not whole: the workers keep what they knew of it"
            for vendor, current in self.current.items()
            for name, tenant in current.tenants.items()
            if tenant.record.state == "active"
            and registry.versions.get(TenantRef(vendor, name)) != tenant.record.configVersion
            and tenant.record.keyVersion in tenant.keys
            and "data_key" not in registry.faults
        ]
        fine = f"{counted(self.count, 'tenant')}, whole"
        return _verdict(
            "tenants",
            "fail",
            problems,
            fine,
            "headgate apply writes a tenant anew; see who else may write these topics",
        )

    @property
    def count(self) -> int:
        return sum(len(current.tenants) for current in self.current.values())

    def tags(self, vendor: Vendor, *, active: bool) -> dict[Tag, bool]:
        """Whether each has a destination of a stage kind."""
        found: dict[Tag, bool] = {}
        for one in self.current[vendor].tenants.values():
            if (one.record.state == "active") == active:
                kinds = {destination.type for destination in one.destinations.values()}
                tag = Tag(one.record.tag)
                found[tag] = found.get(tag, False) or any_staged(kinds)
        return dict(sorted(found.items()))

    def longest_max_age_s(self, default_s: float) -> float:
        """Of all destinations that are configured."""
        ages = [
            destination.retry.max_age_s
            for current in self.current.values()
            for tenant in current.tenants.values()
            for destination in tenant.destinations.values()
        ]
        return max(ages, default=default_s)


def _expected(settings: Settings, tenants: _Tenants) -> dict[str, TopicSpec]:
    specs = list(base_topics(settings.topics, settings.vendors, settings.sizes))
    for vendor in settings.vendors:
        for tag, staged in tenants.tags(vendor, active=True).items():
            specs += tenant_topics(settings.topics, vendor, tag, settings.sizes, staged=staged)
    return {spec.name: spec for spec in specs}


def _keys(settings: Settings, tenants: _Tenants) -> Iterator[Check]:
    try:
        master = MasterKeys.load(settings.keys)
    except SettingsError as fault:
        yield Check("keys", "fail", str(fault))
        return
    problems = []
    opened = 0
    for vendor, current in tenants.current.items():
        for name, tenant in current.tenants.items():
            if tenant.record.state == "active" and tenant.record.keyVersion not in tenant.keys:
                problems.append(f"tenant {name!r} has no data key of version {tenant.record.keyVersion}")
            for version, key in tenant.keys.items():
                try:
                    master.unwrap(TenantRef(vendor, name), key)
                    opened += 1
                except Unsealable as fault:
                    problems.append(f"tenant {name!r}: key {version}, wrapped by {key.master!r}: {fault.code}")
    yield _verdict(
        "keys",
        "fail",
        problems,
        f"the master keys given ({', '.join(master.ids)}) open {counted(opened, 'data key')} of tenants",
        f"HEADGATE_MASTER_KEY_FILE has {', '.join(master.ids)}: give all that were ever in use; "
        "a tenant without a key gets one from headgate apply",
    )
    if master.is_development:
        says = "a master key's id starts with dev-"
        yield Check(
            "development key", "warn", says, "fine on a machine of your own; HEADGATE_ENV=production refuses it"
        )


# ---------------------------------------------------------------- topics


def _topics(
    settings: Settings, cluster: _Cluster, expected: Mapping[str, TopicSpec], tenants: _Tenants
) -> Iterator[Check]:
    unlisted = [name for name in expected if name not in cluster.topics]
    try:
        refuse_hidden(settings.kafka.confluent(), unlisted)
    except Denied as fault:
        yield Check("topics", "warn", str(fault), "see the check of rights; whether topics are missing cannot be told")
        return
    missing = [f"{name} is missing" for name in unlisted]
    do = "headgate apply -f FILE makes them; what belongs there is not acknowledged until then"
    yield _verdict("topics", "fail", missing, f"{len(expected)} topics, all there", do)
    fewer, wrong = [], []
    single = {settings.topics.control, settings.topics.keys, settings.topics.state}
    for name, spec in expected.items():
        if name not in cluster.topics:
            continue
        has = len(cluster.topics[name].partitions)
        if name in single and has != 1:
            wrong.append(f"{name} has {has} partitions, it must have 1")
        elif has < spec.partitions:
            fewer.append(f"{name} has {has} partitions of {spec.partitions}")
    wrong += [f"{name}/{number} has no leader" for name, number, part in cluster.partitions() if part.leader < 0]
    if wrong:
        do = "start the brokers that hold them; a topic with too many partitions has to be made anew"
        yield _verdict("partitions", "fail", wrong, "", do)
    else:
        do = "headgate apply adds those of retry topics; the others stay as they are, since more would move keys"
        count = sum(1 for _ in cluster.partitions())
        yield _verdict("partitions", "warn", fewer, f"{count} partitions, all with a leader", do)


def _policies(
    settings: Settings, cluster: _Cluster, expected: Mapping[str, TopicSpec], tenants: _Tenants
) -> Iterator[Check]:
    policy: list[str] = []
    sizes, kept, waiting = [], [], []
    needed_ms = int(tenants.longest_max_age_s(settings.sizes.longest_max_age_ms / 1000) * 1000) + 7 * DAY_MS
    for name, spec in expected.items():
        found = cluster.config.get(name)
        if found is None:
            continue
        policy += [
            f"{name}: {setting}={found[setting]}, not {spec.config[setting]}"
            for setting in ("cleanup.policy", "message.timestamp.type", "retention.bytes")
            if setting in spec.config and found.get(setting) not in (None, spec.config[setting])
        ]
        if 0 <= _number(found.get("max.message.bytes")) < int(spec.config["max.message.bytes"]):
            has = show_bytes(_number(found.get("max.message.bytes")))
            sizes.append(f"{name}: max.message.bytes is {has}, not {show_bytes(int(spec.config['max.message.bytes']))}")
        has_ms = _number(found.get("retention.ms"))
        if has_ms < 0 or "retention.ms" not in spec.config:
            continue
        if spec.config.get("message.timestamp.type") == "LogAppendTime":  # what waits there is nowhere else
            if has_ms < needed_ms:
                waiting.append(f"{name}: {_days(has_ms)}, not {_days(needed_ms)}")
        elif has_ms < int(spec.config["retention.ms"]):
            kept.append(f"{name}: {_days(has_ms)}, not {_days(int(spec.config['retention.ms']))}")
    if cluster.unreadable:
        says = f"the settings of {len(cluster.unreadable)} topics cannot be read by this user"
        yield Check("topic settings", "warn", says, "grant DescribeConfigs on them, or run doctor as another user")
    raises = "headgate apply -f FILE raises it"
    yield _verdict(
        "policies",
        "fail",
        policy,
        f"cleanup, timestamps and retention.bytes of {len(cluster.config)} topics are as they should be",
        "change them with your Kafka tools: with these, records are lost or come due at the wrong time",
    )
    yield _verdict("record sizes", "fail", sizes, "every topic takes the largest record", raises)
    yield _verdict(
        "retention of what waits",
        "fail",
        waiting,
        f"at least {_days(needed_ms)}, the longest max_age and 7 days",
        f"{raises}: what waits for its next attempt would be deleted",
    )
    yield _verdict(
        "retention", "warn", kept, "events, attempts and dead letters are kept as long as the settings say", raises
    )


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.lstrip("-").isdecimal() else -1


def _days(ms: int) -> str:
    return show_duration(ms / 1000)


def _replication(settings: Settings, cluster: _Cluster) -> Check:
    few: dict[str, int] = {}
    behind = []
    for name, number, part in cluster.partitions():
        if len(part.replicas) < COPIES:
            few[name] = min(few.get(name, COPIES), len(part.replicas))
        if len(part.isrs) < len(part.replicas):
            behind.append(f"{name}/{number}: {len(part.isrs)} of {len(part.replicas)} copies are in sync")
    if behind:
        return _verdict("replication", "warn", behind, "", "look after the brokers that are behind or away")
    if few:
        says = f"fewer than {COPIES} copies of {counted(len(few), 'topic')} (the fewest: {min(few.values())})"
        if settings.replication_factor < COPIES:
            says += f"; HEADGATE_REPLICATION_FACTOR={settings.replication_factor}"
        do = "a lost disk loses events: with three brokers set HEADGATE_REPLICATION_FACTOR=3, and reassign what exists"
        return Check("replication", "warn", says, do)
    return Check("replication", "ok", f"at least {COPIES} copies of every partition, all in sync")


def _acknowledged(cluster: _Cluster) -> Check:
    """Whether what a broker has acknowledged lies on more than one of them (`min.insync.replicas`)."""
    stuck: list[str] = []
    alone: list[str] = []
    for name, number, part in cluster.partitions():
        least = _number(cluster.config.get(name, {}).get("min.insync.replicas"))
        if number == 0 and (problem := acknowledgement_problem(len(part.replicas), least)):
            (stuck if problem == "stuck" else alone).append(f"{name} has min.insync.replicas={least}")
    if stuck:
        do = "lower it with your Kafka tools: no record can be written to a topic with fewer copies than that"
        return _verdict("acknowledgements", "fail", stuck, "", do)
    do = "set it to 2 with your Kafka tools: what one broker alone acknowledged is lost with its disk"
    return _verdict("acknowledgements", "warn", alone, "as many brokers acknowledge a record as its copies allow", do)


def acknowledgement_problem(copies: int, least: int) -> Literal["stuck", "alone"] | None:
    """`least`: min.insync.replicas, negative where it cannot be read."""
    if least > copies:
        return "stuck"
    return "alone" if copies >= COPIES and 0 <= least < 2 else None


def _leftovers(settings: Settings, cluster: _Cluster, expected: Mapping[str, TopicSpec], tenants: _Tenants) -> Check:
    """Topics of the prefix that nobody configured. Those of removed tenants and stages stay on purpose."""
    if not tenants.readable:
        return Check("leftover topics", "warn", "cannot be told without control", "see the check of tenants")
    topics = settings.topics
    kept: set[str] = {f"{topics.prefix}.doctor"}
    for vendor in settings.vendors:
        for tag in tenants.tags(vendor, active=False) | tenants.tags(vendor, active=True):
            kept |= {spec.name for spec in tenant_topics(topics, vendor, tag, settings.sizes, staged=True)}
    unknown = [name for name in sorted(cluster.topics) if name not in expected and name not in kept]
    removed = sum(1 for name in cluster.topics if name in kept and name not in expected)
    fine = "no topic of the prefix is unknown"
    if removed:
        fine += f"; {removed} belong to tenants, or to destinations, that were removed"
    do = (
        "they belong to no tenant in control and no vendor in HEADGATE_VENDORS: look what they hold, then delete them "
        "with your Kafka tools, or configure whose they are"
    )
    return _verdict("leftover topics", "warn", unknown, fine, do)


# ---------------------------------------------------------------- schemas


def _schemas(settings: Settings) -> Iterator[Check]:
    """Nothing where there is neither a registry nor an upcaster."""
    if settings.schema_registry is not None:
        yield asyncio.run(_schema_registry(settings.schema_registry))
    try:
        chains = list(installed_upcasters().chains())
    except SettingsError as fault:
        yield Check("upcasters", "fail", str(fault), "a worker does not start with it")
        return
    gaps = [
        f"{event_type}: nothing raises version {version}"
        for event_type, versions in chains
        for version in range(1, max(versions))
        if version not in versions
    ]
    if chains:
        fine = ", ".join(f"{event_type} to version {max(versions) + 1}" for event_type, versions in chains)
        do = "if there are such events, register the missing step: they go to dlq.unrouted as unknown_schema"
        yield _verdict("upcasters", "warn", gaps, fine, do)


async def _schema_registry(settings: SchemaRegistrySettings) -> Check:
    url, registry = settings.url, SchemaRegistry(settings)
    try:
        types = await registry.types()
    finally:
        await registry.close()
    if isinstance(types, NoAnswer):
        do = "check HEADGATE_SCHEMA_REGISTRY_URL; Avro events whose schema a worker has not met yet go to dlq.unrouted"
        return Check("schema registry", "fail", f"{url}: {types.why}", do)
    if "AVRO" not in types:
        says = f"{url} has no schemas of type AVRO, but {', '.join(types) or 'none'}"
        return Check("schema registry", "fail", says, "name a registry that holds those of your Avro events")
    return Check("schema registry", "ok", f"{url} answers")


# ---------------------------------------------------------------- Redis and the clock


def _redis(settings: Settings) -> Iterator[Check]:
    shown = settings.redis.shown
    without = "without Redis nothing is lost, but duplicates pass"
    client = redis.Redis.from_url(settings.redis.url, socket_connect_timeout=2.0, socket_timeout=2.0)
    try:
        client.ping()
        took = []
        for _ in range(PINGS):
            started = time.perf_counter()
            client.eval(_LIKE_THE_LEDGER, 1, f"{settings.topics.prefix}:doctor")
            took.append(time.perf_counter() - started)
        info: Mapping[str, Any] = client.info("memory")
    except (redis.RedisError, OSError) as fault:
        why = str(fault).partition("\n")[0][:200] or type(fault).__name__
        yield Check("redis", "fail", f"{shown}: {why}", f"check HEADGATE_REDIS_URL; {without}")
        return
    finally:
        client.close()
    deadline_s = settings.redis.deadline_s
    usual_s, worst_s = sorted(took)[len(took) // 2], max(took)
    says = f"{shown} answers in {usual_s * 1000:.1f} ms, at worst {worst_s * 1000:.1f} ms of {deadline_s * 1000:.0f}"
    if usual_s > deadline_s:
        yield Check("redis", "fail", says, f"workers give up at {deadline_s * 1000:.0f} ms: move it nearer; {without}")
    elif worst_s > deadline_s:
        yield Check("redis", "warn", says, "some calls are given up: look for slow commands, swapping, the network")
    else:
        yield Check("redis", "ok", says)
    policy, most = str(info.get("maxmemory_policy", "")), int(info.get("maxmemory", 0))
    if policy and policy != "noeviction":
        when = "now" if most else "as soon as maxmemory is set"
        do = f"set maxmemory-policy noeviction: it evicts {when}, and what it forgets can be delivered twice"
        yield Check("redis memory", "warn", f"maxmemory-policy is {policy}", do)
    elif most and int(info.get("used_memory", 0)) > 0.9 * most:
        says = f"{show_bytes(int(info['used_memory']))} of {show_bytes(most)} are used"
        yield Check(
            "redis memory", "warn", says, "give it more: when it is full it refuses writes, and duplicates pass"
        )
    else:
        yield Check("redis memory", "ok", "nothing is evicted")


def _clock(settings: Settings, admin: AdminClient) -> Check:
    """This machine's clock against that of a broker."""
    name = f"{settings.topics.prefix}.doctor"
    topic = NewTopic(name, 1, 1, config={"message.timestamp.type": "LogAppendTime", "retention.ms": "60000"})
    unknown = "the broker's time could not be asked"
    try:
        admin.create_topics([topic], request_timeout=REQUEST_TIMEOUT_S)[name].result()
    except KafkaException as exception:
        error = error_of(exception)
        if error.code() != KafkaError.TOPIC_ALREADY_EXISTS:
            return Check("clock", "warn", f"{unknown}: topic {name} cannot be made ({error.name()})", _NTP)
    try:
        skew_s, sure_s = _skew(settings, name)
    except KafkaException as exception:
        return Check("clock", "warn", f"{unknown}: {error_of(exception).name()}", _NTP)
    finally:
        with contextlib.suppress(KafkaException):  # who may not delete it finds it kept apart from leftovers
            admin.delete_topics([name], request_timeout=REQUEST_TIMEOUT_S)[name].result()
    off_s = max(0.0, abs(skew_s) - sure_s)
    if off_s < CLOCK_WARN_S:
        return Check("clock", "ok", f"within {max(sure_s, 0.001) * 1000:.0f} ms of a broker's")
    says = f"this machine's clock is {abs(skew_s):.1f} s {'behind' if skew_s > 0 else 'ahead of'} a broker's"
    do = f"{_NTP}: retries would start that much late or early"
    return Check("clock", "fail" if off_s >= CLOCK_FAIL_S else "warn", says, do)


_NTP: Final = "let NTP set the clocks of workers and brokers"


def _skew(settings: Settings, topic: str) -> tuple[float, float]:
    """How far the broker is ahead, and how far that can be wrong: half of what the question took."""
    told: list[Any] = []
    producer = Producer(client_config({**settings.kafka.confluent(), "linger.ms": 0, "message.timeout.ms": 10_000}))

    def answered(error: KafkaError | None, message: Any) -> None:
        told.append(error if error is not None else message.timestamp()[1])

    best = (0.0, float("inf"))
    for _ in range(3):  # the first one also connects
        told.clear()
        before = time.time()
        producer.produce(topic, b"", on_delivery=answered)
        producer.flush(15)
        after = time.time()
        if not told or isinstance(told[0], KafkaError):
            raise KafkaException(told[0] if told else KafkaError(KafkaError._TIMED_OUT))
        sure = (after - before) / 2 + 0.001
        if sure < best[1]:
            best = (told[0] / 1000 - (before + after) / 2, sure)
    return best


# ---------------------------------------------------------------- the workers' groups


class _Group(Struct):
    """Its members, and what it has committed."""

    members: int
    committed: Mapping[Partition, int]


def _groups(settings: Settings, admin: AdminClient, cluster: _Cluster) -> Iterator[Check]:
    topics = settings.topics
    ingress = [topics.ingress(vendor) for vendor in settings.vendors]
    waiting = [
        name
        for name in cluster.topics
        if any(name.startswith(f"{topics.prefix}.{vendor}.retry.") for vendor in settings.vendors)
    ]
    for group, names, what in (("route", ingress, "ingress"), ("retry", waiting, "the retry topics")):
        name = topics.group(group)
        try:
            found = _group(admin, name)
            yield from _progress_of(settings, admin, cluster, name, found, names, what)
        except KafkaException as exception:
            error = error_of(exception)
            denied = error.code() in DENIED
            says = "may not be described by this user" if denied else f"cannot be described ({error.name()})"
            yield Check(f"group {name}", "warn", says, "see the check of rights")


def _group(admin: AdminClient, name: str) -> _Group:
    described = admin.describe_consumer_groups([name], request_timeout=REQUEST_TIMEOUT_S)[name]
    try:
        members = len(described.result().members)
    except KafkaException as exception:
        if error_of(exception).code() != KafkaError.GROUP_ID_NOT_FOUND:
            raise
        return _Group(0, {})
    asked = [ConsumerGroupTopicPartitions(name)]
    listed = admin.list_consumer_group_offsets(asked, request_timeout=REQUEST_TIMEOUT_S)[name].result()
    return _Group(
        members, {(part.topic, part.partition): part.offset for part in listed.topic_partitions if part.offset >= 0}
    )


def _progress_of(
    settings: Settings,
    admin: AdminClient,
    cluster: _Cluster,
    name: str,
    group: _Group,
    topics: Sequence[str],
    what: str,
) -> Iterator[Check]:
    parts = [
        (topic, number) for topic in topics if topic in cluster.topics for number in cluster.topics[topic].partitions
    ]
    firsts = _offsets(admin, parts, OffsetSpec.earliest())
    ends = _offsets(admin, parts, OffsetSpec.latest())
    lost = [
        f"{part[0]}/{part[1]}: {counted(firsts[part] - group.committed[part], 'record')}"
        for part in parts
        if part in group.committed and firsts.get(part, 0) > group.committed[part]
    ]
    if lost:
        do = "retention was shorter than the workers were away: raise it, run more workers; these events are gone"
        yield _verdict(f"group {name}", "fail", [f"deleted before they were read: {one}" for one in lost], "", do)
    behind = {
        part: max(firsts[part], group.committed.get(part, 0))
        for part in parts
        if part in ends and ends[part] > max(firsts[part], group.committed.get(part, 0))
    }
    records = sum(ends[part] - at for part, at in behind.items())
    now_ms = time.time() * 1000
    tiers_s = settings.sizes.retry_tiers_s if what != "ingress" else ()
    oldest_s = 0.0
    heads: Mapping[Partition, tuple[int, int]] = {}
    unread = ""
    try:
        heads = _heads(settings, dict(list(behind.items())[:MAX_HEADS]))
    except Denied:  # an operator does not read events
        unread = ", how old they are this user may not read"
    for (_, number), due_ms in heads.items():
        if tiers_s:  # looked at when its tier has passed, due when it says so
            at_ms, not_before_ms = due_ms
            tier_s = tiers_s[number] if number < len(tiers_s) else tiers_s[0]
            oldest_s = max(oldest_s, (now_ms - max(at_ms + tier_s * 1000, not_before_ms)) / 1000)
        else:
            oldest_s = max(oldest_s, (now_ms - due_ms[0]) / 1000)
    left = f"not settled: {counted(records, 'record')} of {what}{unread}" if records else f"{what}: all settled"
    if oldest_s >= 1:
        span = show_duration(round(oldest_s))
        left += f", the oldest is due for {span}" if tiers_s else f", the oldest is {span} old"
    says = f"{counted(group.members, 'worker')}; {left}"
    if not group.members:
        yield Check(f"group {name}", "warn", says, "no worker runs: headgate worker")
    elif oldest_s > LAG_WARN_S:
        yield Check(f"group {name}", "warn", says, "start more workers, or look at their logs and at Kafka")
    elif not lost:
        yield Check(f"group {name}", "ok", says)


def _offsets(admin: AdminClient, parts: Sequence[Partition], which: OffsetSpec) -> dict[Partition, int]:
    if not parts:
        return {}
    asked = {TopicPartition(*part): which for part in parts}
    futures: Mapping[TopicPartition, Future[Any]] = admin.list_offsets(
        asked, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=REQUEST_TIMEOUT_S
    )
    return {(part.topic, part.partition): future.result().offset for part, future in futures.items()}


def _heads(settings: Settings, places: Mapping[Partition, int]) -> dict[Partition, tuple[int, int]]:
    """Of the first record at each place: its timestamp and when it is not due before, both in ms."""
    if not places:
        return {}
    found: dict[Partition, tuple[int, int]] = {}

    def start(_consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        wanted = [part for part in partitions if (part.topic, part.partition) in places]
        return [TopicPartition(p.topic, p.partition, places[p.topic, p.partition]) for p in wanted]

    names = sorted({topic for topic, _ in places})
    for message in read_to_end(settings.kafka.confluent(), names, settings.topics.group("cli"), start):
        part = (message.topic() or "", message.partition() or 0)
        if part in found:
            continue
        headers = dict(message.headers() or [])
        due = (headers.get("hg-not-before") or b"0").decode("utf-8", "replace")
        found[part] = (message.timestamp()[1], int(due) if due.isdecimal() else 0)
        if len(found) == len(places):
            break
    return found


# ---------------------------------------------------------------- ACLs


def _acls(settings: Settings, admin: AdminClient) -> Check:
    everything = AclBindingFilter(
        ResourceType.ANY, None, ResourcePatternType.ANY, None, None, AclOperation.ANY, AclPermissionType.ANY
    )
    try:
        bindings = admin.describe_acls(everything, request_timeout=REQUEST_TIMEOUT_S).result()
    except KafkaException as exception:
        error = error_of(exception)
        if error.code() == KafkaError.SECURITY_DISABLED:
            return _OPEN
        if error.code() in DENIED:
            return _UNSEEN
        return Check("acls", "warn", f"cannot be read: {error.name()}", "see the broker's log")
    if not bindings and not _has_authorizer(admin):  # such a broker answers with an empty list, or with an error
        return _OPEN
    if not bindings and lacking(admin, [Acl("cluster", CLUSTER, "literal", "Describe")]):  # as it does to who may not
        return _UNSEEN
    writers: dict[str, set[str]] = {}
    for name in (settings.topics.control, settings.topics.keys):
        for acl in bindings:
            prefixed = acl.resource_pattern_type == ResourcePatternType.PREFIXED and name.startswith(acl.name)
            if (
                acl.restype == ResourceType.TOPIC
                and acl.permission_type == AclPermissionType.ALLOW
                and acl.operation in (AclOperation.WRITE, AclOperation.ALL)
                and (acl.name in (name, "*") or prefixed)
            ):
                writers.setdefault(acl.principal, set()).add(name)
    if "User:*" in writers:
        topics = ", ".join(sorted(writers["User:*"]))
        return Check("acls", "fail", f"everybody may write {topics}", "only who applies may: take that ACL away")
    if not writers:
        says = f"{len(bindings)} are visible, and none names who may write control and keys"
        do = "name who applies; a broker with allow.everyone.if.no.acl.found lets everybody"
        return Check("acls", "warn", says, do)
    who = ", ".join(sorted(writers))
    return Check("acls", "ok", f"{len(bindings)} are visible; control and keys may be written by {who}")


_UNSEEN: Final = Check("acls", "ok", "cannot be read by this user (that needs Describe on the cluster)")
_OPEN: Final = Check(
    "acls",
    "warn",
    "the broker has no authorizer: whoever reaches it may write the tenants' configuration and keys",
    "fine on a machine of your own; else give the broker an authorizer",
)


def _has_authorizer(admin: AdminClient) -> bool:
    """Whether the broker says that it has one; True where it says nothing."""
    brokers = admin.list_topics(timeout=CONNECT_TIMEOUT_S).brokers
    asked = ConfigResource(ResourceType.BROKER, str(min(brokers)))
    try:
        found = admin.describe_configs([asked], request_timeout=REQUEST_TIMEOUT_S)[asked].result()
    except KafkaException:
        return True
    entry = found.get("authorizer.class.name")
    return entry is None or entry.value != ""
