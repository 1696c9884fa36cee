"""TensorFlow's checkpoint files, read without TensorFlow.

    bundle = Bundle("ckpt-500000")  # ckpt-500000.index and ckpt-500000.data-00000-of-00001 ...
    bundle.entries["save_counter/.ATTRIBUTES/VARIABLE_VALUE"].shape
    bundle.tensor("model/.../kernel/.ATTRIBUTES/VARIABLE_VALUE")

The format (tensorflow/core/util/tensor_bundle, tensorflow/core/protobuf/tensor_bundle.proto and
LevelDB's doc/table_format.md). The index is a LevelDB table from keys to protobuf messages:

    data block ... metaindex block, index block, footer
    footer    handles of the last two blocks, zeros up to 40 bytes, an 8-byte magic number
    handle    offset and size of a block, as varints
    block     entries, their restart points (4 bytes each), the number of those (4 bytes); behind it
              1 byte of compression and 4 of checksum, which the handle's size leaves out
    entry     bytes shared with the key before, further bytes of the key, bytes of the value (all
              varints), these bytes of the key, the value

The key "" holds the header: number of data files, byte order. All others hold dtype, shape, data
file, offset, size and checksum of one tensor, which lies in that data file as little-endian numbers
without any frame. Checksums are CRC-32C, rotated and shifted ("masked").
"""

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

google_crc32c: Any = None
with contextlib.suppress(ImportError):
    import google_crc32c

_MAGIC, _FOOTER, _TRAILER = 0xDB4775248B80FB57, 48, 5
# longer than any key of a model; entries share beginnings, so a small file could hold huge ones
_LONGEST_KEY = 1024
_STRING, _PIECE = 7, 1 << 24
# tensorflow/core/framework/types.proto
_DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    9: torch.int64,
    14: torch.bfloat16,
    19: torch.float16,
}
_OTHERS = {
    4: "uint8", 5: "int16", 6: "int8", 7: "string", 8: "complex64", 10: "bool", 11: "qint8",
    12: "quint8", 13: "qint32", 15: "qint16", 16: "quint16", 17: "uint16", 18: "complex128",
    20: "resource", 21: "variant", 22: "uint32", 23: "uint64",
}  # fmt: skip
# whether ``Bundle.tensor`` compares checksums; the index's are compared in any case
CHECKS_TENSORS = google_crc32c is not None


class _DamagedError(Exception):
    """What is wrong inside a file; becomes a ValueError that names it."""


