"""The result line: one measurement, one line of JSON. Tables are made from lines, never typed."""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import digest

RESULTS = Path(__file__).resolve().parent / "results"
_DISTURBED = 0.05  # of the processors' time


@dataclasses.dataclass(frozen=True)
class Line:
    """One contender on one case in one mode. The contenders of a process run in turn."""

    op: str  # or "step": a whole training step, or inference
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
    # of an op beyond its inputs; of a step everything on a GPU, on a CPU what is beyond weights
    # and optimizer state
    peak_bytes: int | None
    tflops: float | None  # achieved, where the floor is the matmuls'
    gb_per_s: float | None  # achieved, where the floor is the bytes'
    share_of_ceiling: float | None  # of the ceiling measured in this process
    # worst of the outputs and, unless mode is fwd, of the gradients: ||x - fp64|| / ||fp64||;
    # None where another loss is timed
    error: float | None
    error_of: str | None  # the tensor it belongs to
    error_batch: int | None  # the batch at which it was measured
    device: str
    versions: dict[str, str]
    commit: str
    date: str
    dropout: float = 0.0
    drop_rate: float | None = None  # DropToken's, of the case
    speedup_over_best_peer: float | None = None  # median over the rounds; None of peers
    clips_per_second: float | None = None
    best_peer: str | None = None  # its own line says the rest
    best_peer_ms_p50: float | None = None
    best_peer_error: float | None = None
    peak_resident: int | None = None  # of the whole process, compilers included; Linux only
    # share of the processors' time that the hypervisor gave to others during the rounds; Linux
    stolen: float | None = None
    source: str = ""  # digest of the sources that ran (``digest.py``)

    @property
    def cuda(self) -> bool:
        return "cuda" in self.versions

    @property
    def machine(self) -> tuple[str, str]:
        """Processor and instruction level: two machines may share a processor's name."""
        return self.device, self.versions.get("instructions", "")

    def to_json(self) -> str:
        return json.dumps(_rounded(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, text: str) -> "Line":
        return cls(**json.loads(text))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def slug(device: str, instructions: str = "") -> str:
    """A machine's name for files: intel_xeon_2_threads_amx_bf16."""
    words = re.sub(r"\(\w+\)|@|,|\bcpu\b|\bprocessor\b", " ", f"{device} {instructions}".lower())
    return "_".join(re.findall(r"[\w.-]+", words))


def file_of(device: str, versions: dict[str, str]) -> Path:
    """Where a machine's lines are kept beside the code."""
    return RESULTS / f"{slug(device, versions.get('instructions', ''))}.jsonl"


def files(folder: Path = RESULTS) -> list[Path]:
    """Those with lines: not what was compiled, runs of accuracy, rows of decoding or of ranks."""
    found = sorted(folder.glob("*.jsonl"))
    return [
        path
        for path in found
        if not path.name.startswith(("compile_", "accuracy", "data", "ranks"))
    ]


def append(path: str | Path, lines: Iterable[Line]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(line.to_json() + "\n" for line in lines)


def read(path: str | Path) -> list[Line]:
    """Lines of a file, none where it does not exist; without half a line of a killed run."""
    path = Path(path)
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [Line.from_json(text) for text in whole.splitlines() if text.strip()]


def source_of(line: Line) -> str:
    """Digest of what a line measures, in today's sources."""
    return digest.of(line.op, line.backend, line.ours, line.best_peer, line.dtype, line.cuda)


def stale(line: Line) -> str | None:
    """Why a line does not speak of this code; None where it does."""
    if line.stolen is not None and line.stolen > _DISTURBED:
        return f"more than {_DISTURBED:.0%} of the processors' time went to other machines"
    if not line.source:
        return "it was measured on sources that have changed since"
    if line.source != source_of(line):
        return "the sources that it ran have changed"
    here, there = (
        versions.split("+")[0] for versions in (torch.__version__, line.versions["torch"])
    )
    return None if here == there else f"torch was {there}, here it is {here}"


def measured(path: str | Path, machine: tuple[str, str], **wanted: Any) -> list[Line]:
    """Fresh lines of a machine with these values: what a command that continues leaves out."""
    return [
        line
        for line in read(path)
        if line.machine == machine
        and all(getattr(line, name) == value for name, value in wanted.items())
        and not stale(line)
    ]


# -- as text ----------------------------------------------------------------------------------

HEADINGS = [
    *("op", "case", "dtype", "mode", "backend", "ms_p50", "p20..p80", "speed", "share", "error"),
    *("peak_MiB", "over_best_peer"),
]


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    made = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in made)


def number(value: float) -> str:
    """Four digits, and no exponent for something large."""
    return f"{value:.4g}" if abs(value) < 999.5 else f"{value:.0f}"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def cells(line: Line) -> list[str]:
    """A line under HEADINGS."""
    speeds = ((line.clips_per_second, "clips/s"), (line.tflops, "TFLOP/s"), (line.gb_per_s, "GB/s"))
    return [
        *(line.op, line.case, line.dtype, line.mode),
        (f"**{line.backend}**" if line.ours else line.backend)
        + (" (launches counted)" if line.clock == "cuda_events" else ""),
        number(line.ms_p50),
        f"{number(line.ms_p20)}..{number(line.ms_p80)} of {line.rounds}",
        ", ".join(f"{number(value)} {unit}" for value, unit in speeds if value is not None),
        "" if line.share_of_ceiling is None else f"{line.share_of_ceiling:.0%}",
        "" if line.error is None else f"{line.error:.1e} ({line.error_of})",
        "" if line.peak_bytes is None else f"{line.peak_bytes / 2**20:.1f}",
        times(line.speedup_over_best_peer),
    ]


def describe(line: Line) -> str:
    """One line for the terminal."""
    peer = f" ({line.best_peer} {number(line.best_peer_ms_p50 or 0)} ms)" if line.best_peer else ""
    return "  ".join(cell for cell in cells(line) if cell) + peer
