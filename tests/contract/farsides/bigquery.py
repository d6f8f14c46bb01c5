"""A BigQuery dataset on loopback that misbehaves on demand: the emulator behind `tests/bigquery_proxy.py`."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from config.settings import BigQuerySettings
from schemas.ids import DeliveryId
from schemas.outcome import Verdict
from tests.bigquery_proxy import PROJECT, RETRY_AFTER_S, BigQueryProxy, key_file
from tests.contract.far_side import Held, Mode


class BigQueryFarSide:
    allow = ()
    retry_after_s = float(RETRY_AFTER_S)
    # a late grant must not kill a backlog; and nothing in BigQuery says that a dataset will never be there again
    differs: Mapping[Mode, Verdict | None] = {Mode.DENIED: "retry", Mode.GONE: None}

    def __init__(self) -> None:
        self.proxy = BigQueryProxy(f"events_{uuid4().hex[:12]}")

    @property
    def bigquery(self) -> BigQuerySettings:
        return BigQuerySettings(self.proxy.place)

    async def start(self) -> None:
        await self.proxy.start()

    async def stop(self) -> None:
        await self.proxy.stop()

    async def become(self, mode: Mode) -> None:
        self.proxy.mode = mode
        if mode is Mode.DOWN:
            await self.proxy.hang_up()
        else:
            await self.proxy.listen()

    def options(self) -> Mapping[str, Any]:
        return {"project": PROJECT, "dataset": self.proxy.dataset, "timeout": "5s"}

    def secrets(self) -> Mapping[str, Any]:
        return {"service_account": key_file()}

    def held(self) -> Sequence[Held]:
        return [Held(DeliveryId(str(ident)), str(payload).encode()) for ident, payload in self.proxy.rows()]

    def touched(self) -> int:
        return len(self.proxy.appends)


FAR_SIDE = BigQueryFarSide
