"""aiokafka, made to read records whose header names are not UTF-8.

The broker takes such names, and clients in other languages write them. aiokafka raises UnicodeDecodeError on the first
one: the fetch loop ends, and so does every worker that gets the partition next. Importing this module mends it for all
consumers of the process: a fetch that holds such a name is read again by aiokafka's own Python reader, which is told to
spell what is not UTF-8 as `\\xff`. All other fetches take the compiled reader, as before.
"""

from typing import Any, cast

import aiokafka.consumer.fetcher as fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy
from aiokafka.record.util import decode_varint_py

_Compiled: Any = fetcher.MemoryRecords


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


class Batches(_Compiled):  # type: ignore[misc]
    """The compiled reader of a fetch, which keeps at hand what it reads."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        self.raw = raw


class PartitionRecords(fetcher.PartitionRecords):  # type: ignore[misc]  # aiokafka is untyped
    """The records of a fetch; from the first strange name on, from a second reading."""

    def __init__(self, tp: Any, records: Batches, aborted: Any, *more: Any) -> None:
        self._aborted_producers: set[int] = set()
        self._records_iterator: Any = None
        self._again = (records.raw, list(aborted or ()))
        super().__init__(tp, records, aborted, *more)

    def __next__(self) -> Any:
        try:
            return next(self._records_iterator)
        except StopIteration:
            self._records_iterator = None
            raise
        except UnicodeDecodeError:
            raw, aborted = self._again
            self._records = _LenientBatches(raw)
            self._aborted_transactions = sorted(aborted, key=lambda one: cast(int, one[1]))
            self._aborted_producers = set()
            self._records_iterator = self._unpack_records()  # it skips what `next_fetch_offset` has passed
            return next(self)


fetcher.MemoryRecords = Batches
fetcher.PartitionRecords = PartitionRecords
