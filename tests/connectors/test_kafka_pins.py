"""What we lean on inside aiokafka is what it was when `connectors/kafka/connection.py` was written.

A failure here is no fault by itself: read the change in the library, see that every socket still comes from the door
and that the bounds still hold (`test_kafka_door.py`), and write down the new value that the failure prints.
"""

from importlib.metadata import version
from typing import Any

import pytest
from aiokafka import conn
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.protocol.transaction import InitProducerIdRequest
from aiokafka.record import default_records

from connectors.kafka import connection
from tests.streams.test_faust_pins import fingerprint, parameters

CONNECTION = conn.AIOKafkaConnection

SOURCES: dict[str, tuple[Any, str]] = {
    # what we override
    "connection.__init__": (CONNECTION.__init__, "e8fc2dd10c7d"),
    "connection.connect": (CONNECTION.connect, "c6cc2f2c6539"),
    "connection._read": (CONNECTION._read, "7b892995c0b8"),
    "connection.authenticator_scram": (CONNECTION.authenticator_scram, "31e24e0eab4b"),
    "scram": (conn.ScramAuthenticator, "a406629ef74b"),
    # what we lean on
    "connection._do_version_lookup": (CONNECTION._do_version_lookup, "f163772b18ad"),
    "connection._do_sasl_handshake": (CONNECTION._do_sasl_handshake, "d4f7b5acbbec"),
    "connection._handle_frame": (CONNECTION._handle_frame, "2fb5e26ba651"),
    "connection._on_read_task_error": (CONNECTION._on_read_task_error, "b77014588488"),
    "connection._create_reader_task": (CONNECTION._create_reader_task, "9577a6e84c72"),
    "connection.send": (CONNECTION.send, "126347255413"),
    "connection.close": (CONNECTION.close, "28f164aa1e4f"),
    "connection.connected": (CONNECTION.connected, "e392e7f6dadb"),
    "protocol": (conn.AIOKafkaProtocol, "0f94e2d60152"),
    "plain": (conn.SaslPlainAuthenticator, "01172a32da69"),
    "oauth": (conn.OAuthAuthenticator, "2f9c85babb3f"),
    "ProduceRequest": (ProduceRequest, "c9d2e4599634"),
    "MetadataRequest": (MetadataRequest, "0a2584162e6d"),
    "InitProducerIdRequest": (InitProducerIdRequest, "d84fcc5a50e8"),
    "records": (default_records._DefaultRecordBatchBuilderPy, "6f28721e91e2"),
}
OVERRIDES: dict[type, set[str]] = {
    connection.Connection: {"connect", "_read", "authenticator_scram"},
    connection._Scram: {"create_salted_password"},
}
ATTRIBUTES = {"_egress", "_tenant", "_login"}


def test_the_version_is_that_which_the_connection_was_written_for() -> None:
    assert version("aiokafka") == "0.14.0"


@pytest.mark.parametrize("name", SOURCES)
def test_what_the_connection_overrides_or_leans_on_is_unchanged(name: str) -> None:
    thing, known = SOURCES[name]
    assert fingerprint(thing) == known


@pytest.mark.parametrize("ours", OVERRIDES)
def test_every_override_has_something_to_override_and_no_other_name_of_ours_hides_one_of_theirs(ours: type) -> None:
    parent = ours.__mro__[1]
    for name in OVERRIDES[ours]:
        assert parameters(getattr(ours, name)) == parameters(getattr(parent, name)), name
    beside = {name for name in vars(ours) if not name.startswith("__")} - OVERRIDES[ours]
    assert [name for name in beside | ATTRIBUTES if hasattr(parent, name)] == []
