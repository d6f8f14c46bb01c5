"""How a BigQuery destination writes: over the emulator and its proxy, one failure after the other."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from config.settings import BigQuerySettings
from connectors.bigquery import encode
from connectors.bigquery.connector import SPEC, connect
from connectors.bigquery.options import Options, Secrets
from connectors.bigquery.writer import BigQueryConnector
from connectors.contract import NotOwned
from connectors.egress import Egress
from schemas.ids import ExternalId, TenantRef, Vendor
from tests.bigquery_proxy import BREAKS, LOST, MUTE, BigQueryProxy, failure, key_file
from tests.connectors.bigqueries import ACME, POISON, SINK, Kept, connected, delivery, held, poisoned, until_settled
from tests.contract.far_side import CANARY, Mode
from tests.contract.farsides.bigquery import BigQueryFarSide

BATCH = tuple(delivery(number) for number in range(9))
IDENTS = [one.id for one in BATCH]


@pytest.fixture
async def far() -> AsyncIterator[BigQueryFarSide]:
    made = BigQueryFarSide()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def proxy(far: BigQueryFarSide) -> BigQueryProxy:
    return far.proxy


@pytest.fixture
async def connector(far: BigQueryFarSide) -> AsyncIterator[BigQueryConnector]:
    made = connected(far)
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of a few rows, so that a batch takes several."""
    monkeypatch.setattr(encode, "REQUEST_BYTES", 600)


# ---------------------------------------------------------------- what is written, and where


async def test_the_table_is_made_partitioned_and_clustered_and_holds_what_came(
    proxy: BigQueryProxy, connector: BigQueryConnector
) -> None:
    await connector.deliver(Kept().batch(delivery(1)))
    columns = "event_id, event_type, customer_external_id, source, payload, metadata, delivery_id"
    assert proxy.rows(columns) == [
        ["evt_1", "invoice.paid", "acme", None, bytes(delivery(1).event.payload).decode(), "{}", delivery(1).id]
    ]
    ((occurred, received),) = proxy.rows("UNIX_MICROS(occurred_at), UNIX_MICROS(received_at)")
    assert (occurred, received) == ("1795253400000000", "1790000000000000")
    table = proxy.table("events")
    assert table["timePartitioning"] == {"type": "DAY", "field": "occurred_at"}
    assert table["clustering"] == {"fields": ["event_type"]}
    assert {field.get("mode", "NULLABLE") for field in table["schema"]["fields"]} == {"NULLABLE"}


async def test_each_type_has_a_table_of_its_own_in_that_layout(far: BigQueryFarSide, proxy: BigQueryProxy) -> None:
    connector = connected(far, layout="per_type")
    kinds = ["invoice.paid", "invoice_paid", "order.made"]
    batch = [delivery(number, kinds[number % 3]) for number in range(9)]
    ends = await connector.deliver(Kept().batch(*batch))
    assert {end.verdict for end in ends.values()} == {"delivered"}
    tables = [encode.table_of("per_type", "events", kind) for kind in kinds]
    assert sorted(proxy.tables()) == sorted(tables)
    for number, table in enumerate(tables):
        assert held(proxy, table) == [one.id for one in batch[number::3]]
    await connector.close()


async def test_a_stream_stays_open_from_batch_to_batch_and_each_batch_is_noted_once(
    proxy: BigQueryProxy, connector: BigQueryConnector
) -> None:
    for number in range(5):
        kept = Kept()
        await connector.deliver(kept.batch(delivery(number)))
        assert kept.times == 1
    assert len(proxy.streams) == 1
    assert "FinalizeWriteStream" not in proxy.asked
    assert len(held(proxy)) == 5


async def test_nothing_is_sent_before_it_is_noted_and_nothing_by_who_no_longer_owns_it(
    proxy: BigQueryProxy, connector: BigQueryConnector
) -> None:
    kept = Kept()
    batch = kept.batch(*BATCH)
    kept.owner += 1
    with pytest.raises(NotOwned):
        await connector.deliver(batch)
    assert proxy.appends == []


