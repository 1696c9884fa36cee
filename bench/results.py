"""The result line: one measurement, one line of JSON. Tables are made from lines, never typed."""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine


@dataclasses.dataclass(frozen=True)
class Line:
    """One contender on one case in one mode. Times of one process, its contenders interleaved."""

    op: str  # or "step": a whole training step
    case: str
    dtype: str
    mode: str  # fwd, bwd, fwd+bwd
    backend: str  # ours, or a peer's name
    ours: bool
    ms_p20: float
    ms_p50: float
    ms_p80: float
    rounds: int
    clock: str  # cuda_graph, cuda_events, perf_counter
    peak_bytes: (
        int | None
    )  # beyond the inputs; of a step on a GPU everything, on a CPU beyond weights and optimizer state
    tflops: float | None  # achieved, where the floor is the matmuls'
    gb_per_s: float | None  # achieved, where the floor is the bytes'
    share_of_ceiling: float | None  # of the ceiling measured in this process
    error: (
        float | None
    )  # worst of the outputs and, unless mode is fwd, the gradients: ||x - fp64|| / ||fp64||; None of another loss
    error_of: str | None  # the tensor it belongs to
    error_batch: int | None  # the batch at which it was measured
    device: str
    versions: dict[str, str]
    commit: str
    date: str
    dropout: float = 0.0
    drop_rate: float | None = None  # DropToken's, of the case
    speedup_over_best_peer: float | None = None  # median over the rounds; of peers None
    clips_per_second: float | None = None
    best_peer: str | None = (
        None  # whom speedup_over_best_peer speaks of; its own line says the rest
    )
    best_peer_ms_p50: float | None = None
    best_peer_error: float | None = None
    peak_resident: int | None = (
        None  # of the process, everything in it included, compilation too; Linux
    )
    stolen: float | None = (
        None  # share of the processors' time that the hypervisor took for others during the rounds; Linux
    )

    def to_json(self) -> str:
        return json.dumps(_rounded(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, text: str) -> "Line":
        return cls(**json.loads(text))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def of_device(device: str) -> Path:
    """Where a device's lines are kept beside the code."""
    words = re.sub(r"\(\w+\)|@|,|\bcpu\b|\bprocessor\b", " ", device.lower())
    return (
        Path(__file__).resolve().parent
        / "results"
        / ("_".join(re.findall(r"[\w.-]+", words)) + ".jsonl")
    )


def append(path: str | Path, lines: Iterable[Line]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(line.to_json() + "\n" for line in lines)


def read(path: str | Path) -> list[Line]:
    """Lines of a file; none where it does not exist. A last line cut short by a killed run is left out."""
    path = Path(path)
    if not path.exists():
        return []
    return [
        Line.from_json(text)
        for text in path.read_text().rpartition("\n")[0].splitlines()
        if text.strip()
    ]


_MODEL = tuple(
    f"vatt_fast/{name}.py"
    for name in ("collectives", "config", "flops", "losses", "model", "positions")
)
_BUILD = ("csrc/vectors.h", "csrc/*isa*", "csrc/bind*", "csrc/compile_native.py", "setup.py")
_ON_PRODUCTS = ("attention", "contrastive_lse", "step")
_ELSEWHERE = {  # kernels that a device does not run
    "cpu": ("pallas", "triton", "tile"),
    "cuda": ("pallas", "native"),
}


def _measured_files(line: Line) -> tuple[str, ...]:
    """Pathspecs of what a line measures: its op's kernels, all ops' and the model for a step, and what ops share. A case keeps its name."""
    device = "cuda" if "cuda" in line.versions else "cpu"
    op = "*" if line.op == "step" else line.op
    sources = (
        f":(glob)kernels/{op}/**",
        ":(glob)kernels/*.py",
        *(
            (f"csrc/*{op}*", *_BUILD, *(("csrc/products.h",) if line.op in _ON_PRODUCTS else ()))
            if device == "cpu"
            else ("kernels/tiles",)
        ),
    )
    contenders = (
        () if line.ours and line.best_peer is None else ("bench/peers.py", "bench/towers.py")
    )
    others = tuple(
        f":(exclude,glob)kernels/**/{name}*"
        for name in (*_ELSEWHERE[device], "cases", "jax", "xla")
    )
    others += (":(exclude)kernels/__init__.py",)  # names alone
    return (*sources, *(_MODEL if line.op == "step" else ()), *contenders, *others)


_DISTURBED = 0.05


def stale(line: Line) -> str | None:
    """Why a line does not speak of this code: what it measured has changed, torch is another, or it was disturbed; None where it does."""
    if line.stolen is not None and line.stolen > _DISTURBED:
        return f"more than {_DISTURBED:.0%} of the processors' time went to other machines"
    if changed := machine.changed_since(line.commit, _measured_files(line)):
        return changed
    here, there = (
        versions.split("+")[0] for versions in (torch.__version__, line.versions["torch"])
    )
    return None if here == there else f"torch was {there}, here it is {here}"


def measured(path: str | Path, **wanted: Any) -> list[Line]:
    """Lines of a file that are not stale and have these values: what a command that continues need not measure again."""
    return [
        line
        for line in read(path)
        if all(getattr(line, name) == value for name, value in wanted.items()) and not stale(line)
    ]


HEADINGS = [
    "op",
    "case",
    "dtype",
    "mode",
    "backend",
    "ms_p50",
    "p20..p80",
    "speed",
    "share",
    "error",
    "peak_MiB",
    "over_best_peer",
]


def markdown(lines: Sequence[Line]) -> str:
    """One table; ours in bold, faster first within a case and mode."""
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        groups.setdefault((line.op, line.case, line.dtype, line.mode), []).append(line)
    rows = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for group in groups.values():
        rows += [
            "| " + " | ".join(cells(line)) + " |"
            for line in sorted(group, key=lambda line: line.ms_p50)
        ]
    return "\n".join(rows)


def number(value: float) -> str:
    """Four digits, and never an exponent for something large."""
    return f"{value:.4g}" if abs(value) < 999.5 else f"{value:.0f}"


def cells(line: Line) -> list[str]:
    """A line under HEADINGS."""
    speeds = ((line.clips_per_second, "clips/s"), (line.tflops, "TFLOP/s"), (line.gb_per_s, "GB/s"))
    speed = ", ".join(f"{number(value)} {unit}" for value, unit in speeds if value is not None)
    return [
        line.op,
        line.case,
        line.dtype,
        line.mode,
        (f"**{line.backend}**" if line.ours else line.backend)
        + (" (launches counted)" if line.clock == "cuda_events" else ""),
        number(line.ms_p50),
        f"{number(line.ms_p20)}..{number(line.ms_p80)} of {line.rounds}",
        speed,
        "" if line.share_of_ceiling is None else f"{line.share_of_ceiling:.0%}",
        "" if line.error is None else f"{line.error:.1e} ({line.error_of})",
        "" if line.peak_bytes is None else f"{line.peak_bytes / 2**20:.1f}",
        "" if line.speedup_over_best_peer is None else f"{line.speedup_over_best_peer:.2f}x",
    ]
