"""What we lean on inside faust-streaming and aiokafka is what it was when `streams/transport.py` was written.

A failure here is no fault by itself: read the change in the library, see that the transport still holds (its tests on
the broker, then ADR 0003), and write down the new value that the failure prints.
"""

import hashlib
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiokafka.client
import aiokafka.conn
import aiokafka.consumer.consumer
import aiokafka.consumer.fetcher
import aiokafka.consumer.group_coordinator as coordinator
import aiokafka.consumer.subscription_state as subscription
import faust
import faust.agents.agent
import faust.app.base
import faust.streams
import faust.tables.recovery
import faust.transport.conductor
import faust.transport.consumer as base
import faust.transport.drivers.aiokafka as driver
import mode.services
import mode.threads
import mode.utils.queues
import pytest
from aiokafka.protocol.api import Request
from aiokafka.protocol.commit import OffsetCommitRequest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.record import default_records, memory_records

from streams import fetching, transport

CONSUMER = aiokafka.consumer.consumer.AIOKafkaConsumer
PARTITION_RECORDS = fetching.PartitionRecords.__base__
CONNECTION = fetching.Connection.__base__
FETCHER = aiokafka.consumer.fetcher.Fetcher
RECOVERY = faust.tables.recovery.Recovery
QUEUE = mode.utils.queues.ThrowableQueue
THREAD = driver.AIOKafkaConsumerThread

# what ABC and mode.Service put into every subclass
GENERATED = {"_abc_impl", "logger"}

SOURCES: dict[str, tuple[Any, str]] = {
    # what we override
    "thread._create_worker_consumer": (THREAD._create_worker_consumer, "c2701bfc3e6f"),
    "thread._commit": (THREAD._commit, "932852ce7a23"),
    "consumer._new_consumer_thread": (driver.Consumer._new_consumer_thread, "0870ec53dea7"),
    "consumer.commit": (base.Consumer.commit, "a354437baaa0"),
    "consumer.ack": (base.Consumer.ack, "5fcf41cf4515"),
    "consumer.perform_seek": (base.Consumer.perform_seek, "0e8c130ff4b0"),
    "consumer.resume_flow": (base.Consumer.resume_flow, "db59630f25b5"),
    "consumer.on_partitions_revoked": (base.Consumer.on_partitions_revoked, "d04b7ae72c6f"),
    "consumer.on_partitions_assigned": (base.Consumer.on_partitions_assigned, "29ce96596f05"),
    "consumer.on_task_error": (base.Consumer.on_task_error, "0d7f23d0bb26"),
    "consumer.on_stop": (base.Consumer.on_stop, "45b1d2210ce2"),
    "consumer._drain_messages": (base.Consumer._drain_messages, "44a2500309e8"),
    "app._crash": (mode.services.Service._crash, "7bc0c709a151"),
    "client.send": (aiokafka.client.AIOKafkaClient.send, "246b277687d7"),
    "connection.__init__": (CONNECTION.__init__, "16e2b58e6f2b"),
    "connection.connect": (CONNECTION.connect, "b0f9ba7f0cf6"),
    "connection.send": (CONNECTION.send, "5909ea32f4ef"),
    "connection._handle_frame": (CONNECTION._handle_frame, "46a7d9b8cf7c"),
    "AIOKafkaConsumer.__init__": (CONSUMER.__init__, "01506f316191"),
    # what we lean on
    "AIOKafkaConsumer.start": (CONSUMER.start, "2f1ba7044332"),
    "AIOKafkaConsumer.commit": (CONSUMER.commit, "79b057d88220"),
    "fetcher.fetched_records": (FETCHER.fetched_records, "be4348896b9b"),
    "fetcher._get_actions_per_node": (FETCHER._get_actions_per_node, "1dab2cf937d1"),
    "fetcher._proc_fetch_request": (FETCHER._proc_fetch_request, "59bf948fff47"),
    "fetcher.FetchResult": (fetching.FetchResult.__base__, "d7db13f06de8"),
    "fetcher.PartitionRecords": (PARTITION_RECORDS, "94aa0da0dbec"),
    "records._read_msg": (default_records._DefaultRecordBatchPy._read_msg, "0997ab7a5850"),
    "records.next_batch": (memory_records._MemoryRecordsPy.next_batch, "f1779ecb6d0d"),
    "connection.close": (CONNECTION.close, "28f164aa1e4f"),
    "connection._read": (CONNECTION._read, "7b892995c0b8"),
    "connection._on_read_task_error": (CONNECTION._on_read_task_error, "b77014588488"),
    "create_conn": (aiokafka.conn.create_conn, "673276cbddb4"),
    "FetchRequest": (FetchRequest, "ef21d383f137"),
    "subscription.Assignment": (subscription.Assignment, "ce6859542c70"),
    "subscription.fetch_context": (subscription.SubscriptionState.fetch_context, "ff2a654dca23"),
    "coordinator._send_req": (coordinator.GroupCoordinator._send_req, "fa4b12e914ce"),
    "coordinator.check_errors": (coordinator.GroupCoordinator.check_errors, "ba6ca51ad348"),
    "coordinator._do_heartbeat": (coordinator.GroupCoordinator._do_heartbeat, "dc1d6632aaa6"),
    "coordinator._heartbeat_routine": (coordinator.GroupCoordinator._heartbeat_routine, "61d010289522"),
    "coordinator.request_rejoin": (coordinator.GroupCoordinator.request_rejoin, "f70a261c91c3"),
    "coordinator.__coordination_routine": (
        coordinator.GroupCoordinator._GroupCoordinator__coordination_routine,
        "f814463c6b44",
    ),
    "coordinator.commit_offsets": (coordinator.GroupCoordinator.commit_offsets, "5cbe31af28d6"),
    "coordinator._do_commit_offsets": (coordinator.GroupCoordinator._do_commit_offsets, "c3a3ea5613f3"),
    "coordinator._maybe_leave_group": (coordinator.GroupCoordinator._maybe_leave_group, "016cd88a16e6"),
    "coordinator._on_join_prepare": (coordinator.GroupCoordinator._on_join_prepare, "4d9524afc0ee"),
    "coordinator._on_join_complete": (coordinator.GroupCoordinator._on_join_complete, "0b0b3d204b40"),
    "HeartbeatRequest": (HeartbeatRequest, "61fd1d60122d"),
    "OffsetCommitRequest": (OffsetCommitRequest, "07d8cb363446"),
    "Request": (Request, "1dc66f0574be"),
    "RebalanceListener": (driver.ConsumerRebalanceListener, "f3d04f29dfb3"),
    "fetcher service": (base.Fetcher, "c922e4ab78d9"),
    "consumer._commit_handler": (base.Consumer._commit_handler.fun, "4e5da5df0730"),
    "conductor._update_tp_index": (faust.transport.conductor.Conductor._update_tp_index, "e8e3ac9025ef"),
    "conductor.on_partitions_assigned": (faust.transport.conductor.Conductor.on_partitions_assigned, "616e9729131c"),
    "recovery._resume_streams": (RECOVERY._resume_streams, "d986a6710c1a"),
    "recovery.on_rebalance": (RECOVERY.on_rebalance, "aa4d997a1795"),
    "app._on_partitions_revoked": (faust.app.base.App._on_partitions_revoked, "d5c895bbe57d"),
    "app._on_partitions_assigned": (faust.app.base.App._on_partitions_assigned, "de932b7927db"),
    "app._stop_consumer": (faust.app.base.App._stop_consumer, "55854a5de12c"),
    "app._on_agent_error": (faust.app.base.App._on_agent_error, "bdd12f286de6"),
    "agent._execute_actor": (faust.agents.agent.Agent._execute_actor, "c750b828d2bd"),
    "stream._py_aiter": (faust.streams.Stream._py_aiter, "3a48ee257a65"),
    "queue.clear": (QUEUE.clear, "d18f09e451ac"),
    "queue.get": (QUEUE.get, "57490d393d41"),
    "flow control": (mode.utils.queues.FlowControlEvent, "1da8f905ab65"),
    "call_thread": (mode.threads.QueueServiceThread.call_thread, "479edda75b54"),
}


