"""BigQuery on loopback: the emulator behind a proxy that asks who comes, refuses what BigQuery refuses, and fails.

The emulator (`dev/bigquery.py`) keeps streams, offsets and rows as BigQuery does. It takes any credentials, columns
that a table does not have, and rows without those that must be filled; no row of it is ever refused, and it tells
nobody that a schema has changed. That, and every kind of failure, is added here, between it and the connector: gRPC
behind a relay that can break connections in the middle, REST behind a small server.
"""

import asyncio
import atexit
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
from aiohttp import ClientSession, web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import crypt, jwt
from google.cloud.bigquery_storage_v1 import types
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.rpc import error_details_pb2, status_pb2

from config.settings import BigQueryPlace
from connectors.bigquery.encode import COLUMNS
from dev import bigquery, process, wait
from tests.contract.far_side import CANARY, Mode

SERVICE = "/google.cloud.bigquery.storage.v1.BigQueryWrite/"
PROJECT = "acme-analytics"
RETRY_AFTER_S = 7
SCOPE = "https://www.googleapis.com/auth/bigquery"
EMAIL = "headgate@acme-analytics.iam.gserviceaccount.com"
LOST = "it is stored, but the connection breaks before the answer"
MUTE = "it is stored, and no answer comes"
BREAKS = "the connection breaks before it is stored"

CreateRequest, WriteStream = types.CreateWriteStreamRequest.pb(), types.WriteStream.pb()
AppendRequest, AppendResponse = types.AppendRowsRequest.pb(), types.AppendRowsResponse.pb()
StorageError, TableField = types.StorageError.pb(), types.TableFieldSchema.pb()


@cache
def emulator() -> tuple[int, int]:
    """Ports of REST and gRPC. Started once for this process, and ended with it."""
    home = Path(tempfile.mkdtemp(prefix="headgate-bigquery-"))
    ports = wait.free_ports(2)
    proc = bigquery.start(home, *ports)

    @atexit.register
    def end() -> None:
        process.end(proc, grace_s=0)
        shutil.rmtree(home, ignore_errors=True)

    bigquery.wait_ready(proc, home, *ports)
    # its first table and query take seconds
    bigquery.make_dataset(ports[0], PROJECT, "warm")
    bigquery.make_table(ports[0], PROJECT, "warm", "up", [{"name": "a", "type": "STRING"}])
    bigquery.query(ports[0], PROJECT, f"SELECT a FROM `{PROJECT}.warm.up`")
    return ports[0], ports[1]


@cache
def account_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def key_file(**changed: str) -> str:
    """The JSON that Google gives out with a service account's key."""
    pem = account_key().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return json.dumps(
        {
            "type": "service_account",
            "project_id": PROJECT,
            "private_key_id": f"{CANARY}-key",
            "private_key": pem.decode(),
            "client_email": EMAIL,
            "token_uri": "http://127.0.0.1:1/token",
            **changed,
        }
    )


def failure(status: grpc.StatusCode, *, storage_error: int = 0, retry_after_s: int = 0) -> Any:
    """As `google.rpc.Status` with its details."""
    made = status_pb2.Status(code=status.value[0], message=f"{CANARY}: in the words of BigQuery")
    if storage_error:
        made.details.add().Pack(StorageError(code=storage_error, entity="x"), type_url_prefix="type.googleapis.com/")
    if retry_after_s:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.seconds = retry_after_s
        made.details.add().Pack(info)
    return made


