"""The worker: its parts, how they start, how they stop. Run by `headgate worker`.

Start: topics, tenant registry caught up, lanes, ledger, outbox, then the Faust app with the route agent, and the retry
pump. Stop (SIGTERM): fetching ends, what is in flight ends, what waits is parked, all of it is settled and committed;
at most `shutdown_timeout_s`. A second signal ends at once. Exit 0: all settled; 1: a fault, or not all in time.
"""

import asyncio
import ctypes
import gc
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import faust
import structlog
import uvloop
from aiokafka.errors import KafkaError

from config.acls import Acl
from config.logs import configure_logs
from config.provision import provision, topic_ids
from config.registry import Fault, Registry
from config.rights import lack_of, refuse_lacking
from config.settings import KafkaSettings, Settings, SettingsError
from config.upcasters import installed_upcasters
from config.vault import MasterKeys
from connectors.egress import Egress
from schemas.topics import base_topics, record_bytes
from streams import rights
from streams.compiled import Tenants
from streams.control import ControlReader
from streams.health import Health
from streams.ingress import Router
from streams.lanes import Lanes, LaneSettings
from streams.leases import Leases
from streams.ledger import Ledger
from streams.metrics import Metrics, registry_for
from streams.outbox import Outbox
from streams.pump import HEAP_BUDGET_BYTES, Pump
from streams.retry import Retries
from streams.schemas import SchemaRegistry
from streams.settle import Settle
from streams.stage import Stage
from streams.transport import Hooks, SafeApp, TopicPartition, fetch_of, safe_app

log = structlog.get_logger()

AFTER_FAULT_S: Final = 2.0
WATCH_S: Final = 0.1
BROKER_AWAY_S: Final = 5.0
RIGHTS_EVERY_S: Final = 10.0
BROKER_AWAY_BYTES: Final = 64 * 2**20
AVERAGES_EVERY_S: Final = 10.0
M_TRIM_THRESHOLD: Final = -1  # malloc.h
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8
MAPPED_ALONE_BYTES: Final = 128 * 1024
ARENAS: Final = 2
LAST_WRITES_S: Final = 4.0  # kept back from the shutdown's time for the last acknowledgements and commits


def product_version() -> str:
    try:
        return version("headgate")
    except PackageNotFoundError:
        return "dev"


def run_worker(settings: Settings) -> int:
    """Runs until a signal or a fatal fault. The exit code."""
    configure_logs(settings.log, worker=settings.worker.id)
    _take_descriptors()
    _return_memory()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Worker(settings).run())


def _take_descriptors() -> None:
    """As many sockets as the system lets this process have; beyond, the connector tells (`no_resources`)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _return_memory() -> None:
    """Has glibc give large blocks back to the system as soon as they are free (ADR 0009).

    By itself it raises the size from which on a block is mapped alone to the largest that was ever freed, up to 32 MiB;
    events of 1 MiB then lie in a heap that shrinks only from its end. And each thread may have a heap of its own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another libc
        mallopt(M_MMAP_THRESHOLD, MAPPED_ALONE_BYTES)
        mallopt(M_TRIM_THRESHOLD, MAPPED_ALONE_BYTES)
        mallopt(M_ARENA_MAX, ARENAS)


def _credentials(kafka: KafkaSettings) -> Any:
    """The broker's credentials as Faust takes them."""
    context = kafka.ssl_context() if kafka.encrypted else None
    if kafka.sasl and kafka.sasl_password is not None:
        password = kafka.sasl_password.get_secret_value()
        return faust.SASLCredentials(
            username=kafka.sasl_username, password=password, mechanism=kafka.sasl_mechanism, ssl_context=context
        )
    return faust.SSLCredentials(context) if context is not None else None