def fingerprint(thing: Any) -> str:
    return hashlib.sha256(inspect.getsource(inspect.unwrap(thing)).encode()).hexdigest()[:12]


def test_the_compiled_stream_iterator_is_unchanged() -> None:
    source = Path(faust.__file__).with_name("_cython") / "streams.pyx"
    assert hashlib.sha256(source.read_bytes()).hexdigest()[:12] == "0041622f4a25"


def test_the_versions_are_those_the_transport_was_written_for() -> None:
    assert (version("faust-streaming"), version("aiokafka")) == ("0.15.3", "0.14.0")


@pytest.mark.parametrize("name", SOURCES)
def test_what_the_transport_overrides_or_leans_on_is_unchanged(name: str) -> None:
    thing, known = SOURCES[name]
    assert fingerprint(thing) == known


OVERRIDES: dict[type, set[str]] = {
    transport.Consumer: {
        "_new_consumer_thread", "commit", "on_task_error", "ack", "verify_event_path", "perform_seek", "resume_flow",
        "on_partitions_revoked", "on_partitions_assigned", "_drain_messages", "on_stop",
    },
    transport.ConsumerThread: {"_create_worker_consumer", "_commit"},
    transport.Producer: {"_settings_extra"},
    transport.SafeApp: {"_new_transport", "_new_producer_transport", "_crash"},
}  # fmt: skip
ATTRIBUTES = {
    "assigned", "_generation", "_trackers", "_carries", "_valid_from", "_committed", "_read_at_ms", "_buffers",
    "_drawing", "_drawn", "_in_hand", "_held_by", "_released", "_resumable", "_commit_lock", "_all_settled",
    "_fetching", "_hooks", "_revoke_grace_s", "_commit_timeout_s", "_told_fatal",
}  # fmt: skip


def parameters(method: Any) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name != "self"]


@pytest.mark.parametrize("ours", OVERRIDES)
def test_every_override_has_something_to_override_and_takes_what_it_takes(ours: type) -> None:
    parent = ours.__mro__[1]
    for name in OVERRIDES[ours]:
        assert parameters(vars(ours)[name]) == parameters(getattr(parent, name)), name


@pytest.mark.parametrize("ours", OVERRIDES)
def test_no_other_name_of_ours_hides_one_of_theirs(ours: type) -> None:
    """A new version that has a method of that name would call ours."""
    parent = ours.__mro__[1]
    beside = {name for name in vars(ours) if not name.startswith("__")} - OVERRIDES[ours] - GENERATED
    assert [name for name in beside | ATTRIBUTES if hasattr(parent, name)] == []


def test_the_broker_s_fencing_code_is_still_unknown_to_aiokafka() -> None:
    """When this fails aiokafka has learnt about static members: then `_StaticMemberClient` may go."""
    from aiokafka.errors import UnknownError, for_code

    assert for_code(transport.FENCED_INSTANCE_ID) is UnknownError
    assert "group_instance_id" not in inspect.signature(HeartbeatRequest.__init__).parameters
    assert "group_instance_id" not in inspect.signature(OffsetCommitRequest.__init__).parameters