# ---------------------------------------------------------------- answers that do not come


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("does", [LOST, BREAKS])
async def test_a_broken_append_is_resolved_before_the_rest_is_sent(
    far: BigQueryFarSide, proxy: BigQueryProxy, connector: BigQueryConnector, does: str, at: int
) -> None:
    proxy.script = [""] * at + [does]
    kept = Kept()
    ends = await connector.deliver(kept.batch(*BATCH))
    assert {end.verdict for end in ends.values()} <= {"delivered", "retry"}
    assert {end.code for end in ends.values()} <= {"ok", "unavailable"}  # it is known what is stored
    stored = [ident for ident, end in ends.items() if end.verdict == "delivered"]
    assert held(proxy) == stored
    await until_settled(far, kept, *BATCH)
    assert held(proxy) == IDENTS


async def test_an_append_without_an_answer_ends_in_time_and_what_it_stored_is_known(
    far: BigQueryFarSide, proxy: BigQueryProxy
) -> None:
    connector = connected(far, timeout="2s")
    await connector.deliver(Kept().batch(delivery(100)))
    proxy.script = ["", MUTE]
    kept = Kept()
    ends = await connector.deliver(kept.batch(*BATCH))
    assert {end.code for end in ends.values()} == {"ok", "timeout"}
    assert held(proxy)[1:] == [ident for ident, end in ends.items() if end.code == "ok"]
    await connector.close()
    await until_settled(far, kept, *BATCH)
    assert held(proxy)[1:] == IDENTS


async def test_what_cannot_be_known_now_is_in_doubt_and_sent_only_once_it_is_known(
    far: BigQueryFarSide, proxy: BigQueryProxy
) -> None:
    connector = connected(far, timeout="2s")

    def go_dark(step: str) -> None:
        if step == "after AppendRows":
            proxy.mode = Mode.THROTTLED

    proxy.on, proxy.script, kept = go_dark, [LOST], Kept()
    ends = await connector.deliver(kept.batch(*BATCH))
    assert {(end.verdict, end.code, end.retry_after_s) for end in ends.values()} == {("retry", "in_doubt", 7.0)}
    assert "in_doubt" in SPEC.unsure
    sent = len(proxy.appends)
    ends = await connector.deliver(kept.batch(*BATCH))
    assert {end.code for end in ends.values()} == {"in_doubt"}
    assert len(proxy.appends) == sent
    proxy.mode, proxy.on = Mode.UP, lambda step: None
    await connector.close()
    await until_settled(far, kept, *BATCH)
    assert held(proxy) == IDENTS


async def test_rows_of_a_stream_that_went_with_its_table_are_not_sent_again(
    far: BigQueryFarSide, proxy: BigQueryProxy
) -> None:
    connector = connected(far)
    proxy.script, kept, stored = [MUTE], Kept(), asyncio.Event()
    proxy.on = lambda step: stored.set() if step == "after AppendRows" else None
    waiting = asyncio.create_task(connector.deliver(kept.batch(*BATCH)))
    await stored.wait()
    waiting.cancel()
    await asyncio.wait({waiting})
    proxy.forget_streams = True
    ends = await until_settled(far, kept, *BATCH)
    assert {(end.verdict, end.code) for end in ends.values()} == {("reject", "stream_lost")}
    assert "stream_lost" in SPEC.unsure
    await connector.close()


async def test_a_layout_that_changes_between_attempts_sends_only_what_is_not_stored(
    far: BigQueryFarSide, proxy: BigQueryProxy
) -> None:
    connector, kept = connected(far), Kept()
    proxy.script = ["", BREAKS]
    ends = await connector.deliver(kept.batch(*BATCH))
    stored = [ident for ident, end in ends.items() if end.verdict == "delivered"]
    assert 0 < len(stored) < len(BATCH)
    await connector.close()
    connector = connected(far, layout="per_type", table="other")
    ends = await connector.deliver(kept.batch(*BATCH))
    assert {end.verdict for end in ends.values()} == {"delivered"}
    assert held(proxy) + held(proxy, "other_invoice_paid") == IDENTS
    await connector.close()


async def test_rows_of_one_table_wait_for_no_doubt_of_another_but_the_batch_comes_again(
    far: BigQueryFarSide, proxy: BigQueryProxy
) -> None:
    connector, kept = connected(far, layout="per_type"), Kept()
    batch = [delivery(number, ["a", "b"][number % 2]) for number in range(8)]
    proxy.script = [failure(grpc.StatusCode.INTERNAL)]
    ends = await connector.deliver(kept.batch(*batch))
    assert sorted({end.verdict for end in ends.values()}) == ["delivered", "retry"]
    ends = await connector.deliver(kept.batch(*batch))
    assert {end.verdict for end in ends.values()} == {"delivered"}
    assert held(proxy, "events_a") == [one.id for one in batch[::2]]
    assert held(proxy, "events_b") == [one.id for one in batch[1::2]]
    await connector.close()


