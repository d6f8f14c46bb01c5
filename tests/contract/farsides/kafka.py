"""A Kafka broker on loopback that misbehaves on demand: what this kind asks of one, spoken in Kafka's own protocol.

It asks for a password, keeps records in memory, and holds every producer to its sequence, as brokers do.
What a real broker makes of the same is asked in `tests/secured/test_kafka_sink.py`.
"""

import asyncio
import struct
from collections.abc import Mapping, Sequence
from io import BytesIO
from ipaddress import ip_network
from typing import Any

import msgspec
from aiokafka.protocol.admin import (
    ApiVersionResponse_v0,
    SaslAuthenticateRequest_v0,
    SaslAuthenticateResponse_v0,
    SaslHandShakeResponse_v1,
)
from aiokafka.protocol.metadata import MetadataRequest_v4, MetadataResponse_v4
from aiokafka.protocol.produce import ProduceRequest_v7, ProduceResponse_v7
from aiokafka.protocol.transaction import InitProducerIdResponse_v0
from aiokafka.record.memory_records import MemoryRecords

from schemas.ids import DeliveryId
from schemas.outcome import Verdict
from tests.contract.far_side import CANARY, Held, Mode

TOPIC = "orders"
PASSWORD = f"{CANARY}-password"
PARTITIONS = 3

PRODUCE, METADATA, HANDSHAKE, VERSIONS, INIT_PRODUCER, AUTHENTICATE = 0, 3, 17, 18, 22, 36
VERSIONS_SPOKEN = [
    (PRODUCE, 7, 7), (METADATA, 4, 4), (HANDSHAKE, 1, 1), (VERSIONS, 0, 0), (INIT_PRODUCER, 0, 0), (AUTHENTICATE, 0, 0),
]  # fmt: skip
INVALID_RECORD = 87
LOST = -99  # it is stored, but the answer is lost
_ERRORS = {Mode.THROTTLED: 89, Mode.DENIED: 29, Mode.REFUSES: 10}


class _Body(msgspec.Struct):
    payload: msgspec.Raw


class Stored(msgspec.Struct):
    partition: int
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


