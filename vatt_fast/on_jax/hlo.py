"""Read what XLA made of a program from its optimised HLO.

Mosaic kernels, layout changes, exchanges between devices.
"""

import collections
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*))?")
KERNEL = re.compile(r"vatt_\w*[a-z]")  # autodiff wraps the names we give
_ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
_VIEWS = {"bitcast", "get-tuple-element", "tuple", "opt-barrier", "copy-start", "copy-done"}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class _Instruction:
    name: str
    computation: str
    root: bool
    shape: str  # as printed, with the order of axes in memory; a tuple's holds several
    opcode: str
    operands: tuple[str, ...]
    rest: str  # everything behind the opening bracket

    @property
    def callee(self) -> str:
        """The computation of a fusion."""
        found = re.search(r"calls=%?([\w.\-]+)", self.rest) if self.opcode == "fusion" else None
        return found[1] if found else ""

    @property
    def elements(self) -> int:
        """Of its largest array."""
        return max((_count(dims) for _, dims, _ in _ARRAY.findall(self.shape)), default=0)


class Program:
    """An optimised HLO module: ``compiled.as_text()`` of a jitted function."""

    def __init__(self, text: str):
        self._lines = {line.name: line for line in _instructions(text)}
        self._roots = {line.computation: line for line in self._lines.values() if line.root}
        self._users: dict[str, list[str]] = collections.defaultdict(list)
        for line in self._lines.values():
            for operand in line.operands:
                self._users[operand].append(line.name)
        self._kernels = [
            line
            for line in self._lines.values()
            if 'custom_call_target="tpu_custom_call"' in line.rest
        ]

    def kernels(self) -> dict[str, int]:
        """{name: calls in the text} of the Mosaic kernels; one inside a loop counts once."""
        return dict(
            sorted(collections.Counter(_kernel_name(line) for line in self._kernels).items())
        )

    def vmem_bytes(self) -> int:
        """VMEM of the kernel that takes most."""
        sizes = [0]
        for line in self._kernels:
            if used := re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line.rest):
                sizes += [
                    int(size)
                    for space, size in re.findall(
                        r'"memory_space":"(\d+)"[^}]*?"size":"(\d+)"', used[1]
                    )
                    if space == "1"
                ]
        return max(sizes)

    def collectives(self) -> dict[str, int]:
        """{kind: number} of the exchanges between devices; one inside a loop counts once."""
        found = collections.Counter(
            line.opcode.removesuffix("-start") for line in self._lines.values()
        )
        return {kind: found[kind] for kind in _COLLECTIVES if found[kind]}

    def layout_changes(self) -> dict[str, int]:
        """{name: bytes} of the copies and transposes that change the order of axes in memory.

        They stand alone or as a fusion's root; one inside a loop counts once.
        """
        fused = {line.callee for line in self._lines.values()}
        alone = (
            line
            for line in self._lines.values()
            if line.computation not in fused and self._reorders(line)
        )
        return {
            line.name: sum(
                _count(dims) * _ITEM_BYTES.get(kind, 4)
                for kind, dims, _ in _ARRAY.findall(line.shape)
            )
            for line in alone
        }

    def layout_changes_at_kernels(self) -> list[str]:
        """Those that a kernel's large operands come from, or its large results go to.

        Only views lie between. Large: from a quarter of the kernel's largest array; so rows of
        statistics are not.
        """
        found: set[str] = set()
        for kernel in self._kernels:
            operands = [self._lines[name] for name in kernel.operands]
            large = max(line.elements for line in (kernel, *operands)) / 4
            for _, before in self._beyond_views(kernel, lambda line: line.operands):
                if before.elements >= large and self._reorders(before):
                    found.add(before.name)
            for seen, after in self._beyond_views(kernel, lambda line: self._users[line.name]):
                if after.elements >= large and (
                    self._reorders(after) or self._reorders_inside(after, seen)
                ):
                    found.add(after.name)
        return sorted(found)

    def _beyond_views(
        self, start: _Instruction, neighbours: Callable[[_Instruction], Iterable[str]]
    ) -> list[tuple[str, _Instruction]]:
        """(the last view, the instruction beyond) for all around ``start``."""
        found, waiting, seen = [], [start], {start.name}
        while waiting:
            here = waiting.pop()
            for line in (self._lines[name] for name in neighbours(here) if name in self._lines):
                if line.opcode not in _VIEWS:
                    found.append((here.name, line))
                elif line.name not in seen:
                    seen.add(line.name)
                    waiting.append(line)
        return found

    def _reorders_inside(self, fusion: _Instruction, operand: str) -> bool:
        """A fusion reorders its ``operand`` before anything else."""
        parameters = {str(i) for i, name in enumerate(fusion.operands) if name == operand}
        inside = [
            line
            for line in self._lines.values()
            if fusion.callee and line.computation == fusion.callee
        ]
        given = {
            line.name
            for line in inside
            if line.opcode == "parameter" and line.rest.partition(")")[0] in parameters
        }
        return any(
            self._reorders(line) for line in inside if line.operands and line.operands[0] in given
        )

    def _reorders(self, line: _Instruction) -> bool:
        if line.opcode == "fusion":
            root = self._roots.get(line.callee)
            while root is not None and root.opcode == "bitcast":
                root = self._lines[root.operands[0]]
            return root is not None and root.opcode != "fusion" and self._reorders(root)
        if line.opcode not in ("copy", "transpose") or not line.operands:
            return False
        to, of = _ARRAY.match(line.shape), _ARRAY.match(self._lines[line.operands[0]].shape)
        if to is None or of is None:
            return False
        order, previous = _axes(to[3]), _axes(of[3])
        if line.opcode == "transpose":
            moved = re.search(r"dimensions=\{([\d,]*)\}", line.rest)
            axes = _axes(moved[1]) if moved else order
            order = [axes[axis] for axis in order]
        sizes = _axes(of[2])
        return [axis for axis in order if sizes[axis] > 1] != [
            axis for axis in previous if sizes[axis] > 1
        ]


def _instructions(text: str) -> Iterable[_Instruction]:
    computation = ""
    # long tuples number their parts in comments
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if opens := _COMPUTATION.match(line):
            computation = opens[1]
        elif found := _LINE.match(line):
            root, name, shape, opcode, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))
            yield _Instruction(name, computation, bool(root), shape, opcode, operands, rest)


def _kernel_name(line: _Instruction) -> str:
    found = KERNEL.search(line.name) or KERNEL.search(line.rest)
    return found[0] if found else line.name


def _axes(numbers: str | None) -> list[int]:
    return [int(number) for number in (numbers or "").split(",") if number]


def _count(dims: str) -> int:
    return math.prod(_axes(dims))