# ---------------------------------------------------------------- rows and tables that do not fit


async def test_a_refused_row_is_a_dead_letter_alone_and_its_reason_is_kept(
    far: BigQueryFarSide, proxy: BigQueryProxy, connector: BigQueryConnector
) -> None:
    proxy.poison, kept = POISON, Kept()
    batch = [poisoned(number) if number in (1, 7) else delivery(number) for number in range(9)]
    ends = await connector.deliver(kept.batch(*batch))
    refused = {ident: end for ident, end in ends.items() if end.verdict != "delivered"}
    assert list(refused) == [batch[1].id, batch[7].id]
    for end in refused.values():
        assert (end.verdict, end.fault, end.code) == ("reject", "event", "refused")
        assert "payload" in end.detail
        assert end.answer == b"Field payload: no JSON"
    assert held(proxy) == [one.id for number, one in enumerate(batch) if number not in (1, 7)]
    assert len(proxy.streams) == 1  # all was answered: it is known where the stream stands
    assert b"no JSON" not in kept.noted
    ends = await connector.deliver(kept.batch(*batch))  # killed before that was settled
    assert [ends[ident].verdict for ident in refused] == ["reject", "reject"]
    assert len(held(proxy)) == 7


async def test_a_row_that_no_table_can_hold_is_not_even_sent(
    proxy: BigQueryProxy, connector: BigQueryConnector
) -> None:
    odd = delivery(1)
    odd.event.occurredAt = "0001-01-01T00:00:00+01:00"
    ends = await connector.deliver(Kept().batch(delivery(0), odd, delivery(2)))
    assert [end.code for end in ends.values()] == ["ok", "timestamp", "ok"]
    assert held(proxy) == [delivery(0).id, delivery(2).id]
    ends = await connector.deliver(Kept().batch(odd))
    assert [end.code for end in ends.values()] == ["timestamp"]


async def test_missing_columns_are_added_nullable_and_others_are_left_alone(
    far: BigQueryFarSide, proxy: BigQueryProxy, connector: BigQueryConnector
) -> None:
    own = [{"name": "note", "type": "STRING", "mode": "NULLABLE"}]
    proxy.make_table("events", own + [field for field in proxy.columns() if field["name"] != "source"])
    ends = await connector.deliver(Kept().batch(delivery(1)))
    assert {end.verdict for end in ends.values()} == {"delivered"}
    fields = {field["name"]: field.get("mode", "NULLABLE") for field in proxy.table("events")["schema"]["fields"]}
    assert set(fields) == {"note", *(name for name, _, _ in encode.COLUMNS)}
    assert set(fields.values()) == {"NULLABLE"}
    assert proxy.rows("delivery_id, source, note") == [[delivery(1).id, None, None]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"payload": ("STRING", "NULLABLE")}, "the column payload of the table events must be of type JSON"),
        ({"note": ("STRING", "REQUIRED")}, "must be filled and is none of ours: note"),
    ],
)
async def test_a_table_that_does_not_fit_is_named_and_tried_again(
    proxy: BigQueryProxy, connector: BigQueryConnector, change: dict[str, tuple[str, str]], told: str
) -> None:
    fields = {field["name"]: field for field in proxy.columns()}
    fields |= {name: {"name": name, "type": kind, "mode": mode} for name, (kind, mode) in change.items()}
    proxy.make_table("events", list(fields.values()))
    (end,) = (await connector.deliver(Kept().batch(delivery(1)))).values()
    assert (end.verdict, end.fault, end.code) == ("retry", "destination", "schema")
    assert told in end.detail
    assert proxy.appends == []


async def test_nothing_is_made_or_added_where_that_is_not_wanted(far: BigQueryFarSide, proxy: BigQueryProxy) -> None:
    connector = connected(far, create_tables=False)
    (end,) = (await connector.deliver(Kept().batch(delivery(1)))).values()
    assert (end.verdict, end.code) == ("retry", "not_found")
    proxy.make_table("events", [field for field in proxy.columns() if field["name"] != "source"])
    (end,) = (await connector.deliver(Kept().batch(delivery(1)))).values()
    assert (end.verdict, end.code) == ("retry", "schema")
    assert not any(asked.startswith(("POST", "PATCH", "PUT")) for asked in proxy.asked)
    await connector.close()


