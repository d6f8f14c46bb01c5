"""What every kind of destination must do, run against each kind's far side."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import pytest
from msgspec import Raw
from pydantic import BaseModel, SecretStr, ValidationError

from connectors.contract import Batch, Connector, Direct, Feed, Span, Spec
from connectors.egress import Egress
from connectors.registry import KINDS
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, ExternalId, TenantRef, Vendor
from schemas.outcome import Fault, Outcome, Verdict
from tests.contract.far_side import CANARY, FarSide, Mode, far_side

ACME = TenantRef(Vendor("default"), ExternalId("acme"))
HOOK = DestinationId("hook")


EXPECTED: dict[Mode, tuple[Verdict, set[Fault]]] = {
    Mode.UP: ("delivered", {""}),
    Mode.DOWN: ("retry", {"destination"}),
    Mode.THROTTLED: ("retry", {"destination"}),
    Mode.RESETS: ("retry", {"destination"}),
    Mode.HANGS: ("retry", {"destination"}),
    Mode.GARBLED: ("retry", {"destination"}),
    Mode.DENIED: ("reject", {"destination"}),
    Mode.GONE: ("reject", {"destination"}),
    Mode.REFUSES: ("reject", {"event", "destination"}),
}


@pytest.fixture(params=sorted(KINDS))
def spec(request: pytest.FixtureRequest) -> Spec[Any, Any]:
    return KINDS[request.param]


@pytest.fixture
async def far(spec: Spec[Any, Any]) -> AsyncIterator[FarSide]:
    made = far_side(spec.kind)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def egress(far: FarSide) -> AsyncIterator[Egress]:
    made = Egress(far.allow, bigquery=getattr(far, "bigquery", None))
    yield made
    made.close()


def connected(spec: Spec[Any, Any], far: FarSide, egress: Egress) -> Connector:
    options = spec.options.model_validate(far.options())
    secrets = spec.secrets.model_validate(far.secrets())
    return spec.connect(ACME, HOOK, options, secrets, egress, frozenset())


@pytest.fixture
async def connector(spec: Spec[Any, Any], far: FarSide, egress: Egress) -> AsyncIterator[Connector]:
    made = connected(spec, far, egress)
    await made.open()
    yield made
    await made.close()


async def become(far: FarSide, mode: Mode) -> None:
    if far.differs.get(mode, "") is None:
        pytest.skip("its protocol has no words for that")
    await far.become(mode)


def delivery(number: int, payload: bytes = b'{"total":12}') -> Delivery:
    event = Event(
        eventType="invoice.paid",
        payload=Raw(payload),
        eventId=f"evt_{number}",
        occurredAt="2026-11-21T09:30:00Z",
        customerExternalId="acme",
        idempotencyKey=f"evt_{number}",
    )
    return Delivery(ACME, HOOK, DeliveryId(f"dlv_{number:026}"), event, f"t/0/{number}", 0, 1024)


def batch(*deliveries: Delivery) -> Batch:
    """The same deliveries are the same batch: of a stage kind, the same range of the stage."""
    offsets = [int(one.origin.rpartition("/")[2]) for one in deliveries]
    span = Span("cluster/topic", 0, min(offsets), max(offsets))
    return Batch(ACME, HOOK, int(time.time() * 1000), span, deliveries)


async def deliver(connector: Connector, *deliveries: Delivery) -> Mapping[DeliveryId, Outcome]:
    outcomes = await connector.deliver(batch(*deliveries))
    assert set(outcomes) == {one.id for one in deliveries}
    return outcomes


async def test_what_is_delivered_is_what_the_far_side_holds(connector: Connector, far: FarSide) -> None:
    sent = [delivery(n, b'{"n":%d,"text":"\\u00e9"}' % n) for n in range(20)]
    outcomes = await deliver(connector, *sent)
    assert {outcome.verdict for outcome in outcomes.values()} == {"delivered"}
    held = {one.delivery: one.payload for one in far.held()}
    assert len(far.held()) == len(sent)
    assert held == {one.id: bytes(one.event.payload) for one in sent}


@pytest.mark.parametrize("mode", Mode)
async def test_every_delivery_gets_one_outcome_of_the_right_kind_and_a_declared_code(
    spec: Spec[Any, Any], connector: Connector, far: FarSide, mode: Mode
) -> None:
    await become(far, mode)
    verdict, faults = EXPECTED[mode]
    verdict = far.differs.get(mode) or verdict
    for outcome in (await deliver(connector, delivery(1), delivery(2))).values():
        assert (outcome.verdict, outcome.fault in faults) == (verdict, True), outcome
        assert outcome.code in spec.codes
        assert CANARY not in repr(outcome)
    assert (len(far.held()) > 0) == (mode is Mode.UP)


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.UP])
async def test_what_failed_is_delivered_once_the_far_side_is_well_again(
    connector: Connector, far: FarSide, mode: Mode
) -> None:
    await deliver(connector, delivery(0))
    await become(far, mode)
    failed = await deliver(connector, delivery(1))
    assert [outcome.verdict for outcome in failed.values()] != ["delivered"]
    await far.become(Mode.UP)
    outcomes = await deliver(connector, delivery(1))
    assert [outcome.verdict for outcome in outcomes.values()] == ["delivered"]
    assert [one.delivery for one in far.held()] == [delivery(0).id, delivery(1).id]


async def test_a_wait_that_the_far_side_asks_for_is_in_the_outcome(connector: Connector, far: FarSide) -> None:
    await far.become(Mode.THROTTLED)
    for outcome in (await deliver(connector, delivery(1))).values():
        assert outcome.retry_after_s == far.retry_after_s


async def test_gone_is_called_gone(connector: Connector, far: FarSide) -> None:
    await become(far, Mode.GONE)
    for outcome in (await deliver(connector, delivery(1))).values():
        assert outcome.code == "gone"


async def test_a_check_goes_through_where_the_far_side_is_up_and_leaves_nothing_behind(
    connector: Connector, far: FarSide
) -> None:
    steps = await connector.check()
    assert [step.name for step in steps if not step.ok] == []
    assert len({step.name for step in steps}) == len(steps) > 0
    assert (far.held(), far.touched()) == ([], 0)


async def test_a_check_names_the_step_that_failed(connector: Connector, far: FarSide) -> None:
    await far.become(Mode.DOWN)
    steps = await connector.check()
    assert [step.ok for step in steps] == [True] * (len(steps) - 1) + [False]
    assert steps[-1].detail
    assert CANARY not in repr(steps)


async def test_closing_waits_for_what_is_in_flight_and_twice_is_fine(connector: Connector, far: FarSide) -> None:
    await far.become(Mode.HANGS)
    waiting = asyncio.create_task(deliver(connector, delivery(1)))
    await asyncio.sleep(0)
    await connector.close()
    assert [outcome.verdict for outcome in (await waiting).values()] == ["retry"]
    await connector.close()


async def test_closing_where_nothing_ever_happened_is_fine(spec: Spec[Any, Any], far: FarSide, egress: Egress) -> None:
    made = connected(spec, far, egress)
    await made.close()
    await made.close()


@pytest.mark.parametrize("mode", [Mode.UP, Mode.DOWN, Mode.RESETS])
async def test_a_lane_kind_calls_back_once_and_never_from_inside_start(
    spec: Spec[Any, Any], connector: Connector, far: FarSide, mode: Mode
) -> None:
    if spec.feed is not Feed.LANE:
        pytest.skip("only lane kinds start single deliveries")
    await far.become(mode)
    direct = cast(Direct, connector)
    calls: list[Outcome] = []
    ended = asyncio.Event()

    def done(outcome: Outcome) -> None:
        calls.append(outcome)
        if len(calls) == 30:
            ended.set()

    for number in range(30):
        before = len(calls)
        direct.start(delivery(number), int(time.time() * 1000), done)
        assert len(calls) == before
    async with asyncio.timeout(10):
        await ended.wait()
    await connector.close()
    assert len(calls) == 30


# ---------------------------------------------------------------- the declaration


def test_every_field_is_described_and_every_required_one_has_an_example(spec: Spec[Any, Any]) -> None:
    for model in (spec.options, spec.secrets):
        for name, field in model.model_fields.items():
            assert field.description, f"{spec.kind}: {name}"
            assert field.examples or not field.is_required(), f"{spec.kind}: {name}"


def test_an_unknown_field_is_refused_by_name(spec: Spec[Any, Any], far: FarSide) -> None:
    models: list[tuple[type[BaseModel], Mapping[str, Any]]] = [
        (spec.options, far.options()),
        (spec.secrets, far.secrets()),
    ]
    for model, values in models:
        model.model_validate(values)
        with pytest.raises(ValidationError, match="surprise"):
            model.model_validate({**values, "surprise": "x"})


def test_no_secret_shows_in_the_text_of_its_model(spec: Spec[Any, Any], far: FarSide) -> None:
    secrets = spec.secrets.model_validate(far.secrets())
    assert CANARY in repr(far.secrets())
    assert CANARY not in repr(secrets) + str(secrets) + secrets.model_dump_json()


def test_all_of_the_secrets_are_declared_secret(spec: Spec[Any, Any]) -> None:
    """`writeOnly` is how the schema of a SecretStr says so; a plain text anywhere would lack it."""

    def texts(node: Any) -> list[Mapping[str, Any]]:
        if isinstance(node, dict):
            own = [node] if node.get("type") == "string" else []
            return own + [text for key, value in node.items() if key != "examples" for text in texts(value)]
        return [text for value in node for text in texts(value)] if isinstance(node, list) else []

    found = texts(spec.secrets.model_json_schema())
    assert found
    assert all(text.get("writeOnly") for text in found)


def test_the_options_are_frozen(spec: Spec[Any, Any], far: FarSide) -> None:
    options = spec.options.model_validate(far.options())
    with pytest.raises(ValidationError):
        setattr(options, next(iter(spec.options.model_fields)), "x")


def test_the_example_is_valid_and_what_is_generated_too(spec: Spec[Any, Any]) -> None:
    spec.options.model_validate(spec.example["options"])
    made = spec.generate()
    assert made != spec.generate() or not made
    given = {name: field.examples[0] for name, field in spec.secrets.model_fields.items() if field.is_required()}
    secrets = spec.secrets.model_validate({**given, **made})
    assert set(made) <= set(spec.secrets.model_fields)
    assert all(isinstance(getattr(secrets, name), SecretStr | tuple) for name in made)


def test_every_code_has_a_meaning_and_is_a_fit_label(spec: Spec[Any, Any]) -> None:
    assert "ok" in spec.codes
    assert all(code.replace("_", "").isalnum() and code.islower() and meaning for code, meaning in spec.codes.items())
