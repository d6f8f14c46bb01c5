"""Schemas of Avro events: asked for once each, kept, and what waits for them meanwhile (design, section 3, rule 3).

An id of a schema registry stands for one schema for good: what was once read stays, though the registry goes. What a
schema is, and how a record is read by it, is `schemas/avro/reader.py`'s.
"""

import asyncio
import ssl
import time
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

import aiohttp
import msgspec
import structlog
from msgspec import Struct

from config.settings import SchemaRegistrySettings
from schemas.avro.reader import MAX_SCHEMA_BYTES, Envelope, compile_envelope
from schemas.event import Problem
from streams.compiled import AT_A_TIME, UNKNOWN_OVERHEAD_BYTES

log = structlog.get_logger()

T = TypeVar("T")

DEADLINE_S: Final = 5.0
QUESTIONS_AT_A_TIME: Final = 4
AGAIN_S: Final = 1.0
PATIENCE_S: Final = 30.0
ABSENT_FOR_S: Final = 10.0  # what the registry has no Avro schema for is asked for again after that time
MAX_ABSENT: Final = 1000
MAX_ANSWER_BYTES: Final = 4 * MAX_SCHEMA_BYTES  # a schema is a JSON text inside of one
MAX_KEPT_BYTES: Final = 16 * 2**20  # of schemas as text
SAY_AGAIN_S: Final = 30.0

_NO_REGISTRY: Final = Problem(
    "schema_unavailable", "an Avro record, and there is no schema registry: HEADGATE_SCHEMA_REGISTRY_URL is not set"
)


class NoAnswer(Struct, frozen=True):
    """The registry did not answer, or not as one does: ask again."""

    why: str


class _Schema(Struct):
    schema: str
    schemaType: str | None = None
    references: list[msgspec.Raw] | None = None


_decode_schema = msgspec.json.Decoder(_Schema).decode
_decode_types = msgspec.json.Decoder(list[str]).decode