class _ForeignError(Exception):
    """What a sound file holds and this reader doesn't read; becomes a ValueError, too."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies. ``sliced``: it is stored in parts, which are not read."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int | None
    sliced: bool = False

    @property
    def dtype_name(self) -> str:
        if self.dtype in _DTYPES:
            return str(_DTYPES[self.dtype]).removeprefix("torch.")
        return _OTHERS.get(self.dtype, f"number {self.dtype}")

    @property
    def is_float(self) -> bool:
        return self.dtype in _DTYPES and _DTYPES[self.dtype].is_floating_point


class Bundle:
    """A checkpoint, its index read and its data files memory-mapped.

    Attributes:
        entries: what the index says of each tensor, by key.

    Raises:
        ValueError: a file is missing, cut short, damaged, or of a kind that is not read
            (compressed blocks, big-endian numbers); the message names it.
    """

    def __init__(self, prefix: str | os.PathLike) -> None:
        self.prefix = prefix_of(prefix)
        index = Path(f"{self.prefix}.index")
        if not index.is_file():
            inside = sorted(path.stem for path in Path(self.prefix).glob("*.index"))
            within = f"; in this folder there is {', '.join(inside[:5])}" if inside else ""
            raise ValueError(
                f"{index} is missing; a checkpoint is named by what stands before .index{within}"
            )
        try:
            self._shards, self.entries = _read_index(index)
            for key, entry in self.entries.items():
                _check_entry(key, entry, self._shards)
        except _DamagedError as error:
            raise ValueError(f"{index} is damaged: {error}; download or copy it again") from error
        except _ForeignError as error:
            raise ValueError(f"{index} cannot be read: {error}") from error
        self._check_data_files()
        self._maps: dict[int, mmap.mmap] = {}

    def tensor(self, key: str) -> Tensor:
        """A copy of the tensor in its own dtype: fp32, fp64, fp16, bf16, int32 or int64.

        Raises:
            ValueError: no such key, another dtype, a tensor stored in slices, or a checksum that
                differs.
        """
        entry = self._entry(key)
        if entry.dtype not in _DTYPES:
            raise ValueError(
                f"{self.prefix}: {key} holds {entry.dtype_name}, which is no number of a model"
            )
        data = bytearray(self._bytes(entry))
        if google_crc32c is not None and entry.checksum is not None:
            checksum = 0
            for start in range(0, len(data), _PIECE):
                checksum = google_crc32c.extend(checksum, bytes(data[start : start + _PIECE]))
            self._compare(key, entry, checksum)
        if not data:
            return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).reshape(entry.shape)

    def strings(self, key: str) -> list[bytes]:
        """The strings of an entry, such as the object graph, in row-major order.

        They lie behind their lengths (varints) and these lengths' checksum. The entry's own
        checksum counts the lengths as 4 bytes each.

        Raises:
            ValueError: as for ``tensor``.
        """
        entry = self._entry(key)
        if entry.dtype != _STRING:
            raise ValueError(f"{self.prefix}: {key} holds {entry.dtype_name}, not strings")
        data, at, lengths = bytes(self._bytes(entry)), 0, []
        try:
            for _ in range(_count(entry.shape)):
                length, at = _varint(data, at)
                lengths.append(length)
            if at + 4 + sum(lengths) != len(data):
                raise _DamagedError("its lengths do not add up")
        except _DamagedError as error:
            raise ValueError(f"{self._path(entry.shard)} is damaged at {key}: {error}") from error
        text = data[at + 4 :]
        if google_crc32c is not None:
            sizes = b"".join(n.to_bytes(4 if n < 2**32 else 8, "little") for n in lengths)
            of_lengths = google_crc32c.value(sizes)
            if _masked(of_lengths) != int.from_bytes(data[at : at + 4], "little"):
                raise ValueError(
                    f"{self._path(entry.shard)} is damaged at {key}: the checksum of its lengths "
                    "differs; download or copy it again"
                )
            if entry.checksum is not None:
                checksum = google_crc32c.extend(of_lengths, data[at : at + 4])
                self._compare(key, entry, google_crc32c.extend(checksum, text))
        found, start = [], 0
        for length in lengths:
            found.append(text[start : start + length])
            start += length
        return found

    def _entry(self, key: str) -> Entry:
        if key not in self.entries:
            raise ValueError(f"{self.prefix} has no {key}")
        if self.entries[key].sliced:
            raise ValueError(
                f"{self.prefix}: {key} is stored in slices (a partitioned variable), which are not "
                "read; save the checkpoint again without a partitioner"
            )
        return self.entries[key]

    def _bytes(self, entry: Entry) -> memoryview:
        if not entry.size:
            return memoryview(b"")
        if entry.shard not in self._maps:
            with open(self._path(entry.shard), "rb") as file:
                self._maps[entry.shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._maps[entry.shard])[entry.offset : entry.offset + entry.size]

    def _compare(self, key: str, entry: Entry, checksum: int) -> None:
        if _masked(checksum) != entry.checksum:
            raise ValueError(
                f"{self._path(entry.shard)} is damaged at {key}: its checksum differs; "
                "download or copy it again"
            )

    def _path(self, shard: int) -> Path:
        return Path(f"{self.prefix}.data-{shard:05d}-of-{self._shards:05d}")

    def _check_data_files(self) -> None:
        """Each one is there and as long as the index says."""
        ends: dict[int, int] = {}
        for entry in self.entries.values():
            ends[entry.shard] = max(ends.get(entry.shard, 0), entry.offset + entry.size)
        for shard, end in sorted(ends.items()):
            path = self._path(shard)
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing; the index names {self._shards} data files: put all beside "
                    "it"
                )
            if (size := path.stat().st_size) < end:
                raise ValueError(
                    f"{path} is cut short: it has {size} bytes of {end}; download or copy it again"
                )


def prefix_of(name: str | os.PathLike) -> str:
    """The checkpoint's prefix, also where one of its files is named."""
    name = os.fspath(name)
    if name.endswith(".index"):
        return name.removesuffix(".index")
    stem, dot, rest = name.rpartition(".data-")
    return stem if dot and "-of-" in rest else name


def is_checkpoint(name: str | os.PathLike) -> bool:
    """Whether there is an index of that prefix."""
    return Path(f"{prefix_of(name)}.index").is_file()


# -- the table -------------------------------------------------------------------------------------


def _read_index(path: Path) -> tuple[int, dict[str, Entry]]:
    """The number of data files, and the entries by key."""
    data = path.read_bytes()
    if len(data) < _FOOTER or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise _DamagedError("it does not end as an index of TensorFlow does")
    footer, at = data[-_FOOTER:], 0
    for _ in range(2):  # the metaindex, which is empty
        _, at = _varint(footer, at)
    shards, entries = 0, {}
    for _, handle in _block(data, *_handle(footer, at)):
        for key, value in _block(data, *_handle(handle, 0)):
            if key == b"":
                shards = _header(value)
            elif not key.startswith(b"\0"):  # a slice of a partitioned variable
                name = key.decode("utf-8", errors="replace")
                if not name.isprintable():
                    raise _DamagedError(f"{name!r} is no key")
                if name in entries:
                    raise _DamagedError(f"{name} is there twice")
                entries[name] = _parse_entry(name, value)
    if not shards:
        raise _DamagedError("it has no header")
    return shards, entries


