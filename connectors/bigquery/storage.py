"""What is asked of BigQuery: streams of the Storage Write API, tables of the REST API, and the tokens for both.

The messages are the official client's, in their raw form; its own way of calling is not used, since it tries again by
itself and wraps each message anew (twice the CPU of a row). No place here is a tenant's: hosts are Google's or the
operator's, and tokens are signed with the service account's key, so that nobody is asked for one.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import quote

import google.auth
import grpc
import requests.exceptions
from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import GoogleAPICallError
from google.auth import crypt, jwt
from google.auth.credentials import Credentials
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import Request
from google.cloud import bigquery
from google.cloud.bigquery_storage_v1 import types
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from msgspec import Struct

from config.settings import BigQuerySettings
from connectors.bigquery import classify
from connectors.bigquery.classify import Fault, of_rest, of_status
from connectors.bigquery.encode import CLUSTERED_BY, COLUMNS, DESCRIPTOR, PARTITIONED_BY
from connectors.bigquery.encode import requests as pieces
from connectors.bigquery.options import ServiceAccount

SCOPE: Final = "https://www.googleapis.com/auth/bigquery"
TOKEN_LIFE_S: Final = 3600
RENEWED_S: Final = 600  # before its end
PROBE_LIFE_MS: Final = 3_600_000

_CreateRequest: Final = types.CreateWriteStreamRequest.pb()
_WriteStream: Final = types.WriteStream.pb()
_FinalizeRequest: Final = types.FinalizeWriteStreamRequest.pb()
_Finalized: Final = types.FinalizeWriteStreamResponse.pb()
_AppendRequest: Final = types.AppendRowsRequest.pb()
_AppendResponse: Final = types.AppendRowsResponse.pb()
_StorageError: Final = types.StorageError.pb()
_RowError: Final = types.RowError.pb()
_TableField: Final = types.TableFieldSchema.pb()
_COMMITTED: Final = int(types.WriteStream.Type.COMMITTED)

_SERVICE: Final = "/google.cloud.bigquery.storage.v1.BigQueryWrite/"
_NAMES: Final = tuple(name for name, _, _ in COLUMNS)
# What an answer calls the types of a table's columns.
_TYPES: Final = {name: kind for name, kind, _ in COLUMNS}
_CHANNEL: Final = (
    # one tenant's connection is no other's
    ("grpc.use_local_subchannel_pool", 1),
    # a channel that nobody uses lets its connection go
    ("grpc.client_idle_timeout_ms", 60_000),
    ("grpc.enable_retries", 0),
    ("grpc.primary_user_agent", "headgate"),
)

Answer = TypeVar("Answer")


class Opened(Struct):
    """A stream, the columns of its table in lower case with their types, and those of them that must be filled."""

    name: str
    types: dict[str, str]
    required: list[str]


class Appended(Struct):
    """What came of rows that were sent. The first `stored` of them are in the table. If `known`, no other one is, and
    none is under way; `usable`: the stream can be written on. `refused`: index to reason and BigQuery's own words."""

    stored: int = 0
    known: bool = False
    usable: bool = False
    refused: dict[int, tuple[str, bytes]] = {}
    fault: Fault | None = None


class Key:
    """Tokens of a service account, signed here (RFC 7523, as Google's APIs take them)."""

    def __init__(self, account: ServiceAccount, clock: Callable[[], float] = time.time) -> None:
        self._account = account
        self._clock = clock
        self._token = ""
        self._ends_s = 0

    async def __call__(self) -> str:
        now_s = int(self._clock())
        if now_s > self._ends_s - RENEWED_S:
            account = self._account
            signer = crypt.RSASigner.from_string(account.private_key, account.private_key_id)
            self._ends_s = now_s + TOKEN_LIFE_S
            claims = {"iss": account.client_email, "sub": account.client_email, "scope": SCOPE}
            token = jwt.encode(signer, {**claims, "iat": now_s, "exp": self._ends_s})
            self._token = token.decode()
        return self._token