class SchemaRegistry:
    """Questions to a registry that speaks Confluent's API. Each has a deadline and a largest answer."""

    def __init__(self, settings: SchemaRegistrySettings) -> None:
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None

    async def schema(self, number: int) -> str | Problem | NoAnswer:
        """The schema of an id, or why there never is one to read by."""
        found = await self._get(f"/schemas/ids/{number}")
        if isinstance(found, NoAnswer):
            return found
        status, body = found
        if status == 404:
            return Problem("unknown_schema", "the schema registry does not have it")
        if body is None:
            return Problem("malformed", f"the schema has more than {MAX_SCHEMA_BYTES} bytes")
        if status != 200:
            return _refused(status)
        try:
            answer = _decode_schema(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _STRANGE
        if answer.schemaType not in (None, "AVRO"):
            return Problem("unknown_schema", "a schema of another type than AVRO")
        if answer.references:
            return Problem("unknown_schema", "the schema refers to others: register it whole, in one schema")
        return answer.schema

    async def types(self) -> list[str] | NoAnswer:
        """The types of schemas that it takes: whether there is one, and lets us in."""
        found = await self._get("/schemas/types")
        if isinstance(found, NoAnswer):
            return found
        status, body = found
        if status != 200:
            return _refused(status)
        try:
            return _decode_types(body or b"")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _STRANGE

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _get(self, path: str) -> tuple[int, bytes | None] | NoAnswer:
        """Status and body; None for one that is too long. No redirect is followed: it could take the password along."""
        try:
            async with (
                asyncio.timeout(DEADLINE_S),
                self._opened().get(self._settings.url + path, allow_redirects=False) as got,
            ):
                body = bytearray()
                async for chunk in got.content.iter_any():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        got.close()
                        return got.status, None
                return got.status, bytes(body)
        except TimeoutError:
            return NoAnswer(f"no answer within {DEADLINE_S:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as fault:  # ValueError: of an answer that is no HTTP
            return NoAnswer(f"{type(fault).__name__}: {fault}"[:200])

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Accept": "application/vnd.schemaregistry.v1+json", "Accept-Encoding": "identity"}
            user, password = self._settings.user, self._settings.password
            if user is not None and password is not None:
                both = f"{user}:{password.get_secret_value()}".encode()
                headers["Authorization"] = f"Basic {b64encode(both).decode()}"
            self._session = aiohttp.ClientSession(
                auto_decompress=False,  # so that the largest answer is what came over the wire
                connector=aiohttp.TCPConnector(limit=QUESTIONS_AT_A_TIME, ssl=ssl.create_default_context()),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=headers,
            )
        return self._session


_STRANGE: Final = NoAnswer("what answered is no schema registry")


def _refused(status: int) -> NoAnswer:
    more = ": look at HEADGATE_SCHEMA_REGISTRY_USER and _PASSWORD" if status in (401, 403) else ""
    return NoAnswer(f"it answered {status}{more}")


class _Waiting(Struct, Generic[T]):
    until: float
    item: T
    size: int


class Schemas(Generic[T]):
    """The schemas that this process has met, and what waits for those that it has not. Others go on meanwhile."""

    def __init__(
        self,
        registry: SchemaRegistry | None,
        answered: Callable[[Sequence[T], Problem | None], Awaitable[None]],
        max_bytes: int,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`answered` gets what waited, `AT_A_TIME`: to look again, or with what is wrong with it for good.

        `max_bytes` bounds what waits: beyond, who adds is to wait for `room`; but once the registry is known to be
        away, nothing more waits for it. `patience_s`: how long each waits.
        """
        self._registry = registry
        self._patience_s = patience_s
        self._answered = answered
        self._max_bytes = max_bytes
        self._known: OrderedDict[int, tuple[Envelope | Problem, int]] = OrderedDict()
        self._kept_bytes = 0
        self._absent: OrderedDict[int, tuple[float, Problem]] = OrderedDict()
        self._waiting: dict[int, list[_Waiting[T]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(QUESTIONS_AT_A_TIME)
        self._room = asyncio.Event()
        self._room.set()
        self._away = False
        self._said_at = -SAY_AGAIN_S
        self.held_bytes = 0

    async def room(self) -> None:
        await self._room.wait()

    def find(self, number: int) -> Envelope | Problem | None:
        """The reader of a schema, or why there is none; None: not known yet, `wait` for it."""
        if self._registry is None:
            return _NO_REGISTRY
        known = self._known.get(number)
        if known is not None:
            self._known.move_to_end(number)
            return known[0]
        absent = self._absent.get(number)
        if absent is not None and absent[0] > time.monotonic():
            return absent[1]
        if self._away and self.held_bytes > self._max_bytes:
            return Problem("schema_unavailable", "the schema registry is away, and too much waits for it already")
        return None

    def wait(self, number: int, item: T, size: int) -> None:
        """`size` in bytes, without what Python needs for it."""
        size += UNKNOWN_OVERHEAD_BYTES
        self.held_bytes += size
        self._note_room()
        waiting = self._waiting.get(number)
        if waiting is None:
            waiting = self._waiting[number] = []
            task = asyncio.get_running_loop().create_task(self._ask(number, waiting))
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        waiting.append(_Waiting(time.monotonic() + self._patience_s, item, size))

    async def close(self) -> None:
        """What still waits is settled by nobody, and read again by the next worker."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._registry is not None:
            await self._registry.close()

    # ---------------------------------------------------------------- one question

    async def _ask(self, number: int, waiting: list[_Waiting[T]]) -> None:
        """Asks until there is an answer, or nobody waits any more. Each waits for its own 30 s."""
        assert self._registry is not None
        why = "no answer yet"
        while waiting:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + waiting[0].until - time.monotonic()):
                    async with self._slots:
                        answer = await self._registry.schema(number)
            except TimeoutError:  # too many questions before this one
                answer = NoAnswer(why)
            if not isinstance(answer, NoAnswer):
                self._away = False
                del self._waiting[number]
                await self._release(waiting, self._keep(number, answer))
                return
            why = answer.why
            self._say(why)
            now = time.monotonic()
            late = [one for one in waiting if one.until <= now]
            if late:
                self._away = True
                del waiting[: len(late)]
                detail = f"the schema registry did not tell the schema within {self._patience_s:g} s: {why}"
                await self._release(late, Problem("schema_unavailable", detail))
            await asyncio.sleep(min(AGAIN_S, max(0.0, waiting[0].until - now)) if waiting else 0)
        del self._waiting[number]

    def _keep(self, number: int, answer: str | Problem) -> Problem | None:
        """Keeps what is so for good, and what is not for a while; what that means for who asked."""
        if isinstance(answer, Problem) and answer.code == "unknown_schema":
            self._absent[number] = (time.monotonic() + ABSENT_FOR_S, answer)
            if len(self._absent) > MAX_ABSENT:
                self._absent.popitem(last=False)
            return answer
        size = UNKNOWN_OVERHEAD_BYTES + (0 if isinstance(answer, Problem) else len(answer))
        self._known[number] = (answer if isinstance(answer, Problem) else compile_envelope(answer), size)
        self._kept_bytes += size
        while self._kept_bytes > MAX_KEPT_BYTES:
            self._kept_bytes -= self._known.popitem(last=False)[1][1]
        return None

    async def _release(self, waited: Sequence[_Waiting[T]], problem: Problem | None) -> None:
        for first in range(0, len(waited), AT_A_TIME):
            if first:
                await asyncio.sleep(0)  # what is wrong for good is told without waiting for anything
            some = waited[first : first + AT_A_TIME]
            await self._answered([one.item for one in some], problem)
            self.held_bytes -= sum([one.size for one in some])
            self._note_room()

    def _note_room(self) -> None:
        if self._away or self.held_bytes <= self._max_bytes:
            self._room.set()
        else:
            self._room.clear()

    def _say(self, why: str) -> None:
        now = time.monotonic()
        if now - self._said_at >= SAY_AGAIN_S:
            self._said_at = now
            log.warning("schema_registry_silent", fault=why, waiting=sum(map(len, self._waiting.values())))

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # a bug ends the worker (`app.py`): what waited here is settled by nobody else