class Worker:
    """One worker process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._master = MasterKeys.load(settings.keys)  # wrong settings are refused before anything is reached
        self._upcasters = installed_upcasters()
        self._name = settings.worker.id or f"{socket.gethostname()}-{os.getpid()}"
        self._vendors = {settings.topics.ingress(vendor): vendor for vendor in settings.vendors}
        self._assigned: frozenset[TopicPartition] = frozenset()
        self._had_assignment = False
        self._stopping = False
        self._broker_away = False
        self._pump_started = False
        self._lacking: Sequence[Acl] = []
        self._folder = TemporaryDirectory(prefix="headgate-", ignore_cleanup_errors=True)  # Faust wants one

    async def run(self) -> int:
        settings = self._settings
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[BaseException | None] = loop.create_future()
        self._signals(loop)
        loop.set_exception_handler(self._on_loop_fault)
        self._build(await self._topics())
        await self._health.start()
        log.info("worker_starting", worker=self._name, http_port=self._health.port, version=product_version())
        tasks: list[asyncio.Task[None]] = []
        await self._reader.start()
        self._reader.on_end(self._task_ended)
        await self._first(self._reader.caught_up.wait())
        if not self._ended.done():
            gc.collect()
            gc.freeze()
            gc.set_threshold(200_000, 20, 100)
            tasks = [
                loop.create_task(self._router.rounds(), name="rounds"),
                loop.create_task(self._watch(), name="watch"),
                loop.create_task(self._leases.run(), name="leases"),
            ]
            if settings.kafka.security_protocol != "PLAINTEXT":  # nobody in particular has nothing to lose
                tasks.append(loop.create_task(self._watch_rights(), name="rights"))
            for task in tasks:
                task.add_done_callback(self._task_ended)
            self._lanes.start(self._settle)
            await self._ledger.warm()
            await self._restore_averages()
            try:
                await self._pump.start()
                self._pump_started = True
                self._stage.start()
                await self._app.start()
                log.info("worker_started", worker=self._name, tenants=len(self._tenants))
            except (KafkaError, OSError) as fault:  # the broker went away between reading the registry and joining
                self._end(fault)
        reason = await self._ended
        self._stopping = True
        loop.add_signal_handler(signal.SIGTERM, lambda: os._exit(1))
        loop.add_signal_handler(signal.SIGINT, lambda: os._exit(1))
        code = await self._stop(settings.worker.shutdown_timeout_s, reason)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._folder.cleanup()
        log.info("worker_stopped", worker=self._name, exit=code)
        return code

    # ---------------------------------------------------------------- the parts

    async def _topics(self) -> dict[str, str]:
        """Makes the base topics where they are missing; the first 8 hex digits of each ingress topic's id.

        Raises KafkaFault, also where this worker's user may not do in Kafka what a worker has to.
        """
        loop = asyncio.get_running_loop()
        settings = self._settings
        specs = base_topics(settings.topics, settings.vendors, settings.sizes)

        def make() -> dict[str, str]:
            kafka = settings.kafka.confluent()
            factor = settings.replication_factor
            refuse_lacking(kafka, rights.needed(settings), "worker")
            say = partial(log.info, "topics")
            provision(kafka, specs, replication_factor=factor, grow=frozenset(), say=lambda note: say(note=note))
            return topic_ids(kafka, list(self._vendors))

        return await loop.run_in_executor(None, make)

    def _build(self, ids: Mapping[str, str]) -> None:
        settings = self._settings
        worker = settings.worker
        self._metrics = Metrics(
            tenant_label=worker.tenant_label, type_label=worker.type_label, version=product_version()
        )
        self._registry = Registry(self._master, settings.topics)
        self._registry.on_fault(self._on_registry_fault)
        self._reader = ControlReader(settings, self._registry)
        egress = self._egress = Egress(
            settings.egress_allow, on_blocked=lambda _: self._count_blocked(), bigquery=settings.bigquery
        )
        lanes = self._lanes = Lanes(
            LaneSettings(worker.in_flight, worker.memory_budget_bytes, worker.memory_budget_bytes // 4),
            egress,
            self._metrics,
        )
        self._ledger = Ledger(
            settings.redis.url,
            dedupe_ttl_s=settings.redis.dedupe_ttl_s,
            ledger_ttl_s=settings.redis.ledger_ttl_s,
            deadline_s=settings.redis.deadline_s,
            off_s=settings.redis.off_s,
            on_error=self._count_ledger_error,
        )
        largest = record_bytes(settings.sizes.max_event_bytes)
        self._outbox = Outbox(settings.kafka.confluent(), largest)
        self._settle = Settle(
            self._outbox,
            self._ledger,
            self._metrics,
            settings.topics,
            tiers_s=settings.sizes.retry_tiers_s,
            worker=self._name,
            released=lanes.release,
        )
        prefix = settings.topics.prefix
        self._leases = Leases(lanes, self._ledger, prefix, self._name)
        self._tenants = Tenants(self._registry, lanes, self._metrics, prefix, self._reader.read_to_end)
        max_unknown_bytes = worker.memory_budget_bytes // 4
        retries = Retries(
            self._tenants,
            lanes,
            self._settle,
            self._ledger,
            self._metrics,
            settings.topics,
            settings.sizes.retry_tiers_s,
            max_unknown_bytes,
        )
        self._pump = Pump(
            connection=settings.kafka.aiokafka(),
            group=settings.topics.group("retry"),
            pattern=settings.topics.retry_pattern(settings.vendors),
            tiers_s=settings.sizes.retry_tiers_s,
            on_due=retries.due,
            on_move=retries.move,
            on_fatal=self._end,
            instance_id=worker.id and f"{worker.id}-retry",
            client_id=f"headgate-{self._name}",
            max_bytes=min(HEAP_BUDGET_BYTES, worker.memory_budget_bytes // 4),
            commit_interval_s=worker.commit_interval_s,
        )
        self._stage = Stage(
            kafka=settings.kafka.confluent(),
            group=settings.topics.group("stage"),
            patterns=settings.topics.stage_patterns(settings.vendors),
            topics=settings.topics,
            tenants=self._tenants,
            lanes=lanes,
            settle=self._settle,
            outbox=self._outbox,
            on_fatal=self._end,
            worker=self._name,
            instance_id=worker.id and f"{worker.id}-stage",
            max_record_bytes=largest,
            max_bytes=worker.memory_budget_bytes // 4,
            commit_interval_s=worker.commit_interval_s,
        )
        self._app = self._faust(largest)
        schema_registry = settings.schema_registry
        self._router = Router(
            self._app.reader,
            self._tenants,
            lanes,
            self._settle,
            self._ledger,
            self._metrics,
            vendors=self._vendors,
            topic_ids=dict(ids),
            max_event_bytes=settings.sizes.max_event_bytes,
            worker=self._name,
            max_unknown_bytes=max_unknown_bytes,
            upcasters=self._upcasters,
            schema_registry=None if schema_registry is None else SchemaRegistry(schema_registry),
        )
        others = (self._pump, self._settle, self._outbox, self._router, self._stage, retries)
        lanes.other_held_bytes = lambda: sum([part.held_bytes for part in others])
        self._wire_metrics()
        self._health = Health(
            registry_for(self._metrics),
            host="0.0.0.0",
            port=worker.http_port,
            ready=self._not_ready,
            alive=self._not_alive,
        )

    def _faust(self, largest: int) -> SafeApp:
        settings = self._settings
        app = safe_app(
            group=settings.topics.group("route"),
            bootstrap=settings.kafka.bootstrap,
            datadir=Path(self._folder.name),
            max_record_bytes=largest,
            instance_id=settings.worker.id,
            client_id=f"headgate-{self._name}",
            credentials=_credentials(settings.kafka),
            commit_interval_s=settings.worker.commit_interval_s,
            hooks=Hooks(
                on_assigned=self._on_assigned,
                on_revoked=self._on_revoked,
                on_fatal=self._end,
                full=lambda: self._router.full(),  # which is made after the app
            ),
        )
        for topic in self._vendors:
            app.reads(topic)(self._route)
        return app

    async def _route(self, stream: Any) -> None:
        """The route agent: one Faust event is one fetch of one partition."""
        async for event in stream.noack().events():
            self._router.take(fetch_of(event))

    # ---------------------------------------------------------------- watching the broker and the parts

    async def _watch(self) -> None:
        """Rule 7: with the broker away nothing can be settled, so nothing is fetched and no attempt starts."""
        kept_at = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            outbox = self._outbox
            waiting_bytes = outbox.unacknowledged_bytes + self._settle.missing_bytes
            away = waiting_bytes > BROKER_AWAY_BYTES or outbox.unacknowledged_for_s() > BROKER_AWAY_S
            if away != self._broker_away:
                self._broker_away = away
                log.warning("broker_away" if away else "broker_back", unacknowledged=waiting_bytes)
                if away:
                    self._app.reader.pause_fetch("broker")
                    self._pump.pause("broker")
                    self._stage.pause("broker")
                    self._lanes.stop_starting("broker")
                else:
                    self._app.reader.resume_fetch("broker")
                    self._pump.resume("broker")
                    self._stage.resume("broker")
                    self._lanes.go_on("broker")
            if time.monotonic() - kept_at > AVERAGES_EVERY_S:
                kept_at = time.monotonic()
                await self._keep_averages()

    async def _watch_rights(self) -> None:
        """What may not be read does not come, without a word from the clients: so the broker is asked.

        Nothing is lost by a right that is taken away: what cannot be written stays unsettled, and is written, or read
        again, once it is given back.
        """
        kafka = self._settings.kafka.confluent()
        while not self._stopping:
            await asyncio.sleep(RIGHTS_EVERY_S)
            now = await rights.ask()
            if now is None or now == self._lacking:
                continue
            self._lacking = now
            if now:
                log.error("rights_lacking", fault=lack_of(kafka, now, "worker"))
            else:
                log.info("rights_complete")

    def _average_key(self, name: str) -> str:
        return f"{self._settings.topics.prefix}:average:{name}"

    async def _keep_averages(self) -> None:
        await self._restore_averages()
        kept = {self._average_key(name): value for name, value in self._metrics.averages_to_keep().items()}
        await self._ledger.write(kept)

    async def _restore_averages(self) -> None:
        """What an earlier process learnt, for every average that is younger than that."""
        names = [name for name, _ in self._metrics.unknown_averages()]
        values = await self._ledger.read([self._average_key(name) for name in names])
        if values is not None:
            self._metrics.restore_averages(dict(zip(names, values, strict=True)))

    def _on_loop_fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What a callback raises reaches nobody: its part of the worker has stopped, and what it held would wait for
        ever. (What is said of tasks and futures that nobody asked is not such a fault.)"""
        loop.default_exception_handler(context)
        fault = context.get("exception")
        if "handle" in context and isinstance(fault, Exception) and not self._stopping:
            self._end(fault)

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and not self._stopping:
            self._end(task.exception() or RuntimeError(f"{task.get_name()} ended"))

    def _count_blocked(self) -> None:
        self._metrics.egress_blocked += 1

    def _count_ledger_error(self) -> None:
        self._metrics.ledger_errors += 1

    def _wire_metrics(self) -> None:
        metrics = self._metrics
        metrics.lanes = self._lanes.gauges
        metrics.lag = self._lags
        metrics.gauges = {
            "headgate_held_bytes": lambda: self._lanes.held_bytes + self._lanes.other_held_bytes(),
            "headgate_retry_due": lambda: self._pump.due_waiting,
            "headgate_control_offset": lambda: self._reader.offset,
        }

    def _lags(self) -> Iterable[tuple[str, int, float, float]]:
        now_ms = int(time.time() * 1000)
        for lag in self._app.reader.lags(now_ms):
            age_s = max(0, now_ms - lag.oldest_at_ms) / 1000 if lag.oldest_at_ms is not None else 0.0
            yield lag.topic, lag.partition, lag.unread + lag.unsettled, age_s

    # ---------------------------------------------------------------- readiness

    def _on_registry_fault(self, fault: Fault) -> None:
        """A tenant whose data key does not open must not pass for an unknown one: its events would go to unrouted."""
        if fault.reason == "data_key":
            problem = f"HEADGATE_MASTER_KEY_FILE: no key of it opens {fault.key}; give the one that wrapped it"
            self._end(SettingsError([problem]))

    def _on_assigned(self, partitions: frozenset[TopicPartition]) -> None:
        self._assigned = partitions
        self._had_assignment = True

    def _on_revoked(self, partitions: frozenset[TopicPartition]) -> None:
        self._assigned = self._assigned - partitions

    def _not_ready(self) -> dict[str, str]:
        missing: dict[str, str] = {}
        if not self._reader.caught_up.is_set():
            missing["control"] = "the tenant registry has not caught up"
        if not self._had_assignment:
            missing["ingress"] = "no assignment of " + ", ".join(self._vendors)
        if not self._pump_started:
            missing["retry"] = "the retry pump has not started"
        if self._lacking:
            missing["rights"] = lack_of(self._settings.kafka.confluent(), self._lacking, "worker")
        if self._stopping:
            missing["stopping"] = "the worker is shutting down"
        return missing

    def _not_alive(self) -> dict[str, str]:
        """What a restart would mend. A broker that is away is not among it."""
        missing: dict[str, str] = {}
        if self._ended.done() and not self._stopping:
            missing["fatal"] = "a part of the worker has failed"
        if not self._reader.alive and not self._stopping:
            missing["control"] = "the control reader has ended"
        return missing

    # ---------------------------------------------------------------- the end

    def _signals(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, None)

    def _end(self, reason: BaseException | None) -> None:
        if reason is not None:
            log.error("worker_fault", fault=str(reason) or type(reason).__name__)
        if not self._ended.done():
            self._ended.set_result(reason)

    async def _first(self, awaitable: Any) -> None:
        """Waits for one thing, or for the end."""
        waiting = asyncio.ensure_future(awaitable)
        await asyncio.wait({waiting, self._ended}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()

    async def _stop(self, timeout_s: float, reason: BaseException | None) -> int:
        """Stops fetching, lets what is in flight end, parks the rest, commits. 0 only if all of it was settled."""
        last_resort = threading.Timer(timeout_s, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()
        log.info("worker_stopping", in_flight=self._lanes.in_flight, queued=self._lanes.queued)
        # after a fault of a part there may be nobody left to do what is open: whoever comes next reads it again
        patience_s = max(1.0, timeout_s - LAST_WRITES_S) if reason is None else AFTER_FAULT_S
        self._lanes.drain()
        settled = True
        if self._app.started:
            drained = await asyncio.gather(
                self._app.reader.drain(patience_s), self._pump.drain(patience_s), self._stage.drain(patience_s)
            )
            settled = all(drained) and await self._outbox.flushed(1.0)
            if not settled:
                log.warning(
                    "worker_unsettled",
                    events=self._app.reader.unsettled,
                    retries=self._pump.unsettled,
                    batches=self._stage.unsettled,
                    in_flight=self._lanes.in_flight,
                    queued=self._lanes.queued,
                    unacknowledged=self._outbox.unacknowledged_bytes,
                )
            await asyncio.gather(self._pump.close(), self._stage.close())
            await self._app.stop()
        await self._keep_averages()
        await self._reader.stop()
        await self._router.close()
        await self._lanes.close()
        self._egress.close()
        await self._ledger.close()
        await self._health.stop()
        last_resort.cancel()
        return 0 if settled and reason is None else 1
