"""A tenant's cluster as one destination sees it: who leads the partitions of its topic, and the connections there."""

import asyncio
from typing import Any, Final, TypeAlias

from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.transaction import InitProducerIdRequest
from msgspec import Struct

from connectors.egress import Egress
from connectors.http.place import parse_host
from connectors.kafka.classify import LOADING, Fault, Step, fault_of
from connectors.kafka.connection import Connection, Login
from schemas.ids import TenantRef

Place: TypeAlias = tuple[str, int]

# Each leader is dialled: who runs the cluster must not make this process dial, or hold, whatever it lists.
MAX_LEADERS: Final = 128
MAX_PARTITIONS: Final = 10_000
LOADING_S: Final = 0.1
_NO_TIMEOUT: Final = 2**31 - 1


class Reach(Struct, frozen=True):
    """How a destination's cluster is reached."""

    egress: Egress
    tenant: TenantRef
    bootstrap: tuple[Place, ...]
    topic: str
    login: Login
    timeout_s: float


class Cluster:
    """Its connections belong to one destination for their whole life: nothing is shared between tenants."""

    def __init__(self, reach: Reach) -> None:
        self.leaders: list[Place | None] = []
        """By partition; None: it has none now."""
        self._reach = reach
        self._dials: dict[Place, asyncio.Task[Connection]] = {}

    async def ask(self, place: Place, request: Any, step: Step) -> Any:
        """The answer of the broker at a place. Raises Fault."""
        connection = await self._connection(place)
        return await connection.ask(request, step)

    def hang_up(self, place: Place) -> None:
        """What waits for an answer from there gets none."""
        dial = self._dials.pop(place, None)
        if dial is not None:
            _end(dial)

    def close(self) -> None:
        for place in list(self._dials):
            self.hang_up(place)

    async def _connection(self, place: Place) -> Connection:
        dial = self._dials.get(place)
        if dial is None or (dial.done() and not _usable(dial)):
            dial = self._dials[place] = asyncio.get_running_loop().create_task(self._dial(place))
        try:
            return await asyncio.shield(dial)
        except asyncio.CancelledError:
            if dial.cancelled():  # somebody hung up
                raise Fault("closed") from None
            raise

    async def _dial(self, place: Place) -> Connection:
        reach = self._reach
        made = Connection(reach.egress, reach.tenant, *place, reach.login, reach.timeout_s)
        await made.connect()
        return made

    async def look(self) -> None:
        """Learns who leads, from the first broker that tells. Raises the last broker's Fault."""
        known = dict.fromkeys(place for place in self.leaders if place is not None)
        problem = Fault("unavailable", step="topic")
        for place in (*known, *self._reach.bootstrap):
            try:
                answer = await self.ask(place, MetadataRequest([self._reach.topic], False), "topic")
                self.leaders = self._read(answer)
            except Fault as fault:
                problem = fault
                continue
            except (TypeError, ValueError):  # a list that is null, a host that is none
                problem = Fault("protocol", step="topic")
                continue
            for spare in self._dials.keys() - set(self.leaders):  # such as that to a load balancer
                self.hang_up(spare)
            return
        raise problem

    def _read(self, answer: Any) -> list[Place | None]:
        brokers: dict[int, Place] = {node: (_host(host), port) for node, host, port, *_ in answer.brokers}
        # error, name, [internal from version 1], partitions; of which: error, number, leader, …
        number, name, *_, partitions = answer.topics[0] if len(answer.topics) == 1 else (-1, "", ())
        if number:
            raise fault_of(number, "topic")
        leaders = {one[1]: brokers.get(one[2]) for one in partitions}
        if name != self._reach.topic or not leaders or leaders.keys() != set(range(len(partitions))):
            raise Fault("protocol", step="topic")
        if len(leaders) > MAX_PARTITIONS or len(set(leaders.values())) > MAX_LEADERS:
            most = f"at most {MAX_PARTITIONS} partitions led by {MAX_LEADERS} brokers can be served"
            raise Fault("incompatible", most, step="topic")
        return [leaders[partition] for partition in range(len(partitions))]

    async def producer_id(self) -> tuple[int, int]:
        """A new id and its epoch, from which a sequence of numbers begins at each partition. Raises Fault."""
        place = next((place for place in self.leaders if place is not None), None)
        if place is None:
            raise Fault("unavailable", step="topic")
        ends = asyncio.get_running_loop().time() + self._reach.timeout_s
        while True:
            answer = await self.ask(place, InitProducerIdRequest(None, _NO_TIMEOUT), "write")
            if not answer.error_code:
                return answer.producer_id, answer.producer_epoch
            if answer.error_code != LOADING or asyncio.get_running_loop().time() > ends:
                raise fault_of(answer.error_code)
            await asyncio.sleep(LOADING_S)  # the first to ask a broker, which gets ids of its own meanwhile


def _host(advertised: str) -> str:
    """Raises ValueError for what is no host."""
    return parse_host(advertised, bracketed=":" in advertised)


def _usable(dial: "asyncio.Task[Connection]") -> bool:
    if not dial.done():
        return True
    return not dial.cancelled() and dial.exception() is None and dial.result().connected()


def _end(dial: "asyncio.Task[Connection]") -> None:
    if not dial.done():
        dial.cancel()
    elif not dial.cancelled() and dial.exception() is None:
        dial.result().close()
