"""Questions to a schema registry on a real socket: one for each id, kept for good, and every way of not answering."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from pydantic import SecretStr

from config.settings import SchemaRegistrySettings
from schemas.avro.reader import MAX_SCHEMA_BYTES
from schemas.event import Problem
from streams.schemas import AT_A_TIME, MAX_KEPT_BYTES, QUESTIONS_AT_A_TIME, NoAnswer, SchemaRegistry, Schemas
from tests.schema_registry import FarRegistry, Mode

EVENT = {
    "type": "record",
    "name": "Event",
    "fields": [{"name": "eventType", "type": "string"}, {"name": "payload", "type": "string"}],
}
SILENT: list[Mode] = ["500", "garbled", "no http", "redirects", "closes"]


class Waiter:
    """Stands for the router: what it is told, in its order."""

    def __init__(self, url: str, patience_s: float, max_bytes: int = 1 << 20) -> None:
        self.registry = SchemaRegistry(SchemaRegistrySettings(url))
        self.schemas: Schemas[str] = Schemas(self.registry, self._told, max_bytes, patience_s)
        self.told: list[tuple[str, str]] = []  # (item, code); no code: look again
        self._some = asyncio.Event()

    async def _told(self, items: Sequence[str], problem: Problem | None) -> None:
        self.told += [(item, problem.code if problem is not None else "") for item in items]
        self._some.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not holds():
                self._some.clear()
                await self._some.wait()

    async def learn(self, number: int) -> None:
        """On a slow machine one wait may not do."""
        while not callable(self.schemas.find(number)):
            count = len(self.told)
            self.schemas.wait(number, "learn", 10)
            await self.until(lambda count=count: len(self.told) > count)  # type: ignore[misc]


@asynccontextmanager
async def waiting(far: FarRegistry, patience_s: float = 30.0, **more: int) -> AsyncIterator[Waiter]:
    waiter = Waiter(far.url, patience_s, **more)
    try:
        yield waiter
    finally:
        await waiter.schemas.close()


async def asked_for(far: FarRegistry, number: int, **settings: str) -> str | Problem | NoAnswer:
    user, password = settings.get("user"), settings.get("password")
    registry = SchemaRegistry(SchemaRegistrySettings(far.url, user, password and SecretStr(password)))
    try:
        return await registry.schema(number)
    finally:
        await registry.close()


async def test_many_records_of_one_schema_are_one_question_and_it_is_kept_though_the_registry_goes() -> None:
    async with FarRegistry() as far, waiting(far) as waiter:
        number = far.register(EVENT)
        for item in range(100):
            assert waiter.schemas.find(number) is None
            waiter.schemas.wait(number, f"r{item}", 10)
        assert waiter.schemas.held_bytes > 1000
        await waiter.until(lambda: len(waiter.told) == 100)
        assert waiter.told == [(f"r{item}", "") for item in range(100)]
        assert waiter.schemas.held_bytes == 0
        assert far.asked == [f"/schemas/ids/{number}"]
        await far.go()
        assert callable(waiter.schemas.find(number))
        await far.come()


async def test_what_waited_is_told_in_parts_and_counts_until_its_part_is_through() -> None:
    parts: list[tuple[int, int]] = []

    async def told(items: Sequence[int], problem: Problem | None) -> None:
        parts.append((len(items), schemas.held_bytes))

        if len(parts) == 3:
            all_told.set()

    all_told = asyncio.Event()
    async with FarRegistry() as far:
        schemas: Schemas[int] = Schemas(SchemaRegistry(SchemaRegistrySettings(far.url)), told, 1 << 30)
        number = far.register(EVENT)
        for item in range(2 * AT_A_TIME + 1):
            schemas.wait(number, item, 1000)
        size = schemas.held_bytes // (2 * AT_A_TIME + 1)
        try:
            async with asyncio.timeout(30):
                await all_told.wait()
        finally:
            await schemas.close()
    left = [2 * AT_A_TIME + 1, AT_A_TIME + 1, 1]
    assert parts == [(min(count, AT_A_TIME), size * count) for count in left]


async def test_an_id_that_the_registry_does_not_have_is_told_at_once_and_not_asked_for_again_for_a_while() -> None:
    async with FarRegistry() as far, waiting(far) as waiter:
        waiter.schemas.wait(7, "a", 10)
        await waiter.until(lambda: bool(waiter.told))
        assert waiter.told == [("a", "unknown_schema")]
        found = waiter.schemas.find(7)
        assert isinstance(found, Problem)
        assert found.code == "unknown_schema"
        assert far.asked == ["/schemas/ids/7"]


@pytest.mark.parametrize("mode", ["500", "closes"])
async def test_a_registry_that_does_not_answer_as_one_is_asked_again_until_it_does(mode: Mode) -> None:
    async with FarRegistry() as far, waiting(far) as waiter:
        number = far.register(EVENT)
        far.mode = mode
        waiter.schemas.wait(number, "a", 10)
        await far.questions(2)
        assert waiter.told == []
        far.mode = "up"
        await waiter.until(lambda: bool(waiter.told))
        assert waiter.told == [("a", "")]
        assert callable(waiter.schemas.find(number))


@pytest.mark.parametrize("mode", [*SILENT, "hangs", "away"])
async def test_what_is_not_told_in_time_is_unavailable_and_others_are_told_meanwhile(mode: Mode) -> None:
    async with FarRegistry() as far, waiting(far, patience_s=0.3) as waiter:
        known, unknown = far.register(EVENT), far.register(EVENT)
        await waiter.learn(known)
        waiter.told.clear()
        if mode == "away":
            await far.go()
        else:
            far.mode = mode
        waiter.schemas.wait(unknown, "a", 10)
        assert callable(waiter.schemas.find(known))
        await waiter.until(lambda: bool(waiter.told))
        assert waiter.told == [("a", "schema_unavailable")]
        assert waiter.schemas.find(unknown) is None  # the next one asks anew
        if mode == "away":
            await far.come()
        far.mode = "up"
        await waiter.learn(unknown)
        assert waiter.schemas.held_bytes == 0


async def test_each_record_waits_its_own_time_however_many_questions_hang() -> None:
    async with FarRegistry() as far, waiting(far, patience_s=0.5) as waiter:
        far.mode = "hangs"
        for number in range(1, 10 * QUESTIONS_AT_A_TIME):
            waiter.schemas.wait(number, str(number), 10)
        await waiter.until(lambda: len(waiter.told) == 10 * QUESTIONS_AT_A_TIME - 1)
        assert {code for _, code in waiter.told} == {"schema_unavailable"}
        assert len(far.asked) <= 2 * QUESTIONS_AT_A_TIME


async def test_what_waits_is_bounded_first_by_waiting_for_room_then_by_waiting_for_nothing() -> None:
    async with FarRegistry() as far, waiting(far, patience_s=0.5, max_bytes=50_000) as waiter:
        far.mode = "hangs"
        waiter.schemas.wait(1, "a", 100_000)
        assert waiter.schemas.find(2) is None
        room = asyncio.create_task(waiter.schemas.room())
        await asyncio.sleep(0)
        assert not room.done()  # a registry that is slow holds the others up
        await waiter.until(lambda: bool(waiter.told))
        async with asyncio.timeout(10):
            await room
        waiter.schemas.wait(1, "b", 100_000)  # one that is away does not
        async with asyncio.timeout(10):
            await waiter.schemas.room()
        found = waiter.schemas.find(2)
        assert isinstance(found, Problem)
        assert found.code == "schema_unavailable"
        await waiter.until(lambda: len(waiter.told) == 2)
        assert waiter.schemas.find(2) is None


async def test_schemas_that_cannot_be_read_by_are_told_why() -> None:
    async with FarRegistry() as far, waiting(far) as waiter:
        far.register("{", schemaType="AVRO")
        far.register(EVENT, schemaType="PROTOBUF")
        far.register(EVENT, references=[{"name": "Money", "subject": "money", "version": 1}])
        far.register(" " * MAX_SCHEMA_BYTES + json.dumps(EVENT))
        far.register(" " * 4 * MAX_SCHEMA_BYTES + json.dumps(EVENT))
        far.register(EVENT, schemaType=None, references=None)
        for number in range(1, 7):
            waiter.schemas.wait(number, str(number), 10)
        await waiter.until(lambda: len(waiter.told) == 6)
        found = [waiter.schemas.find(number) for number in range(1, 7)]
        assert isinstance(found[2], Problem)
        assert "register it whole" in found[2].detail
        codes = [one.code if isinstance(one, Problem) else one and "read" for one in found]
        assert codes == ["malformed", "unknown_schema", "unknown_schema", "malformed", "malformed", "read"]


async def test_an_endless_answer_is_cut_off() -> None:
    async with FarRegistry() as far:
        far.mode = "endless"
        told = await asked_for(far, 1)
        assert isinstance(told, Problem)
        assert told.code == "malformed"


async def test_the_oldest_schemas_go_when_too_many_are_kept() -> None:
    async with FarRegistry() as far, waiting(far) as waiter:
        long = json.dumps({**EVENT, "doc": "x" * (MAX_SCHEMA_BYTES - 1000)})
        count = MAX_KEPT_BYTES // len(long) + 2
        for number in range(1, count + 1):
            waiter.schemas.wait(far.register(long), str(number), 10)
            await waiter.until(lambda number=number: len(waiter.told) == number)  # type: ignore[misc]
            assert waiter.schemas.find(1) is not None  # used again and again: it stays
        gone = [number for number in range(1, count + 1) if waiter.schemas.find(number) is None]
        assert 0 < len(gone) < 10
        assert gone == list(range(2, 2 + len(gone)))


async def test_a_user_and_a_password_are_sent_and_nothing_of_them_is_told() -> None:
    async with FarRegistry(user="reader", password="canary") as far:
        far.register(EVENT)
        assert isinstance(await asked_for(far, 1, user="reader", password="canary"), str)
        refused = await asked_for(far, 1, user="reader", password="canary-2")
        assert isinstance(refused, NoAnswer)
        assert "HEADGATE_SCHEMA_REGISTRY_USER" in refused.why
        assert "canary" not in refused.why


async def test_a_certificate_of_nobody_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    async with FarRegistry(tls=context) as far:
        far.register(EVENT)
        assert isinstance(await asked_for(far, 1), NoAnswer)
        assert far.asked == []
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))  # as docs/operating.md says for one of one's own
        assert isinstance(await asked_for(far, 1), str)


async def test_without_a_registry_nothing_waits() -> None:
    schemas: Schemas[str] = Schemas(None, lambda *_: asyncio.sleep(0), 1000)
    found = schemas.find(1)
    assert isinstance(found, Problem)
    assert found.code == "schema_unavailable"
    assert "HEADGATE_SCHEMA_REGISTRY_URL" in found.detail
    await schemas.close()
