"""A tenant's bucket: objects are stored once under their name, or found to be stored already."""

import asyncio
import hashlib
from base64 import b64encode
from collections.abc import Mapping
from functools import partial
from typing import Any, Final
from urllib.parse import urlencode

from connectors.s3.classify import Fault, Step
from connectors.s3.client import Service, Workshop
from connectors.s3.credentials import Holder
from connectors.s3.options import Options

PART_BYTES: Final = 8 * 1024 * 1024
# What is hashed on the event loop: 0.1 ms. More goes to a thread.
HASHED_AT_ONCE: Final = 64 * 1024
CONTENT_TYPE: Final = "application/x-ndjson"
# The object's own metadata that tells whose it is.
IDENTITY: Final = "headgate-batch"


class Bucket:
    def __init__(self, service: Service, holder: Holder, options: Options, shop: Workshop) -> None:
        self._shop = shop
        self._service = service
        self._holder = holder
        self._named = {
            "Bucket": options.bucket,
            **({"ExpectedBucketOwner": options.bucket_owner} if options.bucket_owner else {}),
        }
        self._made = _made(options)
        self._encrypted = options.encryption == "sse-kms"
        self._aborts: set[asyncio.Task[None]] = set()

    async def store(self, key: str, content: bytes, identity: str, deadline: float) -> None:
        """Returns once the object is there, whoever stored it; nothing is ever overwritten. Raises Fault."""
        try:
            if len(content) <= PART_BYTES:
                await self.put(key, content, identity, "write", deadline, IfNoneMatch="*")
            else:
                await self._put_parts(key, content, identity, deadline)
        except Fault as fault:
            if fault.error != "PreconditionFailed" and fault.status != 412:
                raise
            await self.verify(key, identity, deadline)

    async def put(
        self, key: str, content: bytes, identity: str, step: Step, deadline: float, **conditions: str
    ) -> None:
        answer = await self._ask(
            "put_object",
            step,
            self._needs("s3:PutObject"),
            deadline,
            Key=key,
            Body=content,
            ChecksumSHA256=(await self._part(content, 0))[1],
            ContentType=CONTENT_TYPE,
            Metadata={IDENTITY: identity},
            **self._made,
            **conditions,
        )
        if "ETag" not in answer:
            raise Fault("protocol", "the answer has no ETag: what listens there is no S3", step=step)

    async def refuses(self, key: str, deadline: float) -> bool:
        """Whether an object that is there is safe from being overwritten. Raises Fault."""
        try:
            await self.put(key, b"{}\n", "", "once", deadline, IfNoneMatch="*")
        except Fault as fault:
            if fault.status != 412:
                raise
            return True
        return False

    async def verify(self, key: str, identity: str, deadline: float) -> None:
        """Raises Fault unless the object is there, and is the one with this identity."""
        try:
            found = await self._ask("head_object", "read", "s3:GetObject", deadline, Key=key)
        except Fault as fault:
            if fault.status == 404:  # it went in between
                raise Fault("conflict", status=404, step="read") from None
            if fault.code in ("denied", "encryption", "refused"):
                raise Fault("unverified", status=fault.status, step="read") from None
            raise
        if found.get("Metadata", {}).get(IDENTITY) != identity:
            raise Fault("name_taken", status=412, step="read")

    async def delete(self, key: str, deadline: float) -> None:
        await self._ask("delete_object", "delete", "s3:DeleteObject", deadline, Key=key)

    async def _put_parts(self, key: str, content: bytes, identity: str, deadline: float) -> None:
        needs = self._needs("s3:PutObject")
        begun = await self._ask(
            "create_multipart_upload",
            "write",
            needs,
            deadline,
            Key=key,
            ChecksumAlgorithm="SHA256",
            ContentType=CONTENT_TYPE,
            Metadata={IDENTITY: identity},
            **self._made,
        )
        if not (upload := begun.get("UploadId")):
            raise Fault("protocol", "the answer has no upload id: what listens there is no S3", step="write")
        upload_of: dict[str, Any] = {"Key": key, "UploadId": upload}
        try:
            parts = []
            for number, start in enumerate(range(0, len(content), PART_BYTES), 1):
                part, checksum = await self._part(content, start)
                answer = await self._ask(
                    "upload_part",
                    "write",
                    needs,
                    deadline,
                    PartNumber=number,
                    Body=part,
                    ChecksumSHA256=checksum,
                    **upload_of,
                )
                if "ETag" not in answer:
                    raise Fault("protocol", "the answer has no ETag: what listens there is no S3", step="write")
                parts.append({"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum})
            await self._ask(
                "complete_multipart_upload",
                "write",
                needs,
                deadline,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
                **upload_of,
            )
        except BaseException:
            # in a task of its own: whoever was cancelled cannot wait, and parts cost money until they are gone
            task = asyncio.get_running_loop().create_task(self._abort(upload_of))
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)
            raise

    async def _part(self, content: bytes, start: int) -> tuple[bytes, str]:
        """A part, and its checksum."""
        if len(content) <= HASHED_AT_ONCE:
            return _part(content, start)
        return await self._shop.run(partial(_part, content, start))

    async def _abort(self, upload_of: Mapping[str, Any]) -> None:
        try:
            await self._ask("abort_multipart_upload", "write", "s3:AbortMultipartUpload", None, **upload_of)
        except Fault:
            pass  # the guide tells how to have left-over parts removed

    async def _ask(
        self, operation: str, step: Step, needs: str, deadline: float | None, **parameters: Any
    ) -> Mapping[str, Any]:
        if deadline is not None and asyncio.get_running_loop().time() > deadline:
            raise Fault("late", step=step)
        credentials = await self._holder.current()
        try:
            return await self._service.ask(credentials, operation, step, needs, **self._named, **parameters)
        except Fault as fault:
            self._holder.refused(fault)
            raise

    def _needs(self, permission: str) -> str:
        tagging = " (with s3:PutObjectTagging)" if "Tagging" in self._made else ""
        return f"{permission}{tagging}{' or kms:GenerateDataKey' if self._encrypted else ''}"

    async def close(self) -> None:
        while self._aborts:
            await asyncio.wait(self._aborts)
        await self._service.close()


def _made(options: Options) -> dict[str, str]:
    """How new objects are to be kept."""
    made: dict[str, str] = {}
    if options.encryption == "sse-s3":
        made["ServerSideEncryption"] = "AES256"
    elif options.encryption == "sse-kms":
        made["ServerSideEncryption"] = "aws:kms"
        if options.kms_key:
            made["SSEKMSKeyId"] = options.kms_key
    if options.storage_class != "STANDARD":
        made["StorageClass"] = options.storage_class
    if options.tags:
        made["Tagging"] = urlencode(options.tags)
    return made


def _part(content: bytes, start: int) -> tuple[bytes, str]:
    part = content[start : start + PART_BYTES]
    return part, b64encode(hashlib.sha256(part).digest()).decode()
