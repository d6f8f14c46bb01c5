"""A stage kind for tests: each batch becomes one file in a folder. `python -m tests.files` is a worker that knows it.

The file system is its far side, and a file named `mode` in the folder says how that behaves: `fail`, `timeout` (it is
stored, and nobody says so), `refuse` (events whose payload says so). A file is named after its span, and never written
over: what is there already must be the same bytes.
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from config.settings import Settings
from connectors import registry
from connectors.contract import Batch, Batching, Feed, Spec, Step
from schemas.ids import DeliveryId, DestinationId, TenantRef
from schemas.outcome import Outcome, delivered, reject, retry
from schemas.topics import FEW, delivery_key, partition_of

MODE: Final = "mode"


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    folder: str = Field(description="Where files are written.", examples=["/tmp/files"])
    window_ms: int = Field(default=500, description="How long a batch gathers.")
    events: int = Field(default=1000, description="How many are in one.")
    noting: bool = Field(default=False, description="Whether it notes what it does before it does it.")


class Secrets(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    token: SecretStr = Field(default=SecretStr(""), description="Nothing needs it.")


class FilesConnector:
    def __init__(self, options: Options) -> None:
        self.batching = _batching(options)
        self._options = options
        self._folder = Path(options.folder)

    async def open(self) -> None: ...

    async def check(self) -> Sequence[Step]:
        return [Step("write", True)]

    async def deliver(self, batch: Batch) -> Mapping[DeliveryId, Outcome]:
        mode = (self._folder / MODE).read_text() if (self._folder / MODE).exists() else ""
        span = batch.span
        assert span is not None
        if mode == "fail":
            return self._all(batch, retry("destination", "unavailable", "told to fail"))
        taken = [one for one in batch.deliveries if b"refuse" not in bytes(one.event.payload)]
        log = blake2b(span.log.encode(), digest_size=4).hexdigest()
        path = self._folder / f"{batch.destination}-{log}-{span.partition}-{span.first:020}.json"
        text = json.dumps([[one.id, one.event.eventId] for one in taken])
        if self._options.noting:
            await batch.note(text.encode())
        new = path.with_suffix(f".{uuid4().hex}.new")
        new.write_text(text)
        try:
            path.hardlink_to(new)  # whole, or not at all
        except FileExistsError:
            if path.read_text() != text:
                return self._all(batch, retry("platform", "name_taken", "another file is there"))
        finally:
            new.unlink()
        if mode == "timeout":
            return self._all(batch, retry("destination", "timeout", "nobody answered"))
        refused = reject("event", "refused", "its payload says so")
        held = {one.id for one in taken}
        return {one.id: delivered() if one.id in held else refused for one in batch.deliveries}

    @staticmethod
    def _all(batch: Batch, outcome: Outcome) -> Mapping[DeliveryId, Outcome]:
        return {one.id: outcome for one in batch.deliveries}

    async def close(self) -> None:
        await asyncio.sleep(0)


def _batching(options: Options) -> Batching:
    return Batching(options.events, 2**20, options.window_ms / 1000, 1 if options.noting else 4, 10.0)


def _connect(*given: Any) -> FilesConnector:
    return FilesConnector(given[2])


SPEC: Final = Spec(
    kind="files",
    title="Files",
    feed=Feed.STAGE,
    options=Options,
    secrets=Secrets,
    example={"options": {"folder": "/tmp/files"}},
    codes={
        "ok": "Stored.",
        "unavailable": "Told to fail.",
        "timeout": "Nobody answered.",
        "refused": "Refused.",
        "name_taken": "Another file is there.",
    },
    connect=_connect,
    dials=lambda options: {},
    batching=_batching,
    unsure=frozenset({"timeout"}),
)


def neighbour(tenant: TenantRef, of: str) -> str:
    """A destination's id that shares its partition of the stage."""

    def where(ident: str) -> int:
        return partition_of(delivery_key(tenant, DestinationId(ident)), FEW)

    return next(name for n in range(99) if where(name := f"other{n}") == where(of))


def become(folder: Path, mode: str) -> None:
    """How the far side behaves from the next batch on; empty for well."""
    new = folder / "mode.new"
    new.write_text(mode)
    new.rename(folder / MODE)


def stored(folder: Path, destination: str = "*") -> list[list[tuple[str, str]]]:
    """Of each file, delivery ids and event ids, in the order of the names."""
    return [
        [tuple(one) for one in json.loads(file.read_text())] for file in sorted(folder.glob(f"{destination}-*.json"))
    ]


def known() -> "Mapping[str, Spec[Any, Any]]":
    """Registers the kind in this process."""
    registry.KINDS["files"] = SPEC  # type: ignore[index]
    return registry.KINDS


def main() -> None:
    from streams.app import run_worker

    known()
    sys.exit(run_worker(Settings.load(os.environ)))


if __name__ == "__main__":
    main()
