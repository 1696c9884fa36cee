"""patch_embed's conversion by hand: its assembly, run by a few lines of Python."""

import re
import struct

import pytest

pytest.importorskip("triton", reason="the kernels import triton, which is not installed")

import torch

from vatt_fast.kernels.patch_embed import triton_gpu


def bf16_pair(word: int) -> list[float]:
    """The two values of a register, low half first; a bf16 is the upper half of an fp32."""
    halves = (word & 0xFFFF, word >> 16)
    return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]


def as_bf16(value: float) -> int:
    word = struct.unpack("<I", struct.pack("<f", value))[0]
    assert word & 0xFFFF == 0, f"{value} is no bf16: the operation would round"
    return word >> 16


def prmt(a: int, b: int, selector: int) -> int:
    """Four bytes of a (0 to 3) and b (4 to 7), chosen by the selector's nibbles, lowest first."""
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    return int.from_bytes(bytes(data[selector >> 4 * i & 7] for i in range(4)), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit by bit, the table's entry at 4 a + 2 b + c."""
    index = (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1) for i in range(32))
    return sum((table >> at & 1) << i for i, at in enumerate(index))


def fma(a: int, b: int, c: int) -> int:
    low, high = (x * y + z for x, y, z in zip(*map(bf16_pair, (a, b, c)), strict=True))
    return as_bf16(high) << 16 | as_bf16(low)


OPERATIONS = {
    "mov.b32": lambda a: a,
    "cvt.u32.u16": lambda a: a & 0xFFFF,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": fma,
}


def execute(assembly: str, given: int) -> int:
    """$0 after the instructions have run with $1 = ``given``."""
    registers = {"$1": given}
    for line in re.findall(r"^ +([^.\s].*);", assembly, flags=re.MULTILINE):
        name, operands = line.split(maxsplit=1)
        target, *sources = operands.split(", ")
        values = [registers[x] if x in registers else int(x, 0) for x in sources]
        registers[target] = OPERATIONS[name](*values)
    return registers["$0"]


def test_the_conversion_by_hand_is_exact():
    for u in range(256):
        other = 255 - u * 7 % 256
        found = bf16_pair(execute(triton_gpu.CENTRED_BF16.value, other << 8 | u))
        assert found == [u - 128, other - 128]


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_it_runs_where_it_is_shorter_than_the_compilers(monkeypatch, arch, interpreted):
    monkeypatch.setattr(triton_gpu, "arch", lambda: arch)
    monkeypatch.setattr(triton_gpu, "interpreted", lambda: interpreted)
    takes = {raw: triton_gpu._by_hand(raw, torch.bfloat16) for raw in (torch.uint8, torch.float32)}
    assert takes == {torch.uint8: arch == "sm_90" and not interpreted, torch.float32: False}
    assert not triton_gpu._by_hand(torch.uint8, torch.float16)