class KafkaFarSide:
    allow = (ip_network("127.0.0.0/8"),)
    retry_after_s = 0.0
    # a late grant must not kill a backlog; and nothing in Kafka says that a topic will never be there again
    differs: Mapping[Mode, Verdict | None] = {Mode.DENIED: "retry", Mode.GONE: None}

    def __init__(self) -> None:
        self.stored: list[Stored] = []
        self.logins = 0
        self.requests: list[tuple[int, bytes]] = []  # API and body, without the first two of a connection
        self.brokers: list[tuple[int, str, int]] = []  # that are advertised instead of this one, each leads a partition
        self.most_records = 1 << 30  # in a batch, beyond which it is too large
        self.poison = b""  # a record that holds it is refused, and with it its batch
        self.throttle_ms = 0
        self.forgetful = False  # it does not look at the sequence
        # to the next produce requests, instead of what the mode says: an error, or `LOST`
        self.answers: list[int] = []
        self.tokens: set[str] = set()  # that OAUTHBEARER accepts
        self._mode = Mode.UP
        self._touched = 0
        self._port = 0
        self._server: asyncio.Server | None = None
        self._peers: set[asyncio.StreamWriter] = set()
        self._producers = 0
        self._sequences: dict[tuple[int, int], dict[int, int]] = {}  # by producer and partition: sequence to offset
        self._next: dict[tuple[int, int], int] = {}
        self._ends = [0] * PARTITIONS

    @property
    def port(self) -> int:
        return self._port

    @property
    def connections(self) -> int:
        return len(self._peers)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.drop()

    def drop(self) -> None:
        """Ends every connection."""
        for peer in self._peers:
            peer.transport.abort()

    async def become(self, mode: Mode) -> None:
        self._mode = mode
        if mode is Mode.DOWN:
            await self.stop()
        elif self._server is None:
            await self.start()

    def options(self) -> Mapping[str, Any]:
        return {
            "bootstrap": f"127.0.0.1:{self._port}",
            "topic": TOPIC,
            "tls": False,
            "sasl": "plain",
            "username": "acme",
            "timeout": "500ms",
        }

    def secrets(self) -> Mapping[str, Any]:
        return {"password": PASSWORD}

    def held(self) -> Sequence[Held]:
        return [
            Held(
                DeliveryId(dict(one.headers)["deliveryId"].decode()),
                bytes(msgspec.json.decode(one.value, type=_Body).payload),
            )
            for one in self.stored
        ]

    def touched(self) -> int:
        return self._touched

    # ---------------------------------------------------------------- the protocol

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peers.add(writer)
        try:
            while True:
                (size,) = struct.unpack(">i", await reader.readexactly(4))
                frame = BytesIO(await reader.readexactly(size))
                api, _, correlation, client = struct.unpack(">hhih", frame.read(10))
                frame.read(client)
                answer = self._answer(api, frame, writer)
                if isinstance(answer, bytes):
                    writer.write(answer)
                elif answer is not None:
                    body = struct.pack(">i", correlation) + answer.encode()
                    writer.write(struct.pack(">i", len(body)) + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._peers.discard(writer)
            writer.close()

    def _answer(self, api: int, frame: BytesIO, writer: asyncio.StreamWriter) -> Any:
        if api not in (VERSIONS, HANDSHAKE):
            self.requests.append((api, frame.getvalue()))
        match api:
            case 18:
                return ApiVersionResponse_v0(0, VERSIONS_SPOKEN)
            case 17:
                return SaslHandShakeResponse_v1(0, ["PLAIN", "OAUTHBEARER"])
            case 36:
                return self._authenticated(SaslAuthenticateRequest_v0.decode(frame).sasl_auth_bytes)
            case 3:
                asked = MetadataRequest_v4.decode(frame)
                assert (asked.topics, asked.allow_auto_topic_creation) == ([TOPIC], False)
                return self._metadata()
            case 22:
                self._producers += 1
                return InitProducerIdResponse_v0(0, 0, self._producers, 0)
            case 0:
                return self._produced(ProduceRequest_v7.decode(frame), writer)
        raise AssertionError(f"nobody asks for API {api}")

    def _authenticated(self, told: bytes) -> Any:
        self.logins += 1
        bearer = told.removeprefix(b"n,,\x01auth=Bearer ").removesuffix(b"\x01\x01").decode()
        if told == f"acme\0acme\0{PASSWORD}".encode() or bearer in self.tokens:
            return SaslAuthenticateResponse_v0(0, None, b"")
        return SaslAuthenticateResponse_v0(58, f"wrong: {CANARY}", b"")

    def _metadata(self) -> Any:
        brokers = [(*broker, None) for broker in self.brokers or [(7, "127.0.0.1", self._port)]]
        count = max(PARTITIONS, len(brokers))
        leaders = [brokers[number % len(brokers)][0] for number in range(count)]
        partitions = [(0, number, leader, [leader], [leader]) for number, leader in enumerate(leaders)]
        return MetadataResponse_v4(0, brokers, "cluster", 7, [(0, TOPIC, False, partitions)])

    def _produced(self, asked: Any, writer: asyncio.StreamWriter) -> Any:
        assert asked.required_acks == -1
        ((topic, parts),) = asked.topics
        assert topic == TOPIC
        if any(content for _, content in parts):
            self._touched += 1
            match self.answers.pop(0) if self.answers else self._mode:
                case -99:
                    for number, content in parts:
                        self._append(number, content)
                    writer.transport.abort()
                    return None
                case Mode.RESETS:
                    writer.transport.abort()
                    return None
                case Mode.HANGS:
                    return None
                case Mode.GARBLED:
                    return b"\x16\x03\x01 this is no Kafka\r\n\r\n"
                case Mode.UP | Mode.DOWN:
                    pass
                case int(error):
                    return self._ends_of([(number, error, -1) for number, _ in parts])
                case mode:
                    return self._ends_of([(number, _ERRORS[mode], -1) for number, _ in parts])
        return self._ends_of([(number, *self._append(number, content)) for number, content in parts])

    def _ends_of(self, ends: list[tuple[int, int, int]]) -> Any:
        partitions = [(number, error, offset, -1, 0) for number, error, offset in ends]
        return ProduceResponse_v7([(TOPIC, partitions)], self.throttle_ms)

    def _append(self, number: int, content: bytes) -> tuple[int, int]:
        """Error and offset, by the rules of an idempotent producer."""
        if not content:
            return INVALID_RECORD, -1
        batch = MemoryRecords(content).next_batch()
        key = (batch.producer_id, number)
        known = self._sequences.setdefault(key, {})
        if batch.base_sequence in known and not self.forgetful:
            return 0, known[batch.base_sequence]
        if batch.base_sequence != self._next.get(key, 0) and not self.forgetful:
            return 45, -1
        records = [
            Stored(number, one.key, one.value, [(name, bytes(value)) for name, value in one.headers]) for one in batch
        ]
        if len(records) > self.most_records:
            return 10, -1
        if self.poison and any(self.poison in one.value for one in records):
            return INVALID_RECORD, -1
        self._next[key] = batch.base_sequence + len(records)
        known[batch.base_sequence] = self._ends[number]
        self._ends[number] += len(records)
        self.stored += records
        return 0, known[batch.base_sequence]


FAR_SIDE = KafkaFarSide
