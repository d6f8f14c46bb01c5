"""An S3 on loopback that misbehaves on demand: what this kind asks of one, and of STS, spoken in AWS's own protocol.

It judges every signature, keeps objects and uploads in memory, and stores nothing under a name that is taken if it is
told so. What real servers make of the same is asked in `tests/connectors/test_s3_servers.py`.
"""

import asyncio
import gzip
import hashlib
import hmac
from base64 import b64encode
from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from typing import Any
from urllib.parse import parse_qsl, unquote

import cramjam
import msgspec
from msgspec import Struct

from schemas.ids import DeliveryId
from schemas.outcome import Verdict
from tests.contract.far_side import CANARY, Held, Mode

BUCKET = "acme-events"
REGION = "eu-central-1"
ACCESS_KEY = f"AKIA{CANARY}"
SECRET_KEY = f"{CANARY}-secret"
ROLE = "arn:aws:iam::111122223333:role/headgate"
EXTERNAL_ID = "acme-7f3k"
PROBE = ".headgate-check-"
_ERRORS = {
    Mode.THROTTLED: (503, "SlowDown"),
    Mode.DENIED: (403, "AccessDenied"),
    Mode.REFUSES: (400, "EntityTooLarge"),
}


class _Line(Struct):
    deliveryId: str
    payload: msgspec.Raw


class Stored(Struct):
    content: bytes
    headers: Mapping[str, str]


class Request(Struct):
    method: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def operation(self) -> str:
        if not self.bucket:
            return dict(parse_qsl(self.body.decode()))["Action"]
        match self.method:
            case "PUT":
                return "UploadPart" if "uploadId" in self.query else "PutObject"
            case "POST":
                return "CreateMultipartUpload" if "uploads" in self.query else "CompleteMultipartUpload"
            case "HEAD":
                return "HeadObject"
            case "DELETE":
                return "AbortMultipartUpload" if "uploadId" in self.query else "DeleteObject"
        raise AssertionError(f"nobody asks for {self.method}")


class Answer(Struct):
    """`status` 0: the connection breaks."""

    status: int
    code: str = ""
    headers: Mapping[str, str] = {}
    body: bytes | None = None
    message: str = CANARY

    def encode(self, head: bool) -> bytes:
        body = self.body
        if body is None:
            body = b""
            if self.code:
                body = f"<Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>".encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        start = f"HTTP/1.1 {self.status} x\r\ncontent-length: {len(body)}\r\n{lines}\r\n".encode()
        return start if head else start + body


LOST = Answer(0, "LOST")  # it is done, but the answer is lost


