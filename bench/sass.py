"""Machine code of NVIDIA kernels: what ptxas made of one, counted without a GPU.

The numbers are integers, and the same every time for one Triton and one ptxas. They are no times.
Clocks are those of a multiprocessor of sm_90, had its unit nothing else to wait for: a wgmma of
64 x N x 16 takes N / 2, shared memory moves 128 bytes in one (operands of wgmma from there: a
model, nothing that NVIDIA documents).
"""

import functools
import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

MATRIX = ("UTCHMMA", "HGMMA", "HMMA")
_FUSED = ("FFMA", "FFMA2")  # products of fp32 that no matrix unit computes
_LOADS = ("LDG", "LDGSTS")
_SHARED = ("LDS", "STS", "LDSM", "STSM")
# ptxas: the matrix products of a kernel wait for one another (C7519 says of none that it does)
_SERIALISED = re.compile(r"\((C751[0-8])\)")


class Limits(NamedTuple):
    """What a multiprocessor shares among the programs that run on it."""

    shared_bytes: int  # each program needs 1 KiB more than it asks for
    warps: int
    registers: int = 65536


LIMITS = {
    80: Limits(164 << 10, 64),
    89: Limits(100 << 10, 48),
    90: Limits(228 << 10, 64),
    100: Limits(228 << 10, 64),
    120: Limits(100 << 10, 48),
}


@dataclass(frozen=True)
class Loop:
    """The innermost loop with most matrix products, once through; of one warp where not said.

    Where the products are unrolled it is the whole kernel, and ``looped`` is 0. Of fp32 products
    without a matrix unit, fused multiply-adds count instead.
    """

    looped: int
    instructions: int
    products: int  # matrix instructions, or fused multiply-adds
    waits: int  # for wgmma
    barriers: int  # of the program's warps
    copies_ahead: int | None  # cp.async groups in flight when it waits for one; None: no cp.async
    exponentials: int  # and other special functions
    atomics: int  # to global memory
    spills: int
    loaded_bytes: int  # of global memory, a thread
    narrow_bytes: int  # of them by accesses of less than 16
    shared_accesses: int
    shared_clocks: int  # of the whole program
    tensor_clocks: int  # of the whole program, of wgmma


@dataclass(frozen=True)
class Code:
    """A compiled kernel."""

    registers: int  # a thread
    stack_bytes: int
    spills: int  # stores to and loads from local memory
    instructions: int
    matrix: str  # kinds of matrix instruction
    serialised: str  # ptxas's warnings that products wait for one another
    programs: int  # that a multiprocessor holds
    loop: dict[str, Any] | None  # a ``Loop``; None where there is no product


@functools.cache  # the disassembler takes as long as the compiler, and cases meet the same kernel
def read(kernel: Any) -> Code:
    """What a kernel that Triton compiled for CUDA became."""
    arch, warps = kernel.metadata.target.arch, kernel.metadata.num_warps
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = (Path(folder, f"kernel.{kind}") for kind in ("cubin", "ptx"))
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        usage, text = (_run(_cuobjdump(), option, cubin) for option in ("-res-usage", "-sass"))
        name = f"--gpu-name={sm_arch_from_capability(arch)}"
        log = _run(_ptxas(arch).path, "-v", name, ptx, "-o", Path(folder, "again"))
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    code = _instructions(text)
    kinds = Counter(_name(each) for _, each in code)
    return Code(
        registers=used["REG"],
        stack_bytes=used["STACK"],
        spills=kinds["STL"] + kinds["LDL"],
        instructions=len(code),
        matrix=" ".join(sorted(set(MATRIX) & set(kinds))),
        serialised=" ".join(sorted(set(_SERIALISED.findall(log)))),
        programs=_programs(LIMITS[arch], used["REG"], kernel.metadata.shared, warps),
        loop=_main_loop(code, warps, _product_names(kinds, kernel.asm["ttir"])),
    )


def versions(arch: int) -> str:
    """Of the compilers: counts of other ones need not be the same."""
    return f"triton {triton.__version__}, ptxas {_ptxas(arch).version}"


def _ptxas(arch: int) -> Any:
    """Triton's assembler for an architecture: before 3.6 it had one for all."""
    return get_ptxas(*[arch] * len(inspect.signature(get_ptxas).parameters))


