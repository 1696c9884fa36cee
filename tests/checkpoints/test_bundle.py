"""The reader of TensorFlow's checkpoint files: what it reads, what it refuses, and damage."""

import random
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tf_bundle_writer as writer
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tf_bundle_writer import entry, masked, varint, write_bundle

from vatt_fast.checkpoints import bundle as reader
from vatt_fast.checkpoints.bundle import Bundle, is_checkpoint, prefix_of

RECORDED = Path(__file__).parents[1] / "support"
needs_crc32c = pytest.mark.skipif(
    not reader.CHECKS_TENSORS, reason="google-crc32c is not installed: tensors are not compared"
)


def some_tensors() -> dict:
    random_numbers = np.random.default_rng(0)
    tensors = {
        f"model/layers/{i}/kernel": random_numbers.standard_normal((3, i + 1)).astype(np.float32)
        for i in range(40)
    }
    return tensors | {
        "half": random_numbers.standard_normal((4, 5)).astype(np.float16),
        "double": random_numbers.standard_normal(3),
        "brain": ("bfloat16", (2, 2), struct.pack("<4H", 0x3F80, 0xC000, 0x4049, 0)),
        "counter": np.array(-7),
        "int": np.arange(6, dtype=np.int32).reshape(2, 3),
        "empty": np.zeros((0, 3), np.float32),
        "graph": [b"a", b"", b"\xff" * 300],
    }


def assert_holds(bundle: Bundle, tensors: dict) -> None:
    assert set(bundle.entries) == set(tensors)
    for key, expected in tensors.items():
        if isinstance(expected, list):
            assert bundle.strings(key) == expected
        elif isinstance(expected, tuple):
            raw = torch.frombuffer(bytearray(expected[2]), dtype=torch.bfloat16)
            assert torch.equal(bundle.tensor(key), raw.reshape(expected[1]))
        else:
            found = bundle.tensor(key)
            assert found.numpy().dtype == expected.dtype and found.shape == expected.shape
            assert np.array_equal(found.numpy(), expected)


# -- what it reads ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shards": 3},
        {"shards": 2, "reverse": True},
        {"block_entries": 1},
        {"block_entries": 7, "restart_interval": 1},
        {"restart_interval": 10**6},
        {"checksums": False},
    ],
    ids=str,
)
def test_reads_what_was_written(tmp_path, options):
    tensors = some_tensors()
    write_bundle(tmp_path / "ckpt-5", tensors, **options)
    assert_holds(Bundle(tmp_path / "ckpt-5"), tensors)


@pytest.mark.parametrize("kind", ["tx_fac", "ut_fac"])
def test_reads_tensorflows_own_files(kind):
    """Every tensor and the object graph, whose checksums TensorFlow wrote."""
    bundle = Bundle(RECORDED / f"tiny_ckpt_{kind}" / "ckpt-1")
    kinds = [entry.dtype_name for entry in bundle.entries.values()]
    assert set(kinds) == {"float32", "int64", "string"}
    (graph,) = bundle.strings("_CHECKPOINTABLE_OBJECT_GRAPH")
    assert b"layer_with_weights-0" in graph
    for key, found in bundle.entries.items():
        if found.dtype_name != "string":
            assert bundle.tensor(key).shape == found.shape
    steps = bundle.tensor("save_counter/.ATTRIBUTES/VARIABLE_VALUE")
    assert steps.dtype == torch.int64 and steps.item() == 1


def test_a_tensor_is_the_callers_own(tmp_path):
    write_bundle(tmp_path / "ckpt", {"a": np.ones(4, np.float32)})
    bundle = Bundle(tmp_path / "ckpt")
    bundle.tensor("a").zero_()
    assert bundle.tensor("a").sum() == 4


def test_prefix_or_one_of_the_files_names_a_checkpoint(tmp_path):
    write_bundle(tmp_path / "ckpt-5", {"a": np.ones(1, np.float32)})
    prefix = str(tmp_path / "ckpt-5")
    for name in (prefix, f"{prefix}.index", f"{prefix}.data-00000-of-00001"):
        assert prefix_of(name) == prefix and is_checkpoint(name)
        assert Bundle(name).entries.keys() == {"a"}
    assert not is_checkpoint(tmp_path / "ckpt") and not is_checkpoint(tmp_path)


# -- what it refuses -------------------------------------------------------------------------------


def refuses(prefix: Path, *words: str, key: str | None = None) -> None:
    message = refusal(lambda: Bundle(prefix) if key is None else Bundle(prefix).tensor(key))
    assert message is not None
    assert "\n" not in message and str(prefix) in message
    for word in words:
        assert word in message, message