class BigQueryProxy:
    def __init__(self, dataset: str) -> None:
        self.dataset = dataset
        self.mode = Mode.UP
        self.script: list[str | Any] = []  # to the next appends: LOST, MUTE, BREAKS, or a status to answer with
        self.poison = b""  # a row that holds it is refused
        self.message = "Field payload: no JSON"  # of such a row's error
        self.accounts: list[tuple[str, str]] = []  # who asked, and what for: the routing of gRPC, the path of REST
        self.asked: list[str] = []  # methods of gRPC, and of REST with the path
        self.appends: list[int] = []  # rows of each request
        self.streams: list[str] = []  # that were opened
        self.fences = True  # else a stream that is ended says how many rows it has, and takes more
        self.forget_streams = False  # it knows none of them any more
        self.on: Callable[[str], None] = lambda step: None  # called when something has reached the emulator, or left
        self.place = BigQueryPlace("", "")
        self._held: Counter[str] = Counter()
        self._required: dict[str, set[str]] = {}
        self._columns: dict[str, list[str]] = {}
        self._changed = False
        self._wires: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._relay: asyncio.Server | None = None
        self._site: web.TCPSite | None = None
        self._ports = (0, 0)

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        self._rest_port, grpc_port = await asyncio.to_thread(emulator)
        await asyncio.to_thread(bigquery.make_dataset, self._rest_port, PROJECT, self.dataset)
        self._upstream = grpc.aio.insecure_channel(bigquery.grpc_address(grpc_port))
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((_Handler(self),))
        self._inner = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self._session = ClientSession()
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._rest)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        await self.listen()

    async def listen(self) -> None:
        if self._relay is not None:
            return
        self._relay = await asyncio.start_server(self._serve, "127.0.0.1", self._ports[0])
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._ports[1])
        await self._site.start()
        assert self._site._server is not None
        rest = self._site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        self._ports = self._relay.sockets[0].getsockname()[1], rest
        self.place = BigQueryPlace(bigquery.rest_url(rest), bigquery.grpc_address(self._ports[0]))

    async def hang_up(self) -> None:
        """Nothing listens any more."""
        if self._relay is not None and self._site is not None:
            self._relay.close()
            self._relay = None
            await self._site.stop()
        self.drop()

    async def stop(self) -> None:
        await self.hang_up()
        await self._server.stop(0)
        await self._upstream.close()
        await self._runner.cleanup()
        await self._session.close()
        for pump in list(self._pumps):
            pump.cancel()

    def drop(self) -> None:
        """Breaks every connection of gRPC."""
        for wire in self._wires:
            wire.transport.abort()

    # ---------------------------------------------------------------- what it holds

    def rows(self, columns: str = "delivery_id, payload", table: str = "events") -> list[list[str | None]]:
        """In the order in which they were stored."""
        found = bigquery.tables(self._rest_port, PROJECT, self.dataset)
        if table not in found:
            return []
        width = columns.count(",") + 1
        while True:  # what it is asked while rows come in, the emulator can answer with another question's columns
            rows = bigquery.query(self._rest_port, PROJECT, f"SELECT {columns} FROM `{PROJECT}.{self.dataset}.{table}`")
            if all(len(row) == width for row in rows):
                return rows

    def tables(self) -> list[str]:
        return bigquery.tables(self._rest_port, PROJECT, self.dataset)

    def make_dataset(self, name: str) -> None:
        bigquery.make_dataset(self._rest_port, PROJECT, name)

    def table(self, name: str) -> Any:
        return bigquery.table(self._rest_port, PROJECT, self.dataset, name)

    def make_table(self, name: str, columns: list[dict[str, str]]) -> None:
        bigquery.make_table(self._rest_port, PROJECT, self.dataset, name, columns)

    def columns(self) -> list[dict[str, str]]:
        """Those that are written."""
        return [{"name": name, "type": kind, "mode": "NULLABLE"} for name, kind, _ in COLUMNS]

    # ---------------------------------------------------------------- gRPC

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._inner)
        self._wires |= {writer, back}
        pumps = {asyncio.create_task(_pump(reader, back)), asyncio.create_task(_pump(there, writer))}
        self._pumps |= pumps
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            writer.transport.abort()
            back.transport.abort()
            self._wires -= {writer, back}
            self._pumps -= pumps

    async def admit(self, method: str, context: Any) -> None:
        """Every call of gRPC, before it is looked at."""
        self.asked.append(method)
        headers = dict(context.invocation_metadata())
        account = _account(headers.get("authorization", ""))
        if not account:
            await _fail(context, failure(grpc.StatusCode.UNAUTHENTICATED))
        self.accounts.append((account, unquote(headers["x-goog-request-params"])))
        assert headers["x-goog-request-params"].startswith(("parent=projects%2F", "name=projects%2F", "write_stream=p"))
        match self.mode:
            case Mode.THROTTLED:
                await _fail(context, failure(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=RETRY_AFTER_S))
            case Mode.DENIED:
                await _fail(context, failure(grpc.StatusCode.PERMISSION_DENIED))
            case Mode.RESETS:
                self.drop()
                await asyncio.Event().wait()
            case Mode.HANGS:
                await asyncio.Event().wait()

    async def unary(self, method: str, asked: bytes, context: Any) -> bytes:
        await self.admit(method, context)
        if self.mode is Mode.GARBLED:
            return b"\xff\x16\x03\x01 this is no message"
        if self.forget_streams and method == "FinalizeWriteStream":
            await _fail(context, failure(grpc.StatusCode.NOT_FOUND, storage_error=3))
        if not self.fences and method == "FinalizeWriteStream":
            held = self._held[types.FinalizeWriteStreamRequest.pb().FromString(asked).name]
            return bytes(types.FinalizeWriteStreamResponse.pb()(row_count=held).SerializeToString())
        self.on(f"before {method}")
        try:
            answer: bytes = await self._upstream.unary_unary(SERVICE + method)(asked)
        except grpc.aio.AioRpcError as fault:
            await _fail(context, failure(fault.code()))
            raise AssertionError from None
        if method == "CreateWriteStream":
            stream = WriteStream.FromString(answer)
            self.streams.append(stream.name)
            fields = stream.table_schema.fields
            self._columns[stream.name] = [one.name for one in fields]
            self._required[stream.name] = {one.name for one in fields if one.mode == TableField.REQUIRED}
        self.on(f"after {method}")
        return answer

    async def append(self, asked: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await self.admit("AppendRows", context)
        upstream = self._upstream.stream_stream(SERVICE + "AppendRows")()
        row: Any = None
        stream = ""
        try:
            async for content in asked:
                request = AppendRequest.FromString(content)
                stream = request.write_stream or stream
                rows = request.proto_rows.rows.serialized_rows
                if request.proto_rows.HasField("writer_schema"):
                    row = _row_class(request.proto_rows.writer_schema.proto_descriptor)
                self.appends.append(len(rows))
                assert len(content) < 10_000_000
                does = self.script.pop(0) if self.script else ""
                if self.mode is Mode.GARBLED:
                    yield b"\xff\x16\x03\x01 this is no message"
                    continue
                if does == BREAKS:
                    self.drop()
                    await asyncio.Event().wait()
                objection = None if isinstance(does, str) else AppendResponse(error=does)
                objection = objection or self._objection(stream, row, rows)
                if objection is not None:
                    yield objection.SerializeToString()
                    continue
                self.on("before AppendRows")
                await upstream.write(content)
                answer = await upstream.read()
                if answer is grpc.aio.EOF:
                    await _fail(context, failure(await upstream.code()))
                if not AppendResponse.FromString(answer).HasField("error"):
                    self._held[stream] += len(rows)
                self.on("after AppendRows")
                if does == LOST:
                    self.drop()
                if does in (LOST, MUTE):
                    await asyncio.Event().wait()
                if self._changed:
                    told = AppendResponse.FromString(answer)
                    told.updated_schema.fields.add(name="note", type_=TableField.STRING)
                    answer, self._changed = told.SerializeToString(), False
                yield answer
        except grpc.aio.AioRpcError as fault:
            await _fail(context, failure(fault.code()))
        finally:
            upstream.cancel()

    def _objection(self, stream: str, row: Any, rows: Any) -> Any:
        """What BigQuery would answer that the emulator does not."""
        fields = [field.name for field in row.DESCRIPTOR.fields]
        columns = self._columns.get(stream)
        if columns is not None and not set(fields) <= set(columns):
            return AppendResponse(error=failure(grpc.StatusCode.INVALID_ARGUMENT, storage_error=7))
        if not self._required.get(stream, set()) <= set(fields):
            return AppendResponse(error=failure(grpc.StatusCode.INVALID_ARGUMENT))
        made = AppendResponse(error=failure(grpc.StatusCode.INVALID_ARGUMENT))
        for index, content in enumerate(rows):
            if self.mode is Mode.REFUSES or (self.poison and self.poison in content):
                made.row_errors.add(index=index, code=1, message=self.message)
        return made if made.row_errors else None

    # ---------------------------------------------------------------- REST

    async def _rest(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            now = int(time.time())
            claims = {"iss": EMAIL, "sub": EMAIL, "scope": SCOPE, "iat": now, "exp": now + 3600}
            token = jwt.encode(crypt.RSASigner.from_string(json.loads(key_file())["private_key"]), claims)
            return web.json_response({"access_token": token.decode(), "expires_in": 3600, "token_type": "Bearer"})
        self.asked.append(f"{request.method} {request.path}")
        account = _account(request.headers.get("authorization", ""))
        if not account:
            return _error(401, "authError")
        self.accounts.append((account, request.path))
        match self.mode:
            case Mode.THROTTLED:
                return _error(403, "rateLimitExceeded")
            case Mode.DENIED:
                return _error(403, "accessDenied")
            case Mode.GARBLED:
                return web.Response(text="\x16\x03\x01 this is no JSON")
            case Mode.HANGS:
                await asyncio.Event().wait()
            case Mode.RESETS:
                assert request.transport is not None
                request.transport.abort()
                await asyncio.Event().wait()
        self.on(f"before {request.method}")
        if request.method == "PATCH":
            self._changed = True
            name = request.path.rpartition("/")[2]
            await asyncio.to_thread(self._widen, name, await request.json())
        url = bigquery.rest_url(self._rest_port) + request.path_qs
        kept = {name: value for name, value in request.headers.items() if name.lower() in ("content-type", "if-match")}
        async with self._session.request(request.method, url, data=await request.read(), headers=kept) as answer:
            content = await answer.read()
        self.on(f"after {request.method}")
        return web.Response(status=answer.status, body=content, content_type="application/json")

    def _widen(self, name: str, told: Any) -> None:
        """By DDL: the emulator's own PATCH changes what it says of a table, and not the table."""
        there = {field["name"]: field for field in self.table(name)["schema"]["fields"]}
        wanted = {field["name"]: field for field in told["schema"]["fields"]}
        assert set(told) == {"schema"}
        assert list(wanted)[: len(there)] == list(there)  # BigQuery takes no column away
        for field in list(wanted.values())[len(there) :]:
            assert field["mode"] == "NULLABLE"
            where = f"`{PROJECT}.{self.dataset}.{name}`"
            bigquery.query(self._rest_port, PROJECT, f"ALTER TABLE {where} ADD COLUMN {field['name']} {field['type']}")


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, proxy: BigQueryProxy) -> None:
        self._proxy = proxy

    def service(self, details: Any) -> Any:
        method = details.method.removeprefix(SERVICE)
        if method == "AppendRows":
            return grpc.stream_stream_rpc_method_handler(self._proxy.append)

        async def unary(asked: bytes, context: Any) -> bytes:
            return await self._proxy.unary(method, asked, context)

        return grpc.unary_unary_rpc_method_handler(unary)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while content := await reader.read(1 << 16):
            writer.write(content)
            await writer.drain()
    except ConnectionError:
        pass


def _account(authorization: str) -> str:
    """Whose token it is, if its service account has signed it, for BigQuery, and it has not ended."""
    public = (
        account_key()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    try:
        claims = jwt.decode(authorization.removeprefix("Bearer "), public)
    except ValueError:
        return ""
    return str(claims["iss"]) if claims["iss"] == claims["sub"] and claims["scope"] == SCOPE else ""


async def _fail(context: Any, status: Any) -> None:
    code = next(one for one in grpc.StatusCode if one.value[0] == status.code)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    await context.abort(code, status.message)


def _error(status: int, reason: str) -> web.Response:
    message = f"{CANARY}: in the words of BigQuery"
    errors = [{"reason": reason, "message": message, "domain": "global"}]
    return web.json_response({"error": {"code": status, "message": message, "errors": errors}}, status=status)


def _row_class(descriptor: Any) -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(FileDescriptorProto(name="row.proto", syntax="proto2", message_type=[descriptor]))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(descriptor.name))