class Own:
    """Tokens of the worker's own credentials: what Google calls application default credentials."""

    def __init__(self) -> None:
        self._credentials: Any = None

    async def __call__(self) -> str:
        try:
            return await asyncio.to_thread(self._fresh)
        except GoogleAuthError as fault:
            raise Fault("denied", f"the worker's own credentials give no token ({type(fault).__name__})") from None

    def _fresh(self) -> str:
        if self._credentials is None:
            self._credentials, _ = google.auth.default(scopes=[SCOPE])
        if not self._credentials.valid:
            self._credentials.refresh(Request())
        return str(self._credentials.token)


class _Bearer(Credentials):  # type: ignore[misc]
    """A token for the REST client, which would otherwise look for one by itself."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self.token = token

    def refresh(self, request: object) -> None:
        raise GoogleAuthError("the token was not accepted")


class Storage:
    """One destination's way to BigQuery. Its channel is made when it is used, and let go where it failed."""

    def __init__(self, settings: BigQuerySettings, project: str, dataset: str, token: Key | Own) -> None:
        self._place = settings.place
        self._project = project
        self._dataset = dataset
        self._token = token
        self._channel: grpc.aio.Channel | None = None
        self._failed: list[grpc.aio.Channel] = []

    async def tidy(self) -> None:
        """Ends the connections that failed, once nothing is under way on them."""
        while self._failed:
            await self._failed.pop().close()

    async def close(self) -> None:
        self._let_go()
        await self.tidy()

    # ---------------------------------------------------------------- streams

    async def sign_in(self) -> None:
        """Raises Fault where there is no token to be had."""
        await self._token()

    async def open_stream(self, table: str, timeout_s: float) -> Opened:
        """A new stream in COMMITTED mode. Raises Fault."""
        parent = f"projects/{self._project}/datasets/{self._dataset}/tables/{table}"
        asked = _CreateRequest(parent=parent, write_stream=_WriteStream(type_=_COMMITTED))
        made = await self._ask(
            "CreateWriteStream", asked, _WriteStream, f"parent={parent}", timeout_s, f"opening a stream into {table}"
        )
        fields = made.table_schema.fields
        return Opened(
            made.name,
            {one.name.lower(): _TableField.Type.Name(one.type_) for one in fields},
            [one.name for one in fields if one.mode == _TableField.REQUIRED],
        )

    async def finish(self, stream: str, timeout_s: float) -> int:
        """Ends a stream for everybody and for good; how many rows it holds. Twice is fine. Raises Fault."""
        asked = _FinalizeRequest(name=stream)
        ended = await self._ask(
            "FinalizeWriteStream", asked, _Finalized, f"name={stream}", timeout_s, "ending a stream"
        )
        return int(ended.row_count)

    async def _ask(self, method: str, asked: Any, answer: Any, routed: str, timeout_s: float, doing: str) -> Any:
        metadata = await self._metadata(routed)
        call = self._open().unary_unary(_SERVICE + method, request_serializer=type(asked).SerializeToString)
        try:
            return answer.FromString(await call(asked, timeout=timeout_s, metadata=metadata))
        except DecodeError:
            self._let_go()
            raise Fault("protocol", f"{doing}: the answer is not one of BigQuery") from None
        except grpc.aio.AioRpcError as fault:
            found = _fault_of(fault, doing)
            if not found.answered:
                self._let_go()
            raise found from None

    async def append(self, stream: str, offset: int, rows: Sequence[bytes], timeout_s: float) -> Appended:
        """Sends rows to a stream that holds `offset` rows, in requests one behind the other on a connection of their
        own; reads the answers until there are no more."""
        ended = Appended()
        try:
            metadata = await self._metadata(f"write_stream={stream}")
        except Fault as refusal:
            return Appended(known=True, fault=refusal)
        call = self._open().stream_stream(
            _SERVICE + "AppendRows",
            request_serializer=_AppendRequest.SerializeToString,
        )(timeout=timeout_s, metadata=metadata)
        sent: list[int] = []  # the first row of each request
        answers = 0
        fault: Fault | None = None
        try:
            at = 0
            try:
                for piece in pieces(rows):
                    sent.append(at)
                    await call.write(_request(stream, offset + at, piece, first=at == 0))
                    at += len(piece)
                await call.done_writing()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass  # it has ended: how, is read below
            while (answer := await call.read()) is not grpc.aio.EOF:
                if answers < len(sent):
                    first, after = sent[answers], (sent[answers + 1] if answers + 1 < len(sent) else at)
                    _take(_AppendResponse.FromString(answer), ended, offset, first, after)
                answers += 1
            status = await call.code()
            if status is not grpc.StatusCode.OK:
                fault = of_status(status.name, doing="appending rows")
        except grpc.aio.AioRpcError as raised:
            fault = _fault_of(raised, "appending rows")
        except DecodeError:
            fault = Fault("protocol", "appending rows: the answer is not one of BigQuery")
        finally:
            call.cancel()
        whole = fault is None and answers == len(sent)
        if not whole and ended.fault is None and not ended.refused:
            ended.fault = fault or of_status("OK", doing="appending rows")
        lost = ended.fault is not None and ended.fault.code == "stream" and not ended.fault.answered
        ended.known = (whole or (fault is not None and fault.answered)) and not lost
        ended.usable = whole and ended.fault is None
        if fault is not None and not fault.answered:
            self._let_go()
        return ended

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            address = self._place.write_address
            if self._place.encrypted:
                self._channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), options=_CHANNEL)
            else:
                self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL)
        return self._channel

    async def _metadata(self, routed: str) -> tuple[tuple[str, str], ...]:
        return (
            ("authorization", f"Bearer {await self._token()}"),
            ("x-goog-request-params", quote(routed, safe="=")),
        )

    def _let_go(self) -> None:
        """A connection of which no answer came is not used again: gRPC would wait longer and longer to try anew."""
        if self._channel is not None:
            self._failed.append(self._channel)
            self._channel = None

    # ---------------------------------------------------------------- tables

    async def has_table(self, table: str, timeout_s: float) -> bool:
        """False where the dataset is there and the table is not. Raises Fault."""
        try:
            await self._rest(partial(_get, table=table), timeout_s, f"looking at the table {table}")
        except Fault as fault:
            if fault.code == "not_found" and not fault.no_dataset:
                return False
            raise
        return True

    async def make_table(self, table: str, timeout_s: float, *, probe: bool = False) -> None:
        """A table with our columns; one that is there is left as it is. A probe ends by itself. Raises Fault."""
        until_ms = int(time.time() * 1000) + PROBE_LIFE_MS if probe else 0
        await self._rest(partial(_make, table=table, until_ms=until_ms), timeout_s, f"making the table {table}")

    async def add_columns(self, table: str, timeout_s: float) -> None:
        """Those of our columns that it does not have, nullable. Raises Fault."""
        await self._rest(partial(_widen, table=table), timeout_s, f"adding columns to the table {table}")

    async def drop_table(self, table: str, timeout_s: float) -> None:
        await self._rest(partial(_drop, table=table), timeout_s, f"deleting the table {table}")

    async def _rest(
        self, step: Callable[[bigquery.Client, str, float], Answer], timeout_s: float, doing: str
    ) -> Answer:
        token = await self._token()

        def run() -> Answer:
            client = bigquery.Client(
                project=self._project,
                credentials=_Bearer(token),
                client_options=ClientOptions(api_endpoint=self._place.rest_url),
            )
            with client:
                return step(client, self._dataset, timeout_s)

        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.to_thread(run)
        except GoogleAPICallError as fault:
            reason = next((str(error.get("reason")) for error in fault.errors if isinstance(error, dict)), "")
            found = of_rest(int(fault.code or 0), reason, doing=doing)
            found.no_dataset = "not found: dataset" in str(fault.message).lower()
            raise found from None
        except GoogleAuthError:
            raise Fault("denied", f"{doing}: BigQuery does not accept the credentials") from None
        except (TimeoutError, requests.exceptions.Timeout):
            raise Fault("timeout", f"{doing}: no answer in time") from None
        except requests.exceptions.RequestException as fault:
            raise Fault("unavailable", f"{doing}: {type(fault).__name__}") from None
        except ValueError:
            raise Fault("protocol", f"{doing}: the answer is not one of BigQuery") from None