def refusal(call) -> str | None:
    """What a ValueError says; None where there is none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


A = {"a": np.arange(5, dtype=np.float32), "b": np.ones((2, 2), np.float32)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compression": 1}, ("compressed", "snappy")),
        ({"compression": 4}, ("compressed", "kind 4")),
        ({"big_endian": True}, ("big-endian",)),
        ({"oldest_reader": 2}, ("readers of version 2",)),
    ],
    ids=str,
)
def test_other_kinds_are_refused_by_name(tmp_path, options, words):
    write_bundle(tmp_path / "ckpt", A, **options)
    refuses(tmp_path / "ckpt", ".index cannot be read", *words)


def test_slices_are_refused_where_they_are_wanted(tmp_path):
    write_bundle(tmp_path / "ckpt", A, sliced=("a",))
    bundle = Bundle(tmp_path / "ckpt")
    assert bundle.entries.keys() == {"a", "b"}
    assert bundle.tensor("b").sum() == 4
    refuses(tmp_path / "ckpt", "a is stored in slices", key="a")


def test_other_dtypes_and_keys_are_refused_where_they_are_wanted(tmp_path):
    write_bundle(tmp_path / "ckpt", A | {"flag": np.array(True), "text": [b"x"]})
    for key, word in (("flag", "bool"), ("text", "string"), ("none", "has no none")):
        refuses(tmp_path / "ckpt", word, key=key)
    with pytest.raises(ValueError, match="a holds float32, not strings"):
        Bundle(tmp_path / "ckpt").strings("a")


def test_missing_files_are_named(tmp_path):
    write_bundle(tmp_path / "ckpt", A, shards=2)
    (tmp_path / "ckpt.data-00001-of-00002").unlink()
    refuses(tmp_path / "ckpt", "ckpt.data-00001-of-00002 is missing", "2 data files")
    refuses(tmp_path, ".index is missing", "in this folder there is ckpt")
    (tmp_path / "ckpt.index").unlink()
    refuses(tmp_path / "ckpt", "ckpt.index is missing")


def test_files_that_are_cut_short_are_named(tmp_path):
    write_bundle(tmp_path / "ckpt", A, shards=2)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for length in {0, 1, len(whole) // 2, len(whole) - 48, len(whole) - 1} - {-1}:
            path.write_bytes(whole[: max(length, 0)])
            refuses(tmp_path / "ckpt", path.name)
        path.write_bytes(whole)
    assert_holds(Bundle(tmp_path / "ckpt"), A)


# -- damage ----------------------------------------------------------------------------------------


def flips(path: Path, count: int, seed: int):
    """The file with one flipped bit, ``count`` times."""
    whole = path.read_bytes()
    places = random.Random(seed).sample(range(8 * len(whole)), min(count, 8 * len(whole)))
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        yield place
    path.write_bytes(whole)


def contents(prefix: Path) -> dict:
    bundle = Bundle(prefix)
    return {
        key: bundle.strings(key)
        if found.dtype_name == "string"
        else (bundle.tensor(key).dtype, found.shape, bundle.tensor(key).numpy().tobytes())
        for key, found in bundle.entries.items()
    }


def test_a_flipped_bit_of_the_index_never_goes_unseen(tmp_path):
    """Only the footer's unused parts may change."""
    tensors = {key: value for key, value in some_tensors().items() if key != "brain"}
    write_bundle(tmp_path / "ckpt", tensors, block_entries=20)
    whole, refused, count = contents(tmp_path / "ckpt"), 0, 300
    found = [whole]
    for _ in flips(tmp_path / "ckpt.index", count, seed=1):
        if message := refusal(lambda: found.append(contents(tmp_path / "ckpt"))):
            assert str(tmp_path / "ckpt") in message and "\n" not in message
            refused += 1
        assert found[-1] == whole
    assert refused > 0.95 * count


def test_the_indexs_checksums_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "google_crc32c", None)
    test_a_flipped_bit_of_the_index_never_goes_unseen(tmp_path)
    assert reader._crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C


@needs_crc32c
def test_a_flipped_bit_of_the_data_never_goes_unseen(tmp_path):
    tensors = {"a": np.arange(50, dtype=np.float32), "graph": [b"some", b"strings"]}
    write_bundle(tmp_path / "ckpt", tensors)
    path = tmp_path / "ckpt.data-00000-of-00001"
    for _ in flips(path, 300, seed=2):
        with pytest.raises(ValueError, match=r"damaged at (a|graph)"):
            contents(tmp_path / "ckpt")