async def test_a_stream_that_ended_since_is_replaced_at_once(
    proxy: BigQueryProxy, connector: BigQueryConnector
) -> None:
    await connector.deliver(Kept().batch(delivery(100)))
    await connector._storage.finish(proxy.streams[0], 5)
    kept = Kept()
    ends = await connector.deliver(kept.batch(*BATCH))
    assert {end.verdict for end in ends.values()} == {"delivered"}
    assert (len(proxy.streams), kept.times) == (2, 2)
    assert held(proxy)[1:] == IDENTS


# ---------------------------------------------------------------- credentials


async def test_no_token_is_asked_for_and_a_key_that_is_not_known_is_denied(far: BigQueryFarSide) -> None:
    proxy = far.proxy
    made = connect(
        ACME, SINK, Options.model_validate(far.options()), Secrets(), Egress(bigquery=BigQuerySettings(proxy.place))
    )
    (end,) = (await made.deliver(Kept().batch(delivery(1)))).values()
    assert (end.verdict, end.fault, end.code) == ("reject", "destination", "credentials")
    assert [step.ok for step in await made.check()] == [False]
    assert proxy.asked == []
    await made.close()


async def test_the_worker_s_own_credentials_are_used_where_the_operator_lets_them(
    far: BigQueryFarSide, proxy: BigQueryProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.json"
    file.write_text(key_file(token_uri=f"{proxy.place.rest_url}/token"))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    egress = Egress(bigquery=BigQuerySettings(proxy.place, default_credentials=True))
    for answers, code in ((True, "ok"), (False, "denied")):
        if not answers:
            file.write_text(key_file())  # whose token_uri nobody answers
        made = connect(ACME, SINK, Options.model_validate({**far.options(), "timeout": "10s"}), Secrets(), egress)
        (end,) = (await made.deliver(Kept().batch(delivery(1)))).values()
        assert end.code == code
        await made.close()


async def test_the_credentials_of_one_never_serve_another(far: BigQueryFarSide, proxy: BigQueryProxy) -> None:
    """Two tenants whose names look alike, on one BigQuery, at the same time."""
    theirs = f"{proxy.dataset}2"
    await asyncio.to_thread(proxy.make_dataset, theirs)
    places = {"a@acme.example": proxy.dataset, "a@acme2.example": theirs}
    egress = Egress(bigquery=far.bigquery)
    made = [
        connect(
            TenantRef(Vendor("default"), ExternalId(email[2:])),
            SINK,
            Options.model_validate({**far.options(), "timeout": "10s", "dataset": dataset}),
            Secrets.model_validate({"service_account": key_file(client_email=email)}),
            egress,
        )
        for email, dataset in places.items()
    ]
    for number in range(3):
        batch = delivery(number), delivery(100 + number)
        await asyncio.gather(*(one.deliver(Kept().batch(each)) for one, each in zip(made, batch, strict=True)))
    for one in made:
        await one.close()
    assert {account for account, _ in proxy.accounts} == set(places)
    for account, what in proxy.accounts:
        assert f"/datasets/{places[account]}/" in what, (account, what)
    assert held(proxy) == [delivery(number).id for number in range(3)]
    proxy.dataset = theirs
    assert held(proxy) == [delivery(100 + number).id for number in range(3)]


async def test_what_a_check_lacks_is_named(far: BigQueryFarSide, proxy: BigQueryProxy) -> None:
    connector = connected(far)
    proxy.mode = Mode.DENIED
    steps = await connector.check()
    assert [(step.name, step.ok) for step in steps] == [("credentials", True), ("table", False)]
    assert "bigquery.tables.get" in steps[-1].detail
    assert CANARY not in repr(steps)
    proxy.mode = Mode.UP
    steps = await connector.check()
    assert [(step.name, step.ok) for step in steps] == [
        ("credentials", True),
        ("table", True),
        ("create", True),
        ("write", True),
    ]
    assert proxy.tables() == []
    await connector.deliver(Kept().batch(delivery(1)))
    assert [step.name for step in await connector.check()] == ["credentials", "table", "write"]
    assert (proxy.tables(), len(held(proxy))) == (["events"], 1)
    await connector.close()
