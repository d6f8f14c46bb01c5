"""What Redis remembers: which events have been seen, and how far each delivery has come (design, section 6).

Owns the two memories, their keys and the rule that Redis is never needed: a call has 50 ms; one that fails switches
Redis off for a second, and until then every question is answered with `None`: duplicates may pass, nothing stops.
Redis holds hashes and positions only. One call a batch each way: 2 us a key, against 50-110 us awaited singly.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
import redis.asyncio
import structlog
from redis.exceptions import NoScriptError, RedisError

from routing.share import LEASE_S
from schemas.ids import TenantRef, base32, digest, parts

log = structlog.get_logger()

DONE: Final = "d"  # what it is told
# what it answers, of an event or a delivery
GO_ON: Final = ord("1")
WAS_DONE: Final = ord("d")
STALE: Final = ord("s")
SLICE_S: Final = 0.005
FIRST_CALL_S: Final = 2.0
CONNECTIONS: Final = 8

# Keys and values travel as one msgpack blob; Redis's cmsgpack reads `str`, not `bin`.
# Answers one character a question. Events: '1' first seen here or at this same position, '0' a duplicate.
# Deliveries: '1' go on, 'd' delivered before, 's' stale: a copy with a higher or equal hop has a successor.
_ASK: Final = """
local a = cmsgpack.unpack(ARGV[1])
local ek, ep, lk, lh, ttl = a[1], a[2], a[3], a[4], a[5]
local r = {}
for i = 1, #ek do
  if redis.call('SET', ek[i], ep[i], 'NX', 'EX', ttl) then r[i] = '1'
  elseif redis.call('GET', ek[i]) == ep[i] then r[i] = '1'
  else r[i] = '0' end
end
local n = #ek
for i = 1, #lk do
  local v = redis.call('GET', lk[i])
  if not v then r[n + i] = '1'
  elseif v == 'd' then r[n + i] = 'd'
  elseif tonumber(v) >= lh[i] then r[n + i] = 's'
  else r[n + i] = '1' end
end
return table.concat(r)
"""

# Values: 'd' or a hop; a hop never replaces 'd' nor a higher hop.
_TELL: Final = """
local a = cmsgpack.unpack(ARGV[1])
local k, v, ttl = a[1], a[2], a[3]
for i = 1, #k do
  if v[i] == 'd' then redis.call('SET', k[i], 'd', 'EX', ttl)
  else
    local old = redis.call('GET', k[i])
    if not old or (old ~= 'd' and tonumber(old) < tonumber(v[i])) then redis.call('SET', k[i], v[i], 'EX', ttl) end
  end
end
return 1
"""

# Tokens of rates, as GCRA: each key holds the time (us, Redis's clock) up to which all that was given is paid for; no
# more is given ahead of now than `ahead`. Answers the number of tokens a key, of as many as were asked for.
_LEASE: Final = """
local a = cmsgpack.unpack(ARGV[1])
local k, n, every, ahead = a[1], a[2], a[3], a[4]
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local r = {}
for i = 1, #k do
  local paid = tonumber(redis.call('GET', k[i]) or 0)
  if paid < now then paid = now end
  local free = math.floor((now + ahead - paid) / every[i]) + 1
  local given = math.max(0, math.min(n[i], free))
  if given > 0 then
    paid = paid + given * every[i]
    redis.call('SET', k[i], string.format('%.0f', paid), 'PX', math.ceil((paid - now) / 1000) + 1000)
  end
  r[i] = given