@needs_crc32c
def test_a_flipped_bit_of_tensorflows_own_files_is_seen(tmp_path):
    for kind, seed in (("tx_fac", 3), ("ut_fac", 4)):
        folder = tmp_path / kind
        shutil.copytree(RECORDED / f"tiny_ckpt_{kind}", folder)
        for path in sorted(folder.iterdir()):
            for place in flips(path, 12, seed):
                if path.suffix == ".index" and place >= 8 * (path.stat().st_size - 48):
                    continue  # the footer has unused parts
                with pytest.raises(ValueError, match="damaged"):
                    contents(folder / "ckpt-1")


def crafted(prefix: Path, extra: dict[bytes, bytes]) -> None:
    """An index with sound checksums that says these things."""
    write_bundle(prefix, A, extra=extra)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({b"c": entry(1, (2**40,), 0, 0, 4, None)}, ("c has 4 bytes",)),
        ({b"c": entry(1, (2**30,), 0, 0, 2**32, None)}, ("cut short",)),
        ({b"c": entry(1, (2**62, 2**62, 4), 0, 0, 0, None)}, ("below 0 or beyond",)),
        ({b"c": entry(1, (-1,), 0, 0, 4, None)}, ("below 0 or beyond",)),
        ({b"c": entry(1, (1,), 0, -4, 4, None)}, ("below 0 or beyond",)),
        ({b"c": entry(1, (1,), 7, 0, 4, None)}, ("data file 7 of 1",)),
        ({b"c": entry(7, (2**40,), 0, 0, 8, None)}, ("c has 8 bytes",)),
        ({b"c": b"\x12\x02\x18\x01"}, ("unknown rank",)),
        ({b"c": b"\xff" * 11}, ("more than 10 bytes",)),
        ({b"c": b"\x12\x50\x01"}, ("not whole",)),
        ({b"c": b"\x0a\x01\x01"}, ("bytes in the place of a number",)),
        ({b"c": b"\x10\x01"}, ("number in the place of a message",)),
        ({b"": b""}, ("names 0 data files",)),
        ({b"": varint(8) + varint(2**31)}, ("names 2147483648 data files",)),
        ({b"k" * 5000: b""}, ("does not fit",)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_sound_checksums_around_nonsense(tmp_path, extra, words):
    crafted(tmp_path / "ckpt", extra)
    tracemalloc.start()
    refuses(tmp_path / "ckpt", *words)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_keys_that_share_their_beginnings_take_no_room(tmp_path):
    """20 kB of index would be 10 GB of keys."""
    long = b"k" * 1000
    one = varint(0) + varint(len(long)) + varint(0) + long
    pairs = one + b"".join(varint(1000 - i % 900) + varint(0) + varint(0) for i in range(5000))
    contents = pairs + struct.pack("<II", 0, 1)
    data = contents + b"\0" + masked(writer.crc32c(contents + b"\0"))
    index = writer.block([(b"k", varint(0) + varint(len(contents)))])
    handle = varint(len(data)) + varint(len(index))
    data += index + b"\0" + masked(writer.crc32c(index + b"\0"))
    footer = (varint(0) * 2 + handle).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    (tmp_path / "ckpt.index").write_bytes(data + footer)
    tracemalloc.start()
    refuses(tmp_path / "ckpt", "damaged")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_a_key_is_there_once(tmp_path):
    pairs = [(b"", writer.header(1)), *[(b"a", entry(1, (), 0, 0, 4, None))] * 2]
    (tmp_path / "ckpt.index").write_bytes(writer.table(pairs))
    (tmp_path / "ckpt.data-00000-of-00001").write_bytes(bytes(4))
    refuses(tmp_path / "ckpt", "a is there twice")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=st.binary(max_size=40), key=st.binary(max_size=12))
def test_any_message_under_any_key_is_read_or_refused(tmp_path, key, value):
    crafted(tmp_path / "ckpt", {key: value})
    if message := refusal(lambda: contents(tmp_path / "ckpt")):
        assert str(tmp_path / "ckpt") in message and "\n" not in message


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(contents_of=st.binary(max_size=60))
def test_any_block_is_read_or_refused(tmp_path, contents_of):
    """With a sound checksum and a sound footer."""
    block = contents_of + b"\0" + masked(writer.crc32c(contents_of + b"\0"))
    footer = varint(0) + varint(0) + varint(0) + varint(len(contents_of))
    footer = footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    (tmp_path / "ckpt.index").write_bytes(block + footer)
    refuses(tmp_path / "ckpt", "ckpt.index is damaged")