def _handle(data: bytes, at: int) -> tuple[int, int]:
    offset, at = _varint(data, at)
    return offset, _varint(data, at)[0]


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block, after its checksum is compared."""
    end = offset + size
    if size < 4 or end + _TRAILER > len(data) - _FOOTER:
        raise _DamagedError(f"a block of {size} bytes at {offset} does not fit into the file")
    compression = data[end]
    checksum = _crc32c(data[offset : end + 1])
    if _masked(checksum) != int.from_bytes(data[end + 1 : end + _TRAILER], "little"):
        raise _DamagedError(f"the checksum of the block at {offset} differs")
    if compression:
        kind = "snappy" if compression == 1 else f"kind {compression}"
        raise _ForeignError(
            f"its blocks are compressed ({kind}); save the checkpoint again without compression"
        )
    block = data[offset:end]
    restarts = int.from_bytes(block[-4:], "little")
    at, stop, key = 0, size - 4 - 4 * restarts, b""
    if stop < 0:
        raise _DamagedError(f"the block at {offset} has {restarts} restart points")
    while at < stop:
        shared, at = _varint(block, at)
        added, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or shared + added > _LONGEST_KEY or at + added + length > stop:
            raise _DamagedError(f"an entry of the block at {offset} does not fit into it")
        key = key[:shared] + block[at : at + added]
        at += added
        yield key, block[at : at + length]
        at += length


# -- the messages ----------------------------------------------------------------------------------


def _header(value: bytes) -> int:
    """The number of data files."""
    shards, oldest_reader = 0, 0
    for field, found in _fields(value):
        if field == 1:
            shards = _number(found)
        elif field == 2 and found != 0:
            raise _ForeignError(
                "its numbers are big-endian; save the checkpoint again on a little-endian machine"
            )
        elif field == 3:
            oldest_reader = _number(dict(_fields(_message(found))).get(2, 0))
    if oldest_reader > 1:
        raise _ForeignError(f"it asks for readers of version {oldest_reader}; this one knows 1")
    if not 1 <= shards <= 99999:
        raise _DamagedError(f"it names {shards} data files")
    return shards


def _parse_entry(key: str, value: bytes) -> Entry:
    numbers = dict.fromkeys((1, 3, 4, 5), 0)  # dtype, shard, offset, size
    shape: list[int] = []
    checksum, sliced = None, False
    for field, found in _fields(value):
        if field in numbers:
            numbers[field] = _number(found)
        elif field == 2:
            shape = _parse_shape(key, _message(found))
        elif field == 6:
            checksum = _number(found)
        elif field == 7:
            sliced = True
    dtype, shard, offset, size = numbers.values()
    return Entry(dtype, tuple(shape), shard, offset, size, checksum, sliced)


def _parse_shape(key: str, value: bytes) -> list[int]:
    shape = []
    for field, found in _fields(value):
        if field == 2:
            sizes = dict(_fields(_message(found)))
            shape.append(_number(sizes.get(1, 0)))
        elif field == 3 and found:
            raise _DamagedError(f"{key} is of unknown rank")
    return shape


def _check_entry(key: str, entry: Entry, shards: int) -> None:
    """Nothing is read, nor room made, for what the shape and the size do not agree on."""
    if entry.shard >= shards:
        raise _DamagedError(f"{key} lies in data file {entry.shard} of {shards}")
    if max(*entry.shape, entry.offset, entry.size, 0) >= 2**48:  # below 0: 2**64 less something
        raise _DamagedError(f"{key} has a size below 0 or beyond any disk")
    count = _count(entry.shape)
    if entry.sliced or (entry.dtype not in _DTYPES and entry.dtype != _STRING):
        return  # never read
    if entry.dtype == _STRING:
        fits = entry.size >= count
    else:
        fits = entry.size == count * _DTYPES[entry.dtype].itemsize
    if not fits:
        raise _DamagedError(
            f"{key} has {entry.size} bytes for {entry.dtype_name} of shape {entry.shape}"
        )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _fields(value: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: number, and an integer or the bytes of a message."""
    at = 0
    while at < len(value):
        tag, at = _varint(value, at)
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            found, at = _varint(value, at)
            yield field, found
            continue
        length = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            length, at = _varint(value, at)
        if length is None or at + length > len(value):
            raise _DamagedError("a message is not whole")
        part = value[at : at + length]
        yield field, part if kind == 2 else int.from_bytes(part, "little")
        at += length


def _number(found: int | bytes) -> int:
    if not isinstance(found, int):
        raise _DamagedError("a message has bytes in the place of a number")
    return found


def _message(found: int | bytes) -> bytes:
    if not isinstance(found, bytes):
        raise _DamagedError("a message has a number in the place of a message")
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """7 bits a byte, the lowest first; the highest bit says that more follow."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _DamagedError("it ends amid a number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _DamagedError("a number has more than 10 bytes")


# -- checksums -------------------------------------------------------------------------------------


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def _crc32c(data: bytes) -> int:
    """Of an index, which is small; in Python where the package is not there."""
    if google_crc32c is not None:
        return google_crc32c.value(data)
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 255] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _masked(checksum: int) -> int:
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