def _request(stream: str, offset: int, rows: Sequence[bytes], *, first: bool) -> Any:
    made = _AppendRequest(write_stream=stream)
    made.offset.value = offset
    if first:
        made.proto_rows.writer_schema.proto_descriptor.CopyFrom(DESCRIPTOR)
    made.proto_rows.rows.serialized_rows.extend(rows)
    return made


def _take(answer: Any, ended: Appended, offset: int, first: int, after: int) -> None:
    """Adds the answer to the request that held the rows from `first` to before `after`."""
    if ended.fault is not None or ended.refused:
        return  # after one that was not stored none is
    if not answer.HasField("error"):
        result = answer.append_result
        if result.HasField("offset") and result.offset.value != offset + first:
            ended.fault = Fault("stream", "appending rows: BigQuery stored them at another offset")
        else:
            ended.stored = after
        return
    for one in answer.row_errors:
        if 0 <= one.index < after - first:
            reason = classify.refusal(_RowError.RowErrorCode.Name(one.code), one.message, _NAMES)
            ended.refused[first + one.index] = reason, one.message.encode()
    if not ended.refused:
        ended.fault = _of_answer(answer.error, "appending rows")


def _of_answer(status: Any, doing: str) -> Fault:
    """Of a `google.rpc.Status`, which may hold an error of the API, and how long to wait."""
    storage_error, retry_after_s = "", 0.0
    for detail in status.details:
        if detail.type_url.endswith("StorageError"):
            code = _StorageError.FromString(detail.value).code
            if code in _StorageError.StorageErrorCode.values():
                storage_error = _StorageError.StorageErrorCode.Name(code)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry_after_s = delay.seconds + delay.nanos / 1e9
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    name = names.get(status.code, "UNKNOWN")
    return of_status(name, storage_error, doing=doing, retry_after_s=retry_after_s)


