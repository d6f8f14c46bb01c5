"""No row lost and none twice, whatever ends between any two steps: against the emulator's own streams and offsets.

Here stands for the pipeline what the stage does: a batch is delivered again as it was, with what was noted last, until
no outcome is `retry`.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from msgspec import structs

from connectors.bigquery import encode
from connectors.contract import NotOwned
from schemas.delivery import Delivery
from schemas.ids import DeliveryId
from schemas.outcome import Outcome
from tests.bigquery_proxy import MUTE
from tests.connectors.bigqueries import POISON, Kept, connected, delivery, held, poisoned, until_settled
from tests.contract.farsides.bigquery import BigQueryFarSide


@pytest.fixture
async def far() -> AsyncIterator[BigQueryFarSide]:
    made = BigQueryFarSide()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of two or three rows, so that a batch takes several."""
    monkeypatch.setattr(encode, "REQUEST_BYTES", 600)


# ---------------------------------------------------------------- killed between any two steps


BATCHES: Mapping[str, tuple[Delivery, ...]] = {
    "several requests": tuple(delivery(number) for number in range(6)),
    "refused rows": tuple((poisoned if number in (0, 3) else delivery)(number) for number in range(5)),
}
# In full, every await there is; in small, every fourth.
EVERY = [4, pytest.param(1, marks=pytest.mark.chaos("R12"))]


class Steps:
    """Runs one coroutine, and kills it, or lets it stall, when it has waited for the n-th time."""

    def __init__(self, end_at: int, *, stall: bool = False) -> None:
        self.count = 0
        self.stalled = asyncio.Event()
        self.go_on = asyncio.Event()
        self._end_at = end_at
        self._stall = stall

    async def run(self, coroutine: Any) -> Any:
        return await _Stepped(coroutine, self)

    async def after(self) -> None:
        self.count += 1
        if self.count != self._end_at:
            return
        if not self._stall:
            raise asyncio.CancelledError
        self.stalled.set()
        await self.go_on.wait()


class _Stepped:
    def __init__(self, coroutine: Any, steps: Steps) -> None:
        self._coroutine, self._steps = coroutine, steps

    def __await__(self) -> Any:
        waiting = self._coroutine.__await__()
        answer: Any = None
        while True:
            try:
                step = waiting.send(answer)
            except StopIteration as end:
                return end.value
            try:
                answer = yield step
                yield from self._steps.after().__await__()
            except BaseException as fault:
                try:
                    waiting.throw(fault)
                except StopIteration as end:
                    return end.value
                raise


def named_anew(deliveries: tuple[Delivery, ...], run: int) -> tuple[Delivery, ...]:
    return tuple(structs.replace(one, id=DeliveryId(f"{one.id[:-6]}{run:03}{one.id[-3:]}")) for one in deliveries)


def good(deliveries: tuple[Delivery, ...]) -> list[str]:
    return [one.id for one in deliveries if POISON not in bytes(one.event.payload)]


def check_ends(ends: Mapping[DeliveryId, Outcome], deliveries: tuple[Delivery, ...], run: int) -> None:
    assert {ident for ident, end in ends.items() if end.verdict == "delivered"} == set(good(deliveries)), run
    assert all(end.code in ("ok", "refused") for end in ends.values()), run


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("kept_stream", [False, True])
@pytest.mark.parametrize("name", BATCHES)
async def test_a_batch_that_is_killed_at_any_await_is_stored_once(
    far: BigQueryFarSide, pieces: None, name: str, kept_stream: bool, every: int
) -> None:
    far.proxy.poison = POISON
    expected: list[str] = []
    for run in range(1, 1000, every):
        deliveries, kept, steps, connector = named_anew(BATCHES[name], run), Kept(), Steps(run), connected(far)
        if kept_stream:
            before = named_anew((delivery(999),), run)
            await connector.deliver(Kept().batch(*before))
            expected += good(before)
        try:
            await steps.run(connector.deliver(kept.batch(*deliveries)))
            ended = True
        except asyncio.CancelledError:
            ended = False
        kept.owner += 1
        # by another worker, or by this very connector, whose runner gave up on it
        by = connector if kept_stream else None
        check_ends(await until_settled(far, kept, *deliveries, by=by), deliveries, run)
        await connector.close()
        expected += good(deliveries)
        if ended:
            break
    assert Counter(held(far.proxy)) == Counter(expected)
    assert run > 10


async def stalled_everywhere(far: BigQueryFarSide, batch: tuple[Delivery, ...], every: int) -> list[str]:
    """Stalls an owner at each await in turn, lets another one deliver, and the first go on; what should be stored."""
    far.proxy.poison = POISON
    expected: list[str] = []
    for run in range(1, 1000, every):
        deliveries, kept, connector = named_anew(batch, run), Kept(), connected(far)
        steps = Steps(run, stall=True)
        old = asyncio.create_task(steps.run(connector.deliver(kept.batch(*deliveries))))
        stalled = asyncio.create_task(steps.stalled.wait())
        await asyncio.wait({old, stalled}, return_when=asyncio.FIRST_COMPLETED)
        ended = not stalled.done()
        stalled.cancel()
        kept.owner += 1
        check_ends(await until_settled(far, kept, *deliveries), deliveries, run)
        steps.go_on.set()
        try:
            await old
        except NotOwned:
            pass
        await connector.close()
        expected += good(deliveries)
        if ended:
            break
    assert run > 10
    return expected


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("name", BATCHES)
async def test_an_owner_that_stalls_at_any_await_and_goes_on_later_stores_nothing_twice(
    far: BigQueryFarSide, pieces: None, name: str, every: int
) -> None:
    expected = await stalled_everywhere(far, BATCHES[name], every)
    assert Counter(held(far.proxy)) == Counter(expected)


async def test_control_a_stream_that_is_not_ended_takes_the_rows_of_a_stalled_owner_too(
    far: BigQueryFarSide, pieces: None
) -> None:
    far.proxy.fences = False
    expected = await stalled_everywhere(far, BATCHES["several requests"], 1)
    assert set(held(far.proxy)) == set(expected)
    assert max(Counter(held(far.proxy)).values()) == 2


async def test_control_a_killed_batch_of_which_nothing_was_kept_is_stored_twice(
    far: BigQueryFarSide, pieces: None
) -> None:
    batch, kept, stored = BATCHES["several requests"], Kept(), asyncio.Event()
    far.proxy.script = [MUTE]
    far.proxy.on = lambda step: stored.set() if step == "after AppendRows" else None
    connector = connected(far)
    killed = asyncio.create_task(connector.deliver(kept.batch(*batch)))
    await stored.wait()
    killed.cancel()
    await asyncio.wait({killed})
    await connector.close()
    kept.noted = b""
    await until_settled(far, kept, *batch)
    assert max(Counter(held(far.proxy)).values()) == 2