def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _run(*command: Any) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def _programs(limits: Limits, registers: int, shared_bytes: int, warps: int) -> int:
    of_a_warp = -(-registers // 8) * 8 * 32  # registers are handed out by eights
    return min(
        limits.registers // (of_a_warp * warps),
        limits.shared_bytes // (shared_bytes + 1024),
        limits.warps // warps,
    )


# -- instructions -----------------------------------------------------------------------------

Instruction = tuple[int, str]  # its address, its text without a predicate


def _instructions(text: str) -> list[Instruction]:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S.*?)\s*;", text)
    return [(int(address, 16), each) for address, each in found]


def _name(instruction: str) -> str:
    return re.split(r"[.\s]", instruction, maxsplit=1)[0]


def _width(instruction: str) -> int:
    """Bytes that one thread moves."""
    kind = instruction.split(maxsplit=1)[0]
    widths = {".128": 16, ".64": 8, ".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2}
    return next((size for suffix, size in widths.items() if suffix in kind), 4)


def _loops(code: Sequence[Instruction]) -> Iterator[Sequence[Instruction]]:
    """Innermost loops: what lies between a branch backwards and its target."""
    spans = set()
    for address, each in code:
        target = re.match(r"BRA\b.*?\b0x([0-9a-f]+)", each)
        if target and int(target[1], 16) < address:
            spans.add((int(target[1], 16), address))
    for first, last in spans:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            yield [each for each in code if first <= each[0] <= last]


def _product_names(kinds: Collection[str], ttir: str) -> tuple[str, ...]:
    """What a kernel's products are made of; nothing where Triton's own code has none."""
    matrix = tuple(each for each in MATRIX if each in kinds)
    return matrix or (_FUSED if "tt.dot" in ttir else ())


def _main_loop(
    code: Sequence[Instruction], warps: int, names: Sequence[str] = MATRIX
) -> dict[str, Any] | None:
    def work(part: Sequence[Instruction]) -> tuple[int, int, int]:
        sizes = [_product(each) for _, each in part if _name(each) in names]
        return sum(n * k for n, k, _ in sizes), len(sizes), -part[0][0]

    if not any(_name(each) in names for _, each in code):
        return None
    body = max(_loops(code), key=work, default=code)
    looped = work(body)[1] > 0 and body is not code
    counted = [each for _, each in (body if looped else code)]
    return asdict(_count(counted, looped, warps, names))


def _count(body: Sequence[str], looped: bool, warps: int, names: Sequence[str]) -> Loop:
    kinds = Counter(map(_name, body))
    loads = [_width(each) for each in body if _name(each) in _LOADS]
    # not to its end: older disassemblers let notes on scheduling follow
    waits = (re.match(r"DEPBAR\.LE SB\d+, (0x[0-9a-f]+)", each) for each in body)
    pending = [int(each[1], 16) for each in waits if each]
    return Loop(
        looped=int(looped),
        instructions=len(body),
        products=sum(kinds[each] for each in names),
        waits=sum(each.startswith("WARPGROUP.DEPBAR") for each in body),
        barriers=sum(each.startswith("BAR.SYNC") for each in body),
        copies_ahead=max(pending, default=0) if kinds["LDGSTS"] else None,
        exponentials=kinds["MUFU"],
        atomics=sum(kinds[each] for each in ("RED", "REDG", "ATOM", "ATOMG")),
        spills=kinds["STL"] + kinds["LDL"],
        loaded_bytes=sum(loads),
        narrow_bytes=sum(each for each in loads if each < 16),
        shared_accesses=sum(kinds[each] for each in _SHARED),
        shared_clocks=sum(_shared_bytes(each, warps) for each in body) // 128,
        tensor_clocks=sum(n * k for n, k, _ in map(_product, body)) * warps // 128,
    )


def _product(instruction: str) -> tuple[int, int, bool]:
    """(N, K, whether A comes from registers) of a wgmma of 64 x N x K."""
    size = re.match(r"HGMMA\.64x(\d+)x(\d+)", instruction)
    if size is None:
        return 0, 0, False
    return int(size[1]), int(size[2]), bool(re.search(r"MMA\S* R\d+, R\d+, ", instruction))


def _shared_bytes(instruction: str, warps: int) -> int:
    """That the program moves to or from shared memory by this instruction."""
    name = _name(instruction)
    n, k, from_registers = _product(instruction)
    if n:  # B once a warpgroup, A too unless it lies in registers
        return (n * k * 2 + (0 if from_registers else 64 * k * 2)) * warps // 4
    if name in ("LDSM", "STSM"):
        return (512 if ".4" in instruction else 256) * warps
    if name == "LDGSTS" or (name in ("LDS", "STS") and "[RZ]" not in instruction):
        return _width(instruction) * 32 * warps
    return 0
