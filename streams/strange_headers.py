"""aiokafka, made to read records whose header names are not UTF-8.

The broker takes such names, and clients in other languages write them. aiokafka raises UnicodeDecodeError on the first
one: the fetch loop ends, and so does every worker that gets the partition next. So a fetch that holds such a name is
read again (`fetching.py`) by aiokafka's own Python reader, which is told here to spell what is not UTF-8 as `\\xff`.
All other fetches take the compiled reader.
"""

from typing import Any

from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy
from aiokafka.record.util import decode_varint_py


class _Lenient(bytearray):
    """Bytes whose parts decode whatever they hold."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _Lenient(found) if isinstance(at, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return super().decode(encoding, "backslashreplace")


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]  # marked final
    def __iter__(self) -> Any:
        self._maybe_uncompress()
        self._buffer: bytearray = _Lenient(self._buffer)
        return self

    def _read_msg(self, decode_varint: Any = decode_varint_py) -> Any:
        return super()._read_msg(decode_varint)  # the compiled one takes nothing but a plain bytearray


class _LenientBatches(_MemoryRecordsPy):  # type: ignore[misc]  # marked final
    def next_batch(self, *_: Any) -> Any:
        found = self._next_slice
        if found is None or found[self.MAGIC_OFFSET] < 2:  # formats before 2 have no headers
            return super().next_batch()
        self._cache_next()
        return _LenientBatch(found)


def lenient_batches(raw: bytes) -> Any:
    """A reader of fetched bytes that takes every header name."""
    return _LenientBatches(raw)