end
return r
"""

# Who is there: a worker says so, and hears how many have within so many seconds.
_COUNT: Final = """
local a = cmsgpack.unpack(ARGV[1])
local t = redis.call('TIME')
redis.call('ZADD', a[1], t[1], a[2])
redis.call('ZREMRANGEBYSCORE', a[1], 0, t[1] - a[3])
redis.call('EXPIRE', a[1], a[3])
return redis.call('ZCARD', a[1])
"""

_pack = msgspec.msgpack.Encoder().encode


def tenant_space(prefix: str, tenant: TenantRef) -> str:
    """What every key of a tenant starts with: its vendor, and a hash in place of its name."""
    return f"{prefix}:{tenant.vendor}:{base32(digest(parts(tenant.vendor, tenant.tenant)))}"


class Answers(msgspec.Struct, frozen=True, gc=False):
    """`events[i]`: `GO_ON`, else a duplicate. `deliveries[i]`: `GO_ON`, `WAS_DONE` or `STALE`."""

    events: bytes
    deliveries: bytes
    clean: bool


class Ledger:
    """The two memories. `None` from `ask` means that Redis did not answer: everything goes on."""

    def __init__(
        self,
        url: str,
        *,
        dedupe_ttl_s: float,
        ledger_ttl_s: float,
        deadline_s: float = 0.05,
        off_s: float = 1.0,
        on_error: Callable[[], None],
    ) -> None:
        # who finds all connections taken waits for one, within its 50 ms: other pools refuse, which looks like a fault
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=None, socket_connect_timeout=1.0, socket_timeout=5.0
        )
        self._redis = redis.asyncio.Redis.from_pool(pool)
        self._dedupe_ttl_s = int(dedupe_ttl_s)
        self._ledger_ttl_s = int(ledger_ttl_s)
        self._deadline_s = deadline_s
        self._off_s = off_s
        self._on_error = on_error
        self._off_until = 0.0
        self._shas: dict[str, str] = {}

    @property
    def is_on(self) -> bool:
        return time.monotonic() >= self._off_until

    async def warm(self) -> None:
        """Connects and loads the scripts, which the first call of a busy worker would not manage in its 50 ms."""
        usual_s, self._deadline_s = self._deadline_s, FIRST_CALL_S
        try:
            await self.tell((), ())
            await self.ask((), (), (), ())
        finally:
            self._deadline_s = usual_s

    async def ask(
        self, event_keys: Sequence[str], positions: Sequence[str], delivery_keys: Sequence[str], hops: Sequence[int]
    ) -> Answers | None:
        """Claims each event for its position, and asks how far each delivery has come. One call."""
        answer = await self._call(_ASK, _pack((event_keys, positions, delivery_keys, hops, self._dedupe_ttl_s)))
        if not isinstance(answer, bytes) or len(answer) != len(event_keys) + len(delivery_keys):
            return None
        events, deliveries = answer[: len(event_keys)], answer[len(event_keys) :]
        return Answers(events, deliveries, answer.count(b"1") == len(answer))

    async def tell(self, delivery_keys: Sequence[str], values: Sequence[str]) -> bool:
        """Writes `DONE`, or the highest hop whose successor is acknowledged. False: not written."""
        return await self._call(_TELL, _pack((delivery_keys, values, self._ledger_ttl_s))) is not None

    async def lease(self, keys: Sequence[str], tokens: Sequence[int], per_s: Sequence[float]) -> list[int] | None:
        """Up to so many tokens of each rate: all workers together get no more than it, and LEASE_S of it ahead."""
        every_us = [1e6 / rate for rate in per_s]
        given = await self._call(_LEASE, _pack((keys, tokens, every_us, LEASE_S * 1e6)))
        return given if isinstance(given, list) and len(given) == len(keys) else None

    async def count_workers(self, key: str, worker: str, within_s: int) -> int | None:
        """How many workers have said under this key that they are there, this one included."""
        found = await self._call(_COUNT, _pack((key, worker, within_s)))
        return found if isinstance(found, int) else None

    async def read(self, keys: Sequence[str]) -> list[bytes | None] | None:
        """Plain values, for what is kept over restarts besides the two memories."""
        found = await self._guard(lambda: self._redis.mget(keys)) if keys else []
        return found if isinstance(found, list) else None

    async def write(self, values: dict[str, str]) -> bool:
        return bool(values) and await self._guard(lambda: self._redis.mset(values)) is not None

    async def _call(self, script: str, argument: bytes) -> object:
        async def run() -> object:
            sha = self._shas.get(script)
            if sha is None:
                sha = self._shas[script] = str(await self._redis.script_load(script))
            try:
                return await self._redis.evalsha(sha, 0, argument)
            except NoScriptError:  # flushed or restarted
                self._shas.clear()
                return await self._redis.eval(script, 0, argument)

        return await self._guard(run)

    async def _guard(self, call: Callable[[], Awaitable[object]]) -> object:
        if not self.is_on:
            self._on_error()
            return None
        task = asyncio.ensure_future(call())
        try:
            left_s = self._deadline_s  # of a loop that runs: its own stalls are not Redis's, and count as one slice
            while left_s > 0 and not task.done():
                await asyncio.wait({task}, timeout=SLICE_S)
                left_s -= SLICE_S
            if not task.done():
                task.cancel()
                raise TimeoutError
            return task.result()
        except (RedisError, OSError, TimeoutError) as fault:
            self._off_until = time.monotonic() + self._off_s
            self._on_error()
            log.warning("redis_off", for_s=self._off_s, fault=type(fault).__name__)
            return None

    async def close(self) -> None:
        await self._redis.aclose()