class S3FarSide:
    allow = (ip_network("127.0.0.0/8"),)
    retry_after_s = 7.0
    # a late grant must not kill a backlog; and nothing in S3 says that a bucket will never be there again
    differs: Mapping[Mode, Verdict | None] = {Mode.DENIED: "retry", Mode.GONE: None}

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}  # by key, in the order in which they came
        self.uploads: dict[str, tuple[str, Mapping[str, str], dict[int, bytes]]] = {}
        self.requests: list[Request] = []
        self.connections = 0
        self.overwrites = False  # it does not know If-None-Match
        self.keys = {ACCESS_KEY: (SECRET_KEY, "")}  # secret and token, by access key
        self.sessions = 0
        self.session_ends: set[str] = set()  # tokens that have expired
        # to the next requests of an operation, instead of what the mode says
        self.answers: dict[str, list[Answer]] = {}
        self._mode = Mode.UP
        self._touched = 0
        self._port = 0
        self._server: asyncio.Server | None = None
        self._peers: set[asyncio.StreamWriter] = set()

    @property
    def port(self) -> int:
        return self._port

    @property
    def operations(self) -> list[str]:
        return [one.operation for one in self.requests]

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, limit=1 << 26)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for peer in self._peers:
            peer.transport.abort()

    async def become(self, mode: Mode) -> None:
        self._mode = mode
        if mode is Mode.DOWN:
            await self.stop()
        elif self._server is None:
            await self.start()

    def options(self) -> Mapping[str, Any]:
        return {
            "bucket": BUCKET,
            "region": REGION,
            "prefix": "in/here",
            "endpoint": f"http://127.0.0.1:{self._port}",
            "path_style": True,
            "timeout": "500ms",
        }

    def secrets(self) -> Mapping[str, Any]:
        return {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY}

    def lines(self, key: str) -> list[bytes]:
        content = self.objects[key].content
        if key.endswith(".gz"):
            content = gzip.decompress(content)
        elif key.endswith(".zst"):
            content = bytes(cramjam.zstd.decompress(content))
        assert content.endswith(b"\n")
        return content[:-1].split(b"\n")

    def held(self) -> Sequence[Held]:
        lines = [msgspec.json.decode(line, type=_Line) for key in list(self.objects) for line in self.lines(key)]
        return [Held(DeliveryId(line.deliveryId), bytes(line.payload)) for line in lines]

    def touched(self) -> int:
        return self._touched

    # ---------------------------------------------------------------- the protocol

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peers.add(writer)
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head[:-4].split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, target, _ = first.split(" ")
                path, _, query = target.partition("?")
                _, bucket, key = (unquote(path) + "//").split("/", 2)
                asked = Request(method, bucket, key[:-1].removesuffix("/"), _query(query), headers, body)
                await self._respond(asked, path, query, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._peers.discard(writer)
            writer.close()

    async def _respond(self, asked: Request, path: str, query: str, writer: asyncio.StreamWriter) -> None:
        self.requests.append(asked)
        self._touched += not asked.key.rpartition("/")[2].startswith(PROBE)
        prepared = self.answers.get(asked.operation)
        answer = prepared.pop(0) if prepared else None
        if answer is LOST:
            self._answer(asked)
        elif answer is None:
            match self._mode:
                case Mode.UP:
                    answer = self._refusal(asked, path, query) or self._answer(asked)
                case Mode.RESETS:
                    answer = Answer(0)
                case Mode.HANGS:
                    return
                case Mode.GARBLED:
                    writer.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
                    return
                case mode:
                    status, code = _ERRORS[mode]
                    answer = Answer(status, code, {"retry-after": "7"} if status == 503 else {})
        if answer.status:
            writer.write(answer.encode(asked.method == "HEAD"))
            await writer.drain()
        else:
            writer.transport.abort()

    def _refusal(self, asked: Request, path: str, query: str) -> Answer | None:
        """By the rules of Signature Version 4."""
        headers = asked.headers
        scheme, _, rest = headers["authorization"].partition(" ")
        assert scheme == "AWS4-HMAC-SHA256"
        given = dict(part.strip().split("=", 1) for part in rest.split(","))
        access_key, date, region, service, _ = given["Credential"].split("/")
        if access_key not in self.keys:
            return Answer(403, "InvalidAccessKeyId", message=f"no {access_key}")
        secret, token = self.keys[access_key]
        if headers.get("x-amz-security-token", "") != token or token in self.session_ends:
            return Answer(400, "ExpiredToken")
        payload = headers.get("x-amz-content-sha256", hashlib.sha256(asked.body).hexdigest())
        if payload != hashlib.sha256(asked.body).hexdigest():
            return Answer(400, "XAmzContentSHA256Mismatch")
        if region != REGION:
            return Answer(400, "AuthorizationHeaderMalformed", {"x-amz-bucket-region": REGION})
        signed = given["SignedHeaders"]
        lines = "".join(f"{name}:{' '.join(headers[name].split())}\n" for name in signed.split(";"))
        ordered = "&".join(sorted(part if "=" in part else f"{part}=" for part in query.split("&") if part))
        canonical = "\n".join((asked.method, path, ordered, lines, signed, payload))
        scope = f"{date}/{region}/{service}/aws4_request"
        text = "\n".join((scheme, headers["x-amz-date"], scope, hashlib.sha256(canonical.encode()).hexdigest()))
        key = f"AWS4{secret}".encode()
        for part in (date, region, service, "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        if hmac.digest(key, text.encode(), "sha256").hex() != given["Signature"]:
            return Answer(403, "SignatureDoesNotMatch", message=text)
        if asked.bucket not in ("", BUCKET):
            return Answer(404, "NoSuchBucket")
        checksum = headers.get("x-amz-checksum-sha256")
        if checksum not in (None, b64encode(hashlib.sha256(asked.body).digest()).decode()):
            return Answer(400, "BadDigest")
        return None

    def _answer(self, asked: Request) -> Answer:
        match asked.operation:
            case "AssumeRole":
                return self._assumed(dict(parse_qsl(asked.body.decode())))
            case "PutObject":
                return self._store(asked, asked.key, Stored(asked.body, asked.headers)) or Answer(
                    200, headers={"ETag": '"etag"'}
                )
            case "HeadObject":
                if asked.key not in self.objects:
                    return Answer(404)
                kept = self.objects[asked.key]
                meta = {name: value for name, value in kept.headers.items() if name.startswith("x-amz-meta-")}
                return Answer(200, headers={"ETag": '"etag"', **meta}, body=kept.content)
            case "DeleteObject":
                self.objects.pop(asked.key, None)
                return Answer(204)
            case "CreateMultipartUpload":
                upload = f"upload-{len(self.requests)}"
                self.uploads[upload] = asked.key, asked.headers, {}
                made = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
                return Answer(200, body=made.encode())
        upload = asked.query["uploadId"]
        if upload not in self.uploads:
            return Answer(404, "NoSuchUpload")
        key, headers, kept_parts = self.uploads[upload]
        match asked.operation:
            case "AbortMultipartUpload":
                del self.uploads[upload]
                return Answer(204)
            case "UploadPart":
                kept_parts[int(asked.query["partNumber"])] = asked.body
                return Answer(200, headers={"ETag": '"part"'})
        whole = Stored(b"".join(kept_parts[number] for number in sorted(kept_parts)), headers)
        taken = self._store(asked, key, whole)
        if taken is not None:
            return taken
        del self.uploads[upload]
        return Answer(200, body=b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>")

    def _store(self, asked: Request, key: str, stored: Stored) -> Answer | None:
        if key in self.objects and asked.headers.get("if-none-match") == "*" and not self.overwrites:
            return Answer(412, "PreconditionFailed")
        self.objects[key] = stored
        return None

    def _assumed(self, asked: Mapping[str, str]) -> Answer:
        if (asked["RoleArn"], asked.get("ExternalId")) != (ROLE, EXTERNAL_ID):
            return Answer(403, body=b"<ErrorResponse><Error><Code>AccessDenied</Code></Error></ErrorResponse>")
        self.sessions += 1
        access_key, secret, token = (f"{name}{self.sessions}{CANARY}" for name in ("ASIA", "secret", "token"))
        self.keys[access_key] = secret, token
        body = (
            f"<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>{access_key}</AccessKeyId>"
            f"<SecretAccessKey>{secret}</SecretAccessKey><SessionToken>{token}</SessionToken>"
            "<Expiration>2026-12-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>"
        )
        return Answer(200, body=body.encode())


def _query(text: str) -> Mapping[str, str]:
    return dict(parse_qsl(text, keep_blank_values=True))


FAR_SIDE = S3FarSide
