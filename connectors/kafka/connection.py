"""One connection to one broker: aiokafka's, with its socket through the door and bounds on what a broker may cost.

Every broker is dialled here, those that a tenant names and those that its cluster advertises, and `Egress.dial` judges
each. aiokafka trusts the broker; this does not: frames have a greatest size, the hashing that a SCRAM login asks for a
greatest length, and whatever cannot be read is the fault `protocol` (held to aiokafka's version by
`tests/connectors/test_kafka_pins.py`).
"""

import asyncio
import errno
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

from aiokafka import conn, errors
from aiokafka.abc import AbstractTokenProvider
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.produce import ProduceRequest
from msgspec import Struct
from pydantic import SecretStr

from connectors.contract import give
from connectors.egress import Egress
from connectors.http.client import ADDRESS_S, OUT_OF_RESOURCES
from connectors.http.door import Address, Blocked, Names
from connectors.kafka.classify import Fault, Step, raised
from schemas.ids import TenantRef

CLIENT_ID: Final = "headgate"
# The largest answer is the list of one topic's partitions: some 50 bytes each.
MAX_FRAME_BYTES: Final = 1024 * 1024
NEEDED: Final = {ProduceRequest.API_KEY: 3, MetadataRequest.API_KEY: 4}
# What Kafka's own client takes.
SCRAM_ITERATIONS: Final = range(4096, 16_384 + 1)


class Login(Struct, frozen=True):
    """How to log in: `mechanism` empty for not at all. `tls` makes the context, None for clear text."""

    tls: Callable[[], ssl.SSLContext] | None
    mechanism: str
    username: str
    password: SecretStr
    tokens: AbstractTokenProvider | None

    @property
    def protocol(self) -> str:
        return ("SASL_" if self.mechanism else "") + ("SSL" if self.tls is not None else "PLAINTEXT")


class _Scram(conn.ScramAuthenticator):  # type: ignore[misc]  # aiokafka is untyped
    def create_salted_password(self, salt: bytes, iterations: int) -> None:
        if iterations not in SCRAM_ITERATIONS:
            raise ValueError("as many iterations as no broker asks for")
        super().create_salted_password(salt, iterations)


class Connection(conn.AIOKafkaConnection):  # type: ignore[misc]
    def __init__(self, egress: Egress, tenant: TenantRef, host: str, port: int, login: Login, timeout_s: float) -> None:
        super().__init__(
            host,
            port,
            client_id=CLIENT_ID,
            request_timeout_ms=timeout_s * 1000,
            security_protocol=login.protocol,
            sasl_mechanism=login.mechanism,
            sasl_plain_username=login.username,
            sasl_plain_password=login.password.get_secret_value(),
            sasl_oauth_token_provider=login.tokens,
        )
        self._egress = egress
        self._tenant = tenant
        self._login = login

    async def connect(self) -> None:
        """Dials, shakes hands and logs in. Raises Fault."""
        login = self._login
        step: Step = "connect"
        with ExitStack() as undo:
            undo.callback(self.close)
            try:
                async with asyncio.timeout(self._request_timeout):
                    made = await _dialled(self._egress, self._tenant, self.host, self.port, tls=login.tls is not None)
                    if login.tls is not None:
                        step = "tls"
                    await self._take_on(made)
                    step = "login"
                    await self._do_version_lookup()
                    if any(self._versions.get(api, (0, 0))[1] < least for api, least in NEEDED.items()):
                        raise Fault("incompatible", "the broker is older than Kafka 1.0", step=step)
                    if login.mechanism:
                        await self._do_sasl_handshake()
            except TimeoutError:
                raise Fault("timeout", step=step) from None
            except (errors.KafkaError, *_UNREADABLE) as fault:
                raise self._meant(fault, step) from fault
            undo.pop_all()

    async def _take_on(self, made: socket.socket) -> None:
        """aiokafka's own way, on a socket that is there."""
        loop = self._loop
        tls = self._login.tls
        self._closed_fut = loop.create_future()
        reader = asyncio.StreamReader(limit=conn.READER_LIMIT, loop=loop)
        protocol = conn.AIOKafkaProtocol(self._closed_fut, reader, loop=loop)
        with ExitStack() as undo:
            undo.callback(made.close)
            try:
                context = tls() if tls is not None else None
                transport, _ = await loop.create_connection(
                    lambda: protocol, sock=made, ssl=context, server_hostname=self.host if context is not None else None
                )
            except OSError as fault:
                raise _broken(fault, "tls" if tls is not None else "connect") from fault
            undo.pop_all()
        self._reader, self._writer, self._protocol = (
            reader,
            asyncio.StreamWriter(transport, protocol, reader, loop),
            protocol,
        )
        self._read_task = self._create_reader_task()

    def authenticator_scram(self) -> _Scram:
        return _Scram(
            loop=self._loop,
            sasl_plain_password=self._sasl_plain_password,
            sasl_plain_username=self._sasl_plain_username,
            sasl_mechanism=self._sasl_mechanism,
        )

    @staticmethod
    async def _read(self_ref: Any) -> None:
        """As aiokafka's, but what is too large or cannot be read ends the connection as a fault of the connection."""
        self = self_ref()
        if self is None:
            return
        reader = self._reader
        del self
        while True:
            (size,) = struct.unpack(">i", await reader.readexactly(4))
            if not 0 <= size <= MAX_FRAME_BYTES:
                raise Unreadable
            frame = await reader.readexactly(size)
            self = self_ref()
            if self is None:
                return
            try:
                self._handle_frame(frame)
            except _UNREADABLE as fault:
                raise Unreadable from fault
            del self

    async def ask(self, request: Any, step: Step) -> Any:
        """The answer to a request. Raises Fault, and is of no more use then: whether the broker has done it is open."""
        try:
            return await self.send(request)
        except TimeoutError:
            meant = Fault("timeout", step=step)
        except (errors.KafkaError, NotImplementedError) as fault:
            meant = self._meant(fault, step)
        self.close()
        meant.uncertain = meant.code != "incompatible"
        raise meant

    def _meant(self, fault: Exception, step: Step) -> Fault:
        cause = fault.__cause__
        if isinstance(cause, Unreadable):
            return Fault("protocol", step=step)
        if isinstance(cause, ssl.SSLError):
            return _broken(cause, "tls")
        if isinstance(fault, NotImplementedError):  # a broker whose versions are all newer, or all older
            return Fault("incompatible", step=step)
        return raised(fault, step)


