"""A writer of TensorFlow's checkpoint files, to make the kinds that no release has.

Written from LevelDB's doc/table_format.md and TensorFlow's tensor_bundle.proto, apart from the
reader.
"""

import struct
from pathlib import Path

import numpy as np

DTYPES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int64": 9, "bool": 10, "float16": 19}
BFLOAT16, STRING = 14, 7
OWN = object()  # a checksum of its own


def crc32c(data: bytes) -> int:
    """Bit by bit in tables of 256: x^32 + the Castagnoli polynomial, reflected."""
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ _TABLE[(value ^ byte) & 0xFF]
    return ~value & 0xFFFFFFFF


def _row(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 * (value & 1))
    return value


_TABLE = [_row(value) for value in range(256)]


def masked(checksum: int) -> bytes:
    rotated = ((checksum >> 15) | (checksum << 17)) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)


def varint(value: int) -> bytes:
    value %= 2**64
    out = b""
    while value >= 128:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field * 8) + varint(value) if value else b""


def message(field: int, value: bytes) -> bytes:
    return varint(field * 8 + 2) + varint(len(value)) + value


def entry(
    dtype: int, shape, shard: int, offset: int, size: int, checksum: bytes | None, slices: int = 0
) -> bytes:
    """A BundleEntryProto."""
    value = number(1, dtype) + message(2, b"".join(message(2, number(1, n)) for n in shape))
    value += number(3, shard) + number(4, offset) + number(5, size)
    value += b"" if checksum is None else varint(6 * 8 + 5) + checksum
    return value + b"".join(message(7, b"") for _ in range(slices))


def header(shards: int, big_endian: bool = False, oldest_reader: int = 0) -> bytes:
    """A BundleHeaderProto."""
    version = number(1, 1) + number(2, oldest_reader)
    return number(1, shards) + number(2, int(big_endian)) + message(3, version)


def encoded(value) -> tuple[int, tuple[int, ...], bytes]:
    """dtype, shape and bytes of an array, a list of byte strings, or ("bfloat16", shape, bytes)."""
    if isinstance(value, tuple):
        return BFLOAT16, value[1], value[2]
    if isinstance(value, list):
        lengths = [len(text) for text in value]
        sizes = struct.pack(f"<{len(value)}I", *lengths)
        head = b"".join(map(varint, lengths)) + masked(crc32c(sizes))
        return STRING, (len(value),), head + b"".join(value)
    value = np.asarray(value, order="C")
    return DTYPES[value.dtype.name], value.shape, value.tobytes()


def block(pairs: list[tuple[bytes, bytes]], restart_interval: int = 16) -> bytes:
    out, restarts, before = b"", [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % restart_interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        before = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(
    pairs: list[tuple[bytes, bytes]],
    *,
    block_entries: int = 50,
    compression: int = 0,
    restart_interval: int = 16,
) -> bytes:
    """A LevelDB table with these keys and values in this order."""
    out = b""

    def add(contents: bytes, kind: int = 0) -> bytes:
        nonlocal out
        handle = varint(len(out)) + varint(len(contents))
        out += contents + bytes([kind]) + masked(crc32c(contents + bytes([kind])))
        return handle

    handles = []
    for start in range(0, len(pairs), block_entries):
        part = pairs[start : start + block_entries]
        handles.append((part[-1][0] + b"\0", add(block(part, restart_interval), compression)))
    ends = add(block([])) + add(block(handles, 1))
    return out + ends.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def write_bundle(
    prefix: Path,
    tensors: dict,
    *,
    shards: int = 1,
    reverse: bool = False,
    big_endian: bool = False,
    oldest_reader: int = 0,
    sliced: tuple[str, ...] = (),
    extra: dict[bytes, bytes] | None = None,
    checksums: bool = True,
    **table_options,
) -> None:
    """Write ``prefix``.index and its data files.

    Args:
        tensors: by key, as ``encoded`` takes them; they go round the shards.
        reverse: they lie in the data files in the reverse order of their keys.
        sliced: keys of partitioned variables; their data go under keys of their own, as slices.
        extra: further keys and values of the index, which replace others of that key.
        checksums: write those of tensors.
    """
    data = [b""] * shards
    values = {b"": header(shards, big_endian, oldest_reader)}
    for i, key in enumerate(sorted(tensors, reverse=reverse)):
        dtype, shape, raw = encoded(tensors[key])
        counted = raw
        if dtype == STRING:  # the checksum counts each length as 4 bytes
            lengths = [len(text) for text in tensors[key]]
            counted = (
                struct.pack(f"<{len(lengths)}I", *lengths) + raw[len(raw) - sum(lengths) - 4 :]
            )
        shard = i % shards
        checksum = masked(crc32c(counted)) if checksums else None
        found = entry(dtype, shape, shard, len(data[shard]), len(raw), checksum)
        if key in sliced:
            values[b"\0" + key.encode() + b"\0\1"] = found
            found = entry(dtype, shape, 0, 0, 0, None, slices=2)
        values[key.encode()] = found
        data[shard] += raw
    values |= extra or {}
    for shard, raw in enumerate(data):
        Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}").write_bytes(raw)
    Path(f"{prefix}.index").write_bytes(table(sorted(values.items()), **table_options))