def _fault_of(fault: grpc.aio.AioRpcError, doing: str) -> Fault:
    for key, value in fault.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            if status.code == fault.code().value[0]:
                return _of_answer(status, doing)
    return of_status(fault.code().name, doing=doing)


# ---------------------------------------------------------------- the REST client's calls, on a thread


def _reference(client: bigquery.Client, dataset: str, table: str) -> bigquery.TableReference:
    return bigquery.DatasetReference(client.project, dataset).table(table)


def _get(client: bigquery.Client, dataset: str, timeout_s: float, *, table: str) -> None:
    client.get_table(_reference(client, dataset, table), retry=None, timeout=timeout_s)


def _make(client: bigquery.Client, dataset: str, timeout_s: float, *, table: str, until_ms: int) -> None:
    made = bigquery.Table(_reference(client, dataset, table), [_column(name) for name in _NAMES])
    made.time_partitioning = bigquery.TimePartitioning(bigquery.TimePartitioningType.DAY, field=PARTITIONED_BY)
    made.clustering_fields = [CLUSTERED_BY]
    if until_ms:
        made._properties["expirationTime"] = str(until_ms)
    client.create_table(made, exists_ok=True, retry=None, timeout=timeout_s)


def _widen(client: bigquery.Client, dataset: str, timeout_s: float, *, table: str) -> None:
    found = client.get_table(_reference(client, dataset, table), retry=None, timeout=timeout_s)
    there = {one.name.lower() for one in found.schema}
    found.schema = [*found.schema, *(_column(name) for name in _NAMES if name not in there)]
    client.update_table(found, ["schema"], retry=None, timeout=timeout_s)


def _drop(client: bigquery.Client, dataset: str, timeout_s: float, *, table: str) -> None:
    client.delete_table(_reference(client, dataset, table), not_found_ok=True, retry=None, timeout=timeout_s)


def _column(name: str) -> bigquery.SchemaField:
    return bigquery.SchemaField(name, _TYPES[name], mode="NULLABLE")