class Unreadable(ConnectionError):
    """What came is not Kafka's protocol. A ConnectionError: aiokafka writes any other into the log, with what came."""


# what aiokafka's decoders and its logins raise at bytes that they do not expect
_UNREADABLE: Final = (
    ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, struct.error, EOFError,
    NotImplementedError, MemoryError,
)  # fmt: skip


async def _dialled(egress: Egress, tenant: TenantRef, host: str, port: int, *, tls: bool) -> socket.socket:
    """A connected socket to the first address of `host` that may be dialled and can be reached. Raises Fault."""
    names = await _looked_up(egress, tenant, host)
    if names.problem:
        raise Fault("dns", names.problem, step="resolve")
    problem = Fault("unreachable")
    for number, address in enumerate(names.addresses, 1):
        try:
            return await _connected(egress, tenant, address, port, tls=tls, last=number == len(names.addresses))
        except Fault as fault:
            if fault.code == "no_resources":
                raise
            problem = fault
    raise problem


async def _looked_up(egress: Egress, tenant: TenantRef, host: str) -> Names:
    found: asyncio.Future[Names] = asyncio.get_running_loop().create_future()
    return egress.look_up(tenant, host, partial(give, found)) or await found


async def _connected(
    egress: Egress, tenant: TenantRef, address: Address, port: int, *, tls: bool, last: bool
) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        made = egress.dial(tenant, address, port, tls=tls)
    except Blocked as fault:
        raise Fault("egress_blocked", str(fault)) from None
    except OSError as fault:
        raise _broken(fault, "connect") from fault
    with ExitStack() as undo:
        undo.callback(made.close)
        writable: asyncio.Future[None] = loop.create_future()
        loop.add_writer(made.fileno(), give, writable, None)
        try:
            async with asyncio.timeout(None if last else ADDRESS_S):
                await writable
            number = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except TimeoutError:
            number = errno.ETIMEDOUT
        finally:
            loop.remove_writer(made.fileno())
        if number:
            raise _broken(OSError(number, ""), "connect")
        undo.pop_all()
    return made


def _broken(fault: OSError, step: Step) -> Fault:
    """Quotes nothing that the far side sent."""
    match fault:
        case ssl.SSLCertVerificationError():
            return Fault("tls", f"the certificate was not accepted: {fault.verify_message}", step="tls")
        case ssl.SSLError():
            reason = (fault.reason or "the connection was closed").lower().replace("_", " ")
            return Fault("tls", f"TLS failed: {reason}", step="tls")
        case _ if fault.errno in OUT_OF_RESOURCES:
            return Fault("no_resources", step=step)
        case ConnectionRefusedError():
            return Fault("connect_refused", step=step)
        case ConnectionError():
            return Fault("tls" if step == "tls" else "reset", "the connection was closed", step=step)
        case _:
            return Fault("unreachable", step=step)
